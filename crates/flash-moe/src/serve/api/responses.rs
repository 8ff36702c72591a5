//! OpenAI's responses: `POST /v1/responses`.
//!
//! Items become the template's messages: an assistant's reasoning, text and calls that follow each
//! other are one turn. One writer makes the items, whether they are streamed or sent whole.

use std::sync::Arc;

use flash_moe_engine::reply::Part;
use serde_json::{Value as Json, json};

use super::super::model::Model;
use super::super::schedule::{Event, Failure, Finish, Outcome, Usage};
use super::super::sse::{Translate, named};
use super::chat::created;
use super::chat_messages::{
    arguments_object, called, choice, content, function_tool, order_results,
};
use super::fields::Fields;
use super::message::new_id;
use super::refusal::{Parsed, Refusal};
use super::request::{Conversation, OfferedTool, Wishes, effort};
use super::response_store::{Kept, ResponseStore};

/// A request that has been read.
pub struct Request {
    /// What was said, the stored part included.
    pub conversation: Conversation,
    /// How to go on.
    pub wishes: Wishes,
    /// What the response says of the request.
    pub echo: Echo,
}

/// What a response says of its request.
#[derive(Clone, Debug)]
pub struct Echo {
    fields: Json,
    history: Vec<Json>, // without the instructions
    store: bool,
    spaces: Vec<Space>,
}

/// A tool that is one of a namespace's.
#[derive(Clone, Debug)]
struct Space {
    full: String, // as the model knows it
    space: String,
    name: String,
}

/// Reads a request.
///
/// # Errors
/// Names the field that is wrong, unknown or not supported; a previous response that is not kept.
pub fn read(body: Json, store: &ResponseStore) -> Parsed<Request> {
    let mut echo = echoed(&body);
    let mut fields = Fields::of(body, "")?;
    accept(&mut fields)?;
    let mut history = match fields.text("previous_response_id")? {
        Some(id) => store.find(&id, "previous_response_id")?.messages,
        None => Vec::new(),
    };
    input(&mut fields, &mut history)?;
    order_results(&mut history, "input")?;
    let instructions = fields.text("instructions")?;
    let system = instructions.map(|text| json!({ "role": "system", "content": text }));
    let messages = joined(system.into_iter().chain(history.iter().cloned()));
    let (tools, spaces) = tools(fields.list("tools")?.unwrap_or_else(Vec::new))?;
    let mut conversation = Conversation {
        messages,
        tools,
        choice: choice(fields.take("tool_choice"))?,
        one_call: fields.flag("parallel_tool_calls")? == Some(false),
        ..Conversation::default()
    };
    let mut wishes = Wishes {
        max_tokens: fields.count("max_output_tokens", 1)?,
        stream: fields.flag("stream")?.unwrap_or(false),
        session: fields.text("session_id")?,
        ..Wishes::default()
    };
    wishes.sampling.temperature = fields.number("temperature")?;
    wishes.sampling.top_p = fields.number("top_p")?;
    wishes.sampling.top_k = fields.count("top_k", 0)?;
    wishes.sampling.min_p = fields.number("min_p")?;
    if let Some(mut reasoning) = fields.object("reasoning")? {
        reasoning.accept(&["summary", "generate_summary"]);
        if let Some(word) = reasoning.text("effort")? {
            let (thinks, budget) = effort("reasoning.effort", &word)?;
            (conversation.thinking, wishes.think_budget) = (Some(thinks), budget);
        }
        reasoning.finish()?;
    }
    conversation.thinking = fields.flag("enable_thinking")?.or(conversation.thinking);
    if let Some(mut text) = fields.object("text")? {
        text.only("verbosity", &[json!("medium")])?;
        conversation.schema = format(&mut text)?;
        text.finish()?;
    }
    let kept = fields.flag("store")?.unwrap_or(true);
    fields.finish()?;
    echo["store"] = json!(kept);
    Ok(Request { conversation, wishes, echo: Echo { fields: echo, history, store: kept, spaces } })
}

