//! OpenAI's messages and tools in the template's terms.
//!
//! Leading system and developer messages become one; a developer message further on becomes a user's,
//! since templates have no such role. Results of tools are put into the order of their calls, because
//! templates tell them apart by order alone. Text is all that is read.

use serde_json::{Map, Value as Json, json};

use super::fields::{Fields, expected};
use super::refusal::{Parsed, Refusal};
use super::request::{Choice, OfferedTool};

/// Why a picture is refused.
pub const TEXT_ALONE: &str = "this server reads text alone, no images, audio or files";

/// The messages of a request, the field at `path`.
///
/// # Errors
/// Names the message and the field that is wrong.
pub fn messages(list: Vec<Json>, path: &str) -> Parsed<Vec<Json>> {
    let mut messages: Vec<Json> = Vec::new();
    for (at, item) in list.into_iter().enumerate() {
        let message = message(item, &format!("{path}[{at}]"), &messages)?;
        let both_system =
            message["role"] == "system" && messages.len() == 1 && messages[0]["role"] == "system";
        if both_system {
            let joined = format!("{}\n\n{}", text_of(&messages[0]), text_of(&message));
            messages[0]["content"] = json!(joined);
        } else {
            messages.push(message);
        }
    }
    if messages.is_empty() {
        return Err(Refusal::field(path, "has no messages"));
    }
    order_results(&mut messages, path)?;
    Ok(messages)
}

fn text_of(message: &Json) -> &str {
    message["content"].as_str().unwrap_or("")
}

fn message(item: Json, path: &str, before: &[Json]) -> Parsed<Json> {
    let mut fields = Fields::of(item, path)?;
    let role = fields.needed_text("role")?;
    fields.accept(&["name"]);
    let content = content(fields.take("content"), &fields.path("content"))?;
    let needs = |content: Option<String>, fields: &Fields| {
        content.ok_or_else(|| fields.refusal("content", "is required"))
    };
    let message = match role.as_str() {
        "system" => json!({ "role": "system", "content": needs(content, &fields)? }),
        "developer" => {
            let leading = before.iter().all(|message| message["role"] == "system");
            let role = if leading { "system" } else { "user" };
            json!({ "role": role, "content": needs(content, &fields)? })
        }
        "user" => json!({ "role": "user", "content": needs(content, &fields)? }),
        "tool" => {
            let id = fields.needed_text("tool_call_id")?;
            json!({ "role": "tool", "content": needs(content, &fields)?, "tool_call_id": id })
        }
        "assistant" => assistant(&mut fields, content)?,
        other => {
            let known = "system, developer, user, assistant, tool";
            return Err(fields.refusal("role", format!("{other:?} is none of {known}")));
        }
    };
    fields.finish()?;
    Ok(message)
}

fn assistant(fields: &mut Fields, content: Option<String>) -> Parsed<Json> {
    fields.refuse("audio", TEXT_ALONE)?;
    fields.refuse("function_call", "use tool_calls")?;
    fields.accept(&["annotations"]);
    let refusal = fields.text("refusal")?;
    let reasoning = [fields.text("reasoning_content")?, fields.text("reasoning")?];
    let calls = fields.list("tool_calls")?.unwrap_or_else(Vec::new);
    let mut message = json!({ "role": "assistant", "content": content.or(refusal).into_iter().collect::<String>() });
    if let Some(reasoning) = reasoning.into_iter().flatten().next() {
        message["reasoning_content"] = json!(reasoning);
    }
    if !calls.is_empty() {
        let path = fields.path("tool_calls");
        let calls: Parsed<Vec<Json>> =
            calls.into_iter().enumerate().map(|(i, c)| call(c, &format!("{path}[{i}]"))).collect();
        message["tool_calls"] = Json::Array(calls?);
    }
    Ok(message)
}

fn call(item: Json, path: &str) -> Parsed<Json> {
    let mut fields = Fields::of(item, path)?;
    fields.accept(&["index"]);
    fields.only("type", &[json!("function")])?;
    let id = fields.needed_text("id")?;
    let mut function =
        fields.object("function")?.ok_or_else(|| fields.refusal("function", "is required"))?;
    fields.finish()?;
    let name = function.needed_text("name")?;
    let arguments = function.text("arguments")?.unwrap_or_else(String::new);
    let arguments = arguments_object(&arguments, &function.path("arguments"))?;
    function.finish()?;
    Ok(called(&id, &name, &arguments))
}