/// Fields that change nothing, and those that would.
fn accept(fields: &mut Fields) -> Parsed<()> {
    fields.accept(&[
        "model",
        "user",
        "metadata",
        "client_metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
    ]);
    fields.only("truncation", &[json!("disabled")])?;
    fields.only("background", &[json!(false)])?;
    fields.only("service_tier", &[json!("auto"), json!("default")])?;
    fields.only("top_logprobs", &[json!(0)])?;
    fields.refuse("max_tool_calls", "this server runs no tools of its own")?;
    fields.refuse("conversation", "use previous_response_id")?;
    fields.refuse("prompt", "there are no stored prompts; use instructions")?;
    if let Some(mut options) = fields.object("stream_options")? {
        options.only("include_obfuscation", &[json!(false)])?;
        options.finish()?;
    }
    // Thinking is sent as it is, never encrypted, so there is nothing to add for this one.
    let encrypted = "reasoning.encrypted_content";
    match fields.texts("include")?.iter().find(|name| *name != encrypted) {
        Some(name) => {
            Err(fields.refusal("include", format!("{name:?} is not supported, only {encrypted:?}")))
        }
        None => Ok(()),
    }
}

fn echoed(body: &Json) -> Json {
    let mut echo = json!({
        "instructions": null, "max_output_tokens": null, "metadata": {},
        "parallel_tool_calls": true, "previous_response_id": null,
        "reasoning": { "effort": null, "summary": null }, "temperature": null,
        "text": { "format": { "type": "text" } }, "tool_choice": "auto", "tools": [],
        "top_p": null, "truncation": "disabled", "user": null,
    });
    if let Some(fields) = echo.as_object_mut() {
        for (name, value) in fields.iter_mut() {
            let given = body.get(name).filter(|given| !given.is_null());
            given.into_iter().for_each(|given| *value = given.clone());
        }
    }
    echo
}

/// The system messages at the beginning become one.
fn joined(messages: impl Iterator<Item = Json>) -> Vec<Json> {
    let mut all: Vec<Json> = Vec::new();
    for message in messages {
        match all.last_mut() {
            Some(last) if all_system(last, &message) => {
                let text = |message: &Json| message["content"].as_str().unwrap_or("").to_string();
                last["content"] = json!(format!("{}\n\n{}", text(last), text(&message)));
            }
            _ => all.push(message),
        }
    }
    all
}

fn all_system(one: &Json, other: &Json) -> bool {
    one["role"] == "system" && other["role"] == "system"
}

fn input(fields: &mut Fields, history: &mut Vec<Json>) -> Parsed<()> {
    match fields.take("input") {
        Some(Json::String(text)) => history.push(json!({ "role": "user", "content": text })),
        Some(Json::Array(items)) => {
            for (at, value) in items.into_iter().enumerate() {
                item(Fields::of(value, &format!("input[{at}]"))?, history)?;
            }
        }
        _ => return Err(fields.refusal("input", "is required, a string or a list of items")),
    }
    Ok(())
}

fn item(mut item: Fields, history: &mut Vec<Json>) -> Parsed<()> {
    let kind = item.text("type")?.unwrap_or_else(|| "message".into());
    item.accept(&["id", "status", "phase"]);
    match kind.as_str() {
        "message" => said(&mut item, history)?,
        "function_call" => {
            let (id, name) = (item.needed_text("call_id")?, item.needed_text("name")?);
            let name = full_name(item.text("namespace")?.as_deref(), &name);
            let arguments = item.text("arguments")?.unwrap_or_else(String::new);
            let arguments = arguments_object(&arguments, &item.path("arguments"))?;
            let turn = assistant(history);
            let calls = turn["tool_calls"].as_array().cloned().unwrap_or_else(Vec::new);
            let call = called(&id, &name, &arguments);
            turn["tool_calls"] = calls.into_iter().chain([call]).collect();
        }
        "function_call_output" => {
            let id = item.needed_text("call_id")?;
            let output = content(item.take("output"), &item.path("output"))?;
            let output = output.ok_or_else(|| item.refusal("output", "is required"))?;
            history.push(json!({ "role": "tool", "tool_call_id": id, "content": output }));
        }
        "reasoning" => {
            let text = reasoning_text(&mut item)?;
            if !text.is_empty() {
                assistant(history)["reasoning_content"] = json!(text);
            }
        }
        other => {
            let known = "message, function_call, function_call_output, reasoning";
            return Err(item.refusal("type", format!("{other:?} is none of {known}")));
        }
    }
    item.finish()
}

fn said(item: &mut Fields, history: &mut Vec<Json>) -> Parsed<()> {
    let role = item.needed_text("role")?;
    let path = item.path("content");
    let text = content(item.take("content"), &path)?;
    let text = text.ok_or_else(|| item.refusal("content", "is required"))?;
    match role.as_str() {
        "assistant" => {
            let turn = assistant(history);
            let before = turn["content"].as_str().unwrap_or("").to_string();
            turn["content"] = json!(before + &text);
        }
        "system" | "developer" => {
            let leading = history.iter().all(|message| message["role"] == "system");
            let role = if leading || role == "system" { "system" } else { "user" };
            history.push(json!({ "role": role, "content": text }));
        }
        "user" => history.push(json!({ "role": "user", "content": text })),
        other => {
            let known = "system, developer, user, assistant";
            return Err(item.refusal("role", format!("{other:?} is none of {known}")));
        }
    }
    Ok(())
}

/// The assistant's turn at the end of the history, which is begun where there is none.
fn assistant(history: &mut Vec<Json>) -> &mut Json {
    if history.last().is_none_or(|last| last["role"] != "assistant") {
        history.push(json!({ "role": "assistant", "content": "" }));
    }
    history.last_mut().expect("pushed where it was empty")
}

/// The text of a reasoning item; one that is encrypted by somebody else has none for us.
fn reasoning_text(item: &mut Fields) -> Parsed<String> {
    item.accept(&["encrypted_content"]);
    let mut texts = Vec::new();
    for name in ["content", "summary"] {
        for (at, part) in item.list(name)?.into_iter().flatten().enumerate() {
            let mut part = Fields::of(part, &item.path(&format!("{name}[{at}]")))?;
            part.accept(&["type"]);
            texts.push(part.needed_text("text")?);
            part.finish()?;
        }
    }
    Ok(texts.join("\n"))
}

/// The tools, and which of them are a namespace's.
fn tools(list: Vec<Json>) -> Parsed<(Vec<OfferedTool>, Vec<Space>)> {
    let (mut offered, mut spaces) = (Vec::new(), Vec::new());
    for (at, item) in list.into_iter().enumerate() {
        let mut fields = Fields::of(item, &format!("tools[{at}]"))?;
        match fields.needed_text("type")?.as_str() {
            "function" => offered.push(function_tool(&mut fields)?),
            "namespace" => namespace(&mut fields, &mut offered, &mut spaces)?,
            // A search that may reach nothing outside has nothing to find here.
            "web_search" if fields.peek("external_web_access") == Some(&json!(false)) => continue,
            kind => {
                let why = format!(
                    "{kind:?} is not supported, only functions; switch it off in the client"
                );
                return Err(fields.refusal("type", why));
            }
        }
        fields.finish()?;
    }
    Ok((offered, spaces))
}

/// The functions of a namespace, each called `NAMESPACE.NAME`; the first one tells what it is for.
fn namespace(
    fields: &mut Fields,
    offered: &mut Vec<OfferedTool>,
    spaces: &mut Vec<Space>,
) -> Parsed<()> {
    let space = fields.needed_text("name")?;
    let mut about = fields.text("description")?;
    for (at, item) in fields.list("tools")?.into_iter().flatten().enumerate() {
        let mut fields = Fields::of(item, &fields.path(&format!("tools[{at}]")))?;
        fields.only("type", &[json!("function")])?;
        let own = fields.needed_text("name")?;
        let full = full_name(Some(&space), &own);
        fields.put("name", json!(full));
        let mut tool = function_tool(&mut fields)?;
        fields.finish()?;
        let texts: Vec<String> = about.take().into_iter().chain(tool.description).collect();
        tool.description = (!texts.is_empty()).then(|| texts.join("\n\n"));
        offered.push(tool);
        spaces.push(Space { full, space: space.clone(), name: own });
    }
    Ok(())
}