/// A call in the template's terms.
pub fn called(id: &str, name: &str, arguments: &Json) -> Json {
    json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
}

/// Arguments written as JSON text; nothing at all is no arguments.
///
/// # Errors
/// They are not a JSON object.
pub fn arguments_object(text: &str, path: &str) -> Parsed<Json> {
    if text.trim().is_empty() {
        return Ok(Json::Object(Map::new()));
    }
    match serde_json::from_str(text) {
        Ok(arguments @ Json::Object(_)) => Ok(arguments),
        _ => Err(Refusal::field(path, "is not a JSON object written as text")),
    }
}

/// The text of a content, a string or parts; `None` where there is none.
///
/// # Errors
/// A part is not text.
pub fn content(value: Option<Json>, path: &str) -> Parsed<Option<String>> {
    match value {
        None => Ok(None),
        Some(Json::String(text)) => Ok(Some(text)),
        Some(Json::Array(parts)) => {
            let parts = parts.into_iter().enumerate();
            let texts: Parsed<Vec<String>> =
                parts.map(|(i, part)| text_part(part, &format!("{path}[{i}]"))).collect();
            Ok(Some(texts?.concat()))
        }
        Some(other) => Err(expected(path, &other, "a string or a list of parts")),
    }
}

fn text_part(part: Json, path: &str) -> Parsed<String> {
    let mut fields = Fields::of(part, path)?;
    let kind = fields.needed_text("type")?;
    fields.accept(&["cache_control", "annotations", "logprobs"]);
    let text = match kind.as_str() {
        "text" | "input_text" | "output_text" => fields.needed_text("text")?,
        "refusal" => fields.needed_text("refusal")?,
        other => return Err(Refusal::field(path, format!("{other:?}: {TEXT_ALONE}"))),
    };
    fields.finish()?;
    Ok(text)
}

/// Puts the results that follow an assistant's calls into the order of the calls.
///
/// # Errors
/// A result answers no call of the message before it.
pub fn order_results(messages: &mut [Json], path: &str) -> Parsed<()> {
    let mut at = 0;
    while at < messages.len() {
        let calls = messages[at]["tool_calls"].as_array().into_iter().flatten();
        let ids: Vec<Json> = calls.map(|call| call["id"].clone()).collect();
        let first = if messages[at]["role"] == "tool" { at } else { at + 1 };
        let results = messages[first..].iter().take_while(|m| m["role"] == "tool").count();
        let place = |message: &Json| ids.iter().position(|id| *id == message["tool_call_id"]);
        let results = &mut messages[first..][..results];
        if let Some(lost) = results.iter().find(|message| place(message).is_none()) {
            let why = "answers no call of the message before it";
            return Err(Refusal::field(
                path,
                format!("the result of {} {why}", lost["tool_call_id"]),
            ));
        }
        results.sort_by_key(|message| place(message));
        at = first + results.len();
    }
    Ok(())
}

/// The tools of a request.
///
/// # Errors
/// Names the tool and the field that is wrong.
pub fn tools(list: Vec<Json>, path: &str) -> Parsed<Vec<OfferedTool>> {
    let tool = |(at, item): (usize, Json)| {
        let mut fields = Fields::of(item, &format!("{path}[{at}]"))?;
        fields.only("type", &[json!("function")])?;
        let mut function =
            fields.object("function")?.ok_or_else(|| fields.refusal("function", "is required"))?;
        fields.finish()?;
        let tool = function_tool(&mut function)?;
        function.finish()?;
        Ok(tool)
    };
    list.into_iter().enumerate().map(tool).collect()
}

/// A tool whose name, description and schema stand in `fields`.
///
/// # Errors
/// Names the field that is wrong.
pub fn function_tool(fields: &mut Fields) -> Parsed<OfferedTool> {
    let name = fields.needed_text("name")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        return Err(
            fields.refusal("name", "has characters other than letters, digits and _ - . : /")
        );
    }
    let parameters = fields.take("parameters");
    if let Some(other) = parameters.as_ref().filter(|schema| !schema.is_object()) {
        return Err(expected(&fields.path("parameters"), other, "a JSON schema"));
    }
    Ok(OfferedTool {
        name,
        description: fields.text("description")?,
        parameters: parameters.unwrap_or_else(|| json!({ "type": "object", "properties": {} })),
        strict: fields.flag("strict")?.unwrap_or(false),
    })
}