/// The name by which the model knows a function.
fn full_name(space: Option<&str>, name: &str) -> String {
    space.map_or_else(|| name.to_string(), |space| format!("{space}.{name}"))
}

fn format(text: &mut Fields) -> Parsed<Option<Json>> {
    let Some(mut format) = text.object("format")? else { return Ok(None) };
    let kind = format.needed_text("type")?;
    format.accept(&["name", "description", "strict"]);
    let schema = match kind.as_str() {
        "text" => None,
        "json_object" => Some(json!({ "type": "object" })),
        "json_schema" => {
            let schema = format.take("schema");
            Some(schema.ok_or_else(|| format.refusal("schema", "is required"))?)
        }
        other => {
            let known = "text, json_object, json_schema";
            return Err(format.refusal("type", format!("{other:?} is none of {known}")));
        }
    };
    format.finish()?;
    Ok(schema)
}

/// Makes the items of a response, and the events that tell of them.
pub struct Writer {
    model: Arc<Model>,
    store: Arc<ResponseStore>,
    echo: Echo,
    id: String,
    created: u64,
    sequence: usize,
    written: usize, // items that are over, those that broke off included
    output: Vec<Json>,
    open: Option<Open>,
    end: Option<Json>,
}

/// An item that is being written.
struct Open {
    item: Json,
    text: String,
}

impl Writer {
    /// An empty response.
    pub fn new(model: Arc<Model>, store: Arc<ResponseStore>, echo: Echo) -> Self {
        Self {
            model,
            store,
            echo,
            id: new_id("resp_"),
            created: created(),
            sequence: 0,
            written: 0,
            output: Vec::new(),
            open: None,
            end: None,
        }
    }

    /// The response once it is over.
    pub fn response(self) -> Option<Json> {
        self.end
    }