/// The `tool_choice` of a request.
///
/// # Errors
/// It is none that is known.
pub fn choice(value: Option<Json>) -> Parsed<Choice> {
    let unknown = |value: &Json| {
        let why =
            format!("{value} is none of \"auto\", \"none\", \"required\" and a function's name");
        Refusal::field("tool_choice", why)
    };
    match value {
        None => Ok(Choice::Auto),
        Some(Json::String(word)) => match word.as_str() {
            "auto" => Ok(Choice::Auto),
            "none" => Ok(Choice::Never),
            "required" | "any" => Ok(Choice::Any),
            _ => Err(unknown(&Json::String(word))),
        },
        Some(value) => {
            let name = value.pointer("/function/name").or_else(|| value.get("name"));
            match (value["type"].as_str(), name.and_then(Json::as_str)) {
                (Some("function"), Some(name)) => Ok(Choice::Named(name.to_string())),
                _ => Err(unknown(&value)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(list: Json) -> Parsed<Vec<Json>> {
        messages(list.as_array().unwrap().clone(), "messages")
    }

    #[test]
    fn messages_become_the_template_s() {
        let got = said(json!([
            { "role": "system", "content": "a" },
            { "role": "developer", "content": [{ "type": "text", "text": "b" }] },
            { "role": "user", "content": [{ "type": "text", "text": "c" }, { "type": "text", "text": "d" }] },
            { "role": "developer", "content": "e" },
            { "role": "assistant", "content": null, "reasoning_content": "r", "tool_calls": [
                { "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } },
                { "id": "2", "type": "function", "function": { "name": "g", "arguments": "" } } ] },
            { "role": "tool", "tool_call_id": "2", "content": "two" },
            { "role": "tool", "tool_call_id": "1", "content": "one" },
        ]));
        let expected = json!([
            { "role": "system", "content": "a\n\nb" },
            { "role": "user", "content": "cd" },
            { "role": "user", "content": "e" },
            { "role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [
                { "id": "1", "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } },
                { "id": "2", "type": "function", "function": { "name": "g", "arguments": {} } } ] },
            { "role": "tool", "content": "one", "tool_call_id": "1" },
            { "role": "tool", "content": "two", "tool_call_id": "2" },
        ]);
        assert_eq!(Json::Array(got.unwrap()), expected);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (list, expected) in [
            (json!([]), "messages: has no messages"),
            (json!([{ "role": "clown", "content": "" }]), "messages[0].role: \"clown\""),
            (json!([{ "role": "user" }]), "messages[0].content: is required"),
            (json!([{ "role": "user", "content": "a", "mood": 1 }]), "messages[0].mood: is not a"),
            (
                json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }]),
                "messages[0].content[0]: \"image_url\": this server reads text alone",
            ),
            (
                json!([{ "role": "tool", "tool_call_id": "1", "content": "x" }]),
                "messages: the result of \"1\" answers no call",
            ),
            (
                json!([{ "role": "assistant", "tool_calls": [
                    { "id": "1", "function": { "name": "f", "arguments": "{" } }] }]),
                "messages[0].tool_calls[0].function.arguments: is not a JSON object",
            ),
        ] {
            let message = said(list).unwrap_err().message;
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[test]
    fn choices_are_words_or_a_function() {
        let of = |value: Json| choice(Some(value));
        assert_eq!(of(json!("required")), Ok(Choice::Any));
        assert_eq!(of(json!("none")), Ok(Choice::Never));
        let named = json!({ "type": "function", "function": { "name": "f" } });
        assert_eq!(of(named), Ok(Choice::Named("f".into())));
        assert_eq!(of(json!({ "type": "function", "name": "f" })), Ok(Choice::Named("f".into())));
        assert!(of(json!("sometimes")).is_err() && of(json!({ "type": "web" })).is_err());
    }
}