    fn body(&self, status: &str, usage: Option<Usage>) -> Json {
        let mut body = json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "background": false, "error": null, "incomplete_details": null,
            "model": self.model.name, "output": self.output,
        });
        for (name, value) in self.echo.fields.as_object().into_iter().flatten() {
            body[name] = value.clone();
        }
        body["usage"] = usage.map_or(Json::Null, |usage| {
            json!({
                "input_tokens": usage.prompt,
                "input_tokens_details": { "cached_tokens": usage.cached },
                "output_tokens": usage.generated,
                "output_tokens_details": { "reasoning_tokens": usage.thinking },
                "total_tokens": usage.prompt + usage.generated,
            })
        });
        body
    }

    fn event(&mut self, name: &str, mut value: Json) -> String {
        value["type"] = json!(name);
        value["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        named(name, &value)
    }

    /// An event about the open item.
    fn about(&mut self, name: &str, mut value: Json) -> String {
        let id = self.open.as_ref().map_or(Json::Null, |open| open.item["id"].clone());
        value["item_id"] = id;
        value["output_index"] = json!(self.written);
        self.event(name, value)
    }

    fn kind(&self) -> &str {
        self.open.as_ref().and_then(|open| open.item["type"].as_str()).unwrap_or("")
    }

    fn begin(&mut self, item: Json) -> String {
        let mut text = self.close("completed");
        let added = json!({ "output_index": self.written, "item": item });
        text += &self.event("response.output_item.added", added);
        let is_message = item["type"] == "message";
        self.open = Some(Open { item, text: String::new() });
        if is_message {
            let part = json!({ "content_index": 0, "part": output_text("") });
            text += &self.about("response.content_part.added", part);
        }
        text
    }

    fn close(&mut self, status: &str) -> String {
        let Some(Open { mut item, text }) = self.open.take() else { return String::new() };
        let kind = item["type"].as_str().unwrap_or("").to_string();
        let mut told = Vec::new();
        match kind.as_str() {
            "message" => {
                item["content"] = json!([output_text(&text)]);
                let done = json!({ "content_index": 0, "text": text, "logprobs": [] });
                told.push(("response.output_text.done", done));
                let part = json!({ "content_index": 0, "part": output_text(&text) });
                told.push(("response.content_part.done", part));
            }
            "reasoning" => {
                item["content"] = json!([{ "type": "reasoning_text", "text": text }]);
                let done = json!({ "content_index": 0, "text": text });
                told.push(("response.reasoning_text.done", done));
            }
            _ => {
                item["arguments"] = json!(text);
                let done = json!({ "arguments": text, "name": item["name"] });
                told.push(("response.function_call_arguments.done", done));
            }
        }
        item["status"] = json!(status);
        self.open = Some(Open { item: item.clone(), text });
        let mut out: String =
            told.into_iter().map(|(name, value)| self.about(name, value)).collect();
        self.open = None;
        let done = json!({ "output_index": self.written, "item": item });
        out += &self.event("response.output_item.done", done);
        self.output.push(item);
        self.written += 1;
        out
    }

    fn piece(&mut self, kind: &str, item: impl FnOnce() -> Json, piece: &str) -> String {
        let begun = if self.kind() == kind { String::new() } else { self.begin(item()) };
        self.open.iter_mut().for_each(|open| open.text.push_str(piece));
        let (name, value) = match kind {
            "message" => (
                "response.output_text.delta",
                json!({ "content_index": 0, "delta": piece, "logprobs": [] }),
            ),
            "reasoning" => {
                ("response.reasoning_text.delta", json!({ "content_index": 0, "delta": piece }))
            }
            _ => ("response.function_call_arguments.delta", json!({ "delta": piece })),
        };
        begun + &self.about(name, value)
    }

    fn part(&mut self, part: Part) -> String {
        let message = || {
            json!({ "id": new_id("msg_"), "type": "message", "status": "in_progress",
                    "role": "assistant", "content": [] })
        };
        match part {
            Part::Thinking(text) => {
                let item = || {
                    json!({ "id": new_id("rs_"), "type": "reasoning", "summary": [],
                            "content": [], "encrypted_content": null, "status": "in_progress" })
                };
                self.piece("reasoning", item, &text)
            }
            Part::Content(text) => self.piece("message", message, &text),
            Part::CallBegins(name) => {
                let mut item = json!({
                    "id": new_id("fc_"), "type": "function_call", "status": "in_progress",
                    "arguments": "", "call_id": new_id("call_"), "name": name,
                });
                if let Some(space) = self.echo.spaces.iter().find(|space| space.full == name) {
                    item["name"] = json!(space.name);
                    item["namespace"] = json!(space.space);
                }
                self.begin(item)
            }
            Part::Arguments(text) => self.piece("function_call", || json!({}), &text),
            Part::CallEnds => self.close("completed"),
            Part::Broken(text) => {
                let closed = self.close("incomplete");
                self.output.pop();
                closed + &self.piece("message", message, &text)
            }
        }
    }

    fn done(&mut self, outcome: &Outcome) -> String {
        let cut = outcome.finish == Finish::Length;
        let (status, name) = match cut {
            true => ("incomplete", "response.incomplete"),
            false => ("completed", "response.completed"),
        };
        let closed = self.close(status);
        let mut body = self.body(status, Some(outcome.usage));
        if cut {
            body["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        if self.echo.store {
            let mut messages = self.echo.history.clone();
            for item in &self.output {
                remember(item, &mut messages);
            }
            self.store.keep(&self.id, Kept { messages, response: body.clone() });
        }
        self.end = Some(body.clone());
        closed + &self.event(name, json!({ "response": body }))
    }

    fn failed(&mut self, failure: Failure) -> String {
        let refusal = Refusal::from(failure);
        let mut body = self.body("failed", None);
        body["error"] = json!({ "code": "server_error", "message": refusal.message });
        self.event("response.failed", json!({ "response": body }))
    }
}

/// Adds one of our own items to the history.
fn remember(item: &Json, history: &mut Vec<Json>) {
    let turn = assistant(history);
    let text = item["content"][0]["text"].as_str().unwrap_or("");
    match item["type"].as_str() {
        Some("reasoning") => turn["reasoning_content"] = json!(text),
        Some("message") => {
            let before = turn["content"].as_str().unwrap_or("").to_string();
            turn["content"] = json!(before + text);
        }
        _ => {
            let arguments = item["arguments"].as_str().unwrap_or("{}");
            let arguments = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
            let part = |name: &str| item[name].as_str().unwrap_or("").to_string();
            let calls = turn["tool_calls"].as_array().cloned().unwrap_or_else(Vec::new);
            let name = full_name(item["namespace"].as_str(), &part("name"));
            let call = called(&part("call_id"), &name, &arguments);
            turn["tool_calls"] = calls.into_iter().chain([call]).collect();
        }
    }
}

fn output_text(text: &str) -> Json {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

impl Translate for Writer {
    fn event(&mut self, _: usize, event: Event) -> String {
        match event {
            Event::Started(_) => {
                let body = json!({ "response": self.body("in_progress", None) });
                let begun = Writer::event(self, "response.created", body.clone());
                begun + &Writer::event(self, "response.in_progress", body)
            }
            Event::Prefilled(_) => String::new(),
            Event::Token { parts, .. } => parts.into_iter().map(|part| self.part(part)).collect(),
            Event::Done(outcome) => self.done(&outcome),
            Event::Failed(failure) => self.failed(failure),
        }
    }

    fn end(&mut self) -> String {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_become_turns() {
        let store = ResponseStore::default();
        let body = json!({
            "instructions": "a",
            "input": [
                { "role": "developer", "content": "b" },
                { "role": "user", "content": [{ "type": "input_text", "text": "c" }] },
                { "type": "reasoning", "id": "r", "summary": [{ "type": "summary_text", "text": "t" }] },
                { "type": "message", "role": "assistant", "content": [{ "type": "output_text", "text": "d" }] },
                { "type": "function_call", "call_id": "1", "name": "f", "arguments": "{}" },
                { "type": "function_call", "call_id": "2", "name": "g", "arguments": "{\"x\":1}" },
                { "type": "function_call_output", "call_id": "2", "output": "two" },
                { "type": "function_call_output", "call_id": "1", "output": "one" },
            ],
        });
        let expected = json!([
            { "role": "system", "content": "a\n\nb" },
            { "role": "user", "content": "c" },
            { "role": "assistant", "content": "d", "reasoning_content": "t", "tool_calls": [
                { "id": "1", "type": "function", "function": { "name": "f", "arguments": {} } },
                { "id": "2", "type": "function", "function": { "name": "g", "arguments": { "x": 1 } } } ] },
            { "role": "tool", "tool_call_id": "1", "content": "one" },
            { "role": "tool", "tool_call_id": "2", "content": "two" },
        ]);
        let read = read(body, &store).unwrap();
        assert_eq!(Json::Array(read.conversation.messages), expected);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let store = ResponseStore::default();
        for (extra, expected) in [
            (json!({ "truncation": "auto" }), "truncation: \"auto\" is not supported"),
            (json!({ "tools": [{ "type": "web_search" }] }), "tools[0].type: \"web_search\""),
            (
                json!({ "tools": [{ "type": "web_search", "external_web_access": true }] }),
                "tools[0].type: \"web_search\"",
            ),
            (
                json!({ "tools": [{ "type": "namespace", "name": "s", "tools": [{ "type": "custom" }] }] }),
                "tools[0].tools[0].type: \"custom\"",
            ),
            (json!({ "previous_response_id": "x" }), "previous_response_id: there is no response"),
            (json!({ "include": ["file_search_call.results"] }), "include: \"file_search_call"),
            (json!({ "frobnicate": 1 }), "frobnicate: is not a parameter"),
        ] {
            let mut body = json!({ "input": "c" });
            for (name, value) in extra.as_object().unwrap() {
                body[name] = value.clone();
            }
            let Err(refusal) = read(body, &store) else { panic!("accepted: {extra}") };
            assert!(refusal.message.starts_with(expected), "{}", refusal.message);
        }
    }
}
