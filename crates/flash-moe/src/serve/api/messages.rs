//! Anthropic's messages: `POST /v1/messages` and `/v1/messages/count_tokens`.
//!
//! Thinking becomes thinking blocks, calls become `tool_use` blocks whose input streams as partial
//! JSON. Marks for the client's own cache are accepted: they ask for nothing that could differ.

use std::sync::Arc;

use flash_moe_engine::reply::Part;
use serde_json::{Value as Json, json};

use super::super::model::Model;
use super::super::schedule::{Event, Finish, Outcome, Usage};
use super::super::sse::{Translate, named};
use super::chat_messages::{TEXT_ALONE, called, function_tool, order_results};
use super::fields::{Fields, expected};
use super::message::{Message, new_id};
use super::refusal::{Dialect, Parsed, Refusal};
use super::request::{Choice, Conversation, OfferedTool, Wishes, effort};

/// What stands for the signature of thinking, which this server does not sign.
const UNSIGNED: &str = "unsigned";

/// How Claude Code's attribution of a request begins.
const ATTRIBUTION: &str = "x-anthropic-billing-header:";

/// A request that has been read.
pub struct Request {
    /// What was said.
    pub conversation: Conversation,
    /// How to go on.
    pub wishes: Wishes,
}

/// Reads a request; `counts` reads one that only asks for its number of tokens.
///
/// # Errors
/// Names the field that is wrong, unknown or not supported.
pub fn read(body: Json, counts: bool) -> Parsed<Request> {
    let mut fields = Fields::of(body, "")?;
    fields.accept(&["model", "metadata", "cache_control", "user_profile_id", "workspace_id"]);
    fields.only("speed", &[json!("standard")])?;
    fields.only("service_tier", &[json!("auto"), json!("standard_only")])?;
    fields.refuse("container", "there are no containers")?;
    fields.refuse("mcp_servers", "connect them in the client")?;
    context_management(&mut fields)?;
    let mut conversation =
        Conversation { messages: messages(&mut fields)?, ..Conversation::default() };
    conversation.tools = tools(fields.list("tools")?.unwrap_or_else(Vec::new))?;
    choice(&mut fields, &mut conversation)?;
    let mut wishes = Wishes {
        stops: fields.texts("stop_sequences")?,
        stream: fields.flag("stream")?.unwrap_or(false),
        session: fields.text("session_id")?,
        max_tokens: fields.count("max_tokens", 1)?,
        ..Wishes::default()
    };
    if wishes.max_tokens.is_none() && !counts {
        return Err(fields.refusal("max_tokens", "is required"));
    }
    wishes.sampling.temperature = fields.number("temperature")?;
    wishes.sampling.top_p = fields.number("top_p")?;
    wishes.sampling.top_k = fields.count("top_k", 0)?;
    output_config(&mut fields, &mut conversation, &mut wishes)?;
    thinking(&mut fields, &mut conversation, &mut wishes)?;
    fields.finish()?;
    Ok(Request { conversation, wishes })
}

/// Only the edit that keeps everything is one that this server makes.
fn context_management(fields: &mut Fields) -> Parsed<()> {
    let Some(mut management) = fields.object("context_management")? else { return Ok(()) };
    let keeps = json!([{ "type": "clear_thinking_20251015", "keep": "all" }]);
    management.only("edits", &[json!([]), keeps])?;
    management.finish()
}

fn output_config(
    fields: &mut Fields,
    conversation: &mut Conversation,
    wishes: &mut Wishes,
) -> Parsed<()> {
    let legacy = fields.object("output_format")?;
    let Some(mut config) = fields.object("output_config")? else {
        conversation.schema = legacy.map(output_format).transpose()?;
        return Ok(());
    };
    if let Some(word) = config.text("effort")? {
        (_, wishes.think_budget) = effort(&config.path("effort"), &word)?;
    }
    let format = config.object("format")?.or(legacy);
    conversation.schema = format.map(output_format).transpose()?;
    config.finish()
}

fn output_format(mut format: Fields) -> Parsed<Json> {
    format.only("type", &[json!("json_schema")])?;
    let schema = format.take("schema").ok_or_else(|| format.refusal("schema", "is required"))?;
    format.finish()?;
    Ok(schema)
}

/// Where nothing is said, Anthropic's models do not think.
fn thinking(
    fields: &mut Fields,
    conversation: &mut Conversation,
    wishes: &mut Wishes,
) -> Parsed<()> {
    let Some(mut thinking) = fields.object("thinking")? else {
        conversation.thinking = Some(false);
        return Ok(());
    };
    let kind = thinking.needed_text("type")?;
    thinking.accept(&["display"]);
    let budget = thinking.count("budget_tokens", 1)?;
    conversation.thinking = Some(match kind.as_str() {
        "disabled" => false,
        "enabled" | "adaptive" => true,
        other => {
            let why = format!("{other:?} is none of enabled, disabled, adaptive");
            return Err(thinking.refusal("type", why));
        }
    });
    wishes.think_budget = budget.or(wishes.think_budget);
    thinking.finish()
}

/// The system prompt and the messages in the template's terms.
fn messages(fields: &mut Fields) -> Parsed<Vec<Json>> {
    let mut all = Vec::new();
    if let Some(system) = fields.take("system") {
        let text = texts(without_attribution(system), &fields.path("system"))?;
        all.push(json!({ "role": "system", "content": text }));
    }
    let list = fields.list("messages")?;
    let list = list.ok_or_else(|| fields.refusal("messages", "is required"))?;
    if list.is_empty() {
        return Err(fields.refusal("messages", "has no messages"));
    }
    for (at, item) in list.into_iter().enumerate() {
        let mut message = Fields::of(item, &format!("messages[{at}]"))?;
        let role = message.needed_text("role")?;
        let content = message.take("content");
        let content = content.ok_or_else(|| message.refusal("content", "is required"))?;
        let path = message.path("content");
        match role.as_str() {
            "user" => user(content, &path, &mut all)?,
            "assistant" => all.push(assistant(content, &path)?),
            "system" => {
                let text = texts(content, &path)?;
                all.push(json!({ "role": if all.is_empty() { "system" } else { "user" }, "content": text }));
            }
            other => {
                let why = format!("{other:?} is none of user, assistant");
                return Err(message.refusal("role", why));
            }
        }
        message.finish()?;
    }
    order_results(&mut all, "messages")?;
    Ok(all)
}

/// The system prompt without the block in which Claude Code attributes its requests: it is meant for
/// accounts, not for the model, and differs from session to session where the rest does not.
fn without_attribution(mut system: Json) -> Json {
    if let Some(blocks) = system.as_array_mut().filter(|blocks| blocks.len() > 1) {
        let text = blocks[0]["text"].as_str();
        if text.is_some_and(|text| text.starts_with(ATTRIBUTION)) {
            blocks.remove(0);
        }
    }
    system
}

/// A string, or blocks of text, put together as they stand.
fn texts(value: Json, path: &str) -> Parsed<String> {
    let blocks = blocks(value, path)?;
    let texts: Parsed<Vec<String>> = blocks.into_iter().map(text_block).collect();
    Ok(texts?.concat())
}

/// The blocks of a content, a string being one.
fn blocks(value: Json, path: &str) -> Parsed<Vec<Fields>> {
    match value {
        Json::String(text) => Ok(vec![Fields::of(json!({ "type": "text", "text": text }), path)?]),
        Json::Array(list) => {
            let block = |(at, block): (usize, Json)| Fields::of(block, &format!("{path}[{at}]"));
            list.into_iter().enumerate().map(block).collect()
        }
        other => Err(expected(path, &other, "a string or a list of blocks")),
    }
}

fn text_block(mut block: Fields) -> Parsed<String> {
    let kind = block.needed_text("type")?;
    if kind != "text" {
        return Err(block.refusal("type", format!("{kind:?}: {TEXT_ALONE}")));
    }
    block.accept(&["cache_control", "citations"]);
    let text = block.needed_text("text")?;
    block.finish()?;
    Ok(text)
}

/// A user's turn: results of tools stand before what is said.
fn user(content: Json, path: &str, all: &mut Vec<Json>) -> Parsed<()> {
    let mut said = Vec::new();
    for mut block in blocks(content, path)? {
        if block_type(&block) != Some("tool_result") {
            said.push(text_block(block)?);
            continue;
        }
        block.accept(&["type", "cache_control"]);
        let id = block.needed_text("tool_use_id")?;
        let failed = block.flag("is_error")?.unwrap_or(false);
        let path = block.path("content");
        let result = block.take("content").map(|content| texts(content, &path));
        let result = result.transpose()?.unwrap_or_else(String::new);
        block.finish()?;
        let result = if failed { format!("Error: {result}") } else { result };
        all.push(json!({ "role": "tool", "tool_call_id": id, "content": result }));
    }
    if !said.is_empty() {
        all.push(json!({ "role": "user", "content": said.concat() }));
    }
    Ok(())
}

fn block_type(block: &Fields) -> Option<&str> {
    block.peek("type").and_then(Json::as_str)
}

fn assistant(content: Json, path: &str) -> Parsed<Json> {
    let (mut said, mut thought, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for mut block in blocks(content, path)? {
        match block_type(&block) {
            Some("thinking") => {
                block.accept(&["type", "signature", "cache_control"]);
                thought.push(block.needed_text("thinking")?);
                block.finish()?;
            }
            Some("tool_use") => {
                block.accept(&["type", "cache_control", "caller"]);
                let (id, name) = (block.needed_text("id")?, block.needed_text("name")?);
                let input = block.take("input").unwrap_or_else(|| json!({}));
                if !input.is_object() {
                    return Err(expected(&block.path("input"), &input, "an object"));
                }
                block.finish()?;
                calls.push(called(&id, &name, &input));
            }
            _ => said.push(text_block(block)?),
        }
    }
    let mut message = json!({ "role": "assistant", "content": said.concat() });
    if !thought.is_empty() {
        message["reasoning_content"] = json!(thought.join("\n"));
    }
    if !calls.is_empty() {
        message["tool_calls"] = Json::Array(calls);
    }
    Ok(message)
}

fn tools(list: Vec<Json>) -> Parsed<Vec<OfferedTool>> {
    let tool = |(at, item): (usize, Json)| {
        let mut fields = Fields::of(item, &format!("tools[{at}]"))?;
        if let Some(kind) = fields.text("type")?.filter(|kind| kind != "custom") {
            let why =
                format!("{kind:?} runs on Anthropic's servers; this one has custom tools alone");
            return Err(fields.refusal("type", why));
        }
        fields.accept(&[
            "cache_control",
            "eager_input_streaming",
            "input_examples",
            "allowed_callers",
        ]);
        fields.only("defer_loading", &[json!(false)])?;
        fields.rename("input_schema", "parameters");
        let tool = function_tool(&mut fields)?;
        fields.finish()?;
        Ok(tool)
    };
    list.into_iter().enumerate().map(tool).collect()
}

fn choice(fields: &mut Fields, conversation: &mut Conversation) -> Parsed<()> {
    let Some(mut choice) = fields.object("tool_choice")? else { return Ok(()) };
    let kind = choice.needed_text("type")?;
    conversation.choice = match kind.as_str() {
        "auto" => Choice::Auto,
        "any" => Choice::Any,
        "none" => Choice::Never,
        "tool" => Choice::Named(choice.needed_text("name")?),
        other => {
            let why = format!("{other:?} is none of auto, any, tool, none");
            return Err(choice.refusal("type", why));
        }
    };
    conversation.one_call = choice.flag("disable_parallel_tool_use")?.unwrap_or(false);
    choice.finish()
}

/// The whole answer.
pub fn answer(model: &Model, message: &Message) -> Json {
    let mut content = Vec::new();
    if !message.said.thinking.is_empty() {
        let thought = &message.said.thinking;
        content.push(json!({ "type": "thinking", "thinking": thought, "signature": UNSIGNED }));
    }
    if !message.said.content.is_empty() {
        content.push(json!({ "type": "text", "text": message.said.content }));
    }
    for call in &message.said.calls {
        let input: Json = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
        content.push(json!({ "type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": input }));
    }
    let (reason, stop) = stop_reason(&message.outcome);
    json!({
        "id": new_id("msg_"), "type": "message", "role": "assistant", "model": model.name,
        "content": content, "stop_reason": reason, "stop_sequence": stop,
        "usage": usage_json(message.outcome.usage),
    })
}

/// Tokens as this interface counts them: those from the cache are not among `input_tokens`.
fn usage_json(usage: Usage) -> Json {
    json!({
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.generated,
    })
}

fn stop_reason(outcome: &Outcome) -> (&'static str, Option<&str>) {
    match (&outcome.finish, outcome.calls) {
        (Finish::Length, _) => ("max_tokens", None),
        (Finish::StopText(stop), _) => ("stop_sequence", Some(stop)),
        (_, 0) => ("end_turn", None),
        _ => ("tool_use", None),
    }
}

/// Writes the events of a streamed answer.
pub struct Events {
    model: Arc<Model>,
    request: String,
    blocks: usize,
    open: Option<Block>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    Tool,
}

impl Events {
    /// For the request of this id.
    pub fn new(model: Arc<Model>, request: String) -> Self {
        Self { model, request, blocks: 0, open: None }
    }

    fn start(&mut self, kind: Block, block: &Json) -> String {
        let closed = self.close();
        self.open = Some(kind);
        let begun =
            json!({ "type": "content_block_start", "index": self.blocks, "content_block": block });
        closed + &named("content_block_start", &begun)
    }

    fn close(&mut self) -> String {
        let Some(kind) = self.open.take() else { return String::new() };
        let signature = json!({ "type": "signature_delta", "signature": UNSIGNED });
        let mut text = String::new();
        if kind == Block::Thinking {
            text += &self.delta(&signature);
        }
        let index = self.blocks;
        self.blocks += 1;
        let stopped = json!({ "type": "content_block_stop", "index": index });
        text + &named("content_block_stop", &stopped)
    }

    fn delta(&self, delta: &Json) -> String {
        let delta = json!({ "type": "content_block_delta", "index": self.blocks, "delta": delta });
        named("content_block_delta", &delta)
    }

    /// A delta in a block of this kind, which is begun where it is not open.
    fn piece(&mut self, kind: Block, empty: &Json, delta: &Json) -> String {
        let begun = if self.open == Some(kind) { String::new() } else { self.start(kind, empty) };
        begun + &self.delta(delta)
    }

    fn part(&mut self, part: Part) -> String {
        match part {
            Part::Thinking(text) => {
                let empty = json!({ "type": "thinking", "thinking": "", "signature": "" });
                let delta = json!({ "type": "thinking_delta", "thinking": text });
                self.piece(Block::Thinking, &empty, &delta)
            }
            Part::Content(text) | Part::Broken(text) => {
                let empty = json!({ "type": "text", "text": "" });
                self.piece(Block::Text, &empty, &json!({ "type": "text_delta", "text": text }))
            }
            Part::CallBegins(name) => {
                let id = new_id("toolu_");
                let block = json!({ "type": "tool_use", "id": id, "name": name, "input": {} });
                self.start(Block::Tool, &block)
            }
            Part::Arguments(text) => {
                self.delta(&json!({ "type": "input_json_delta", "partial_json": text }))
            }
            Part::CallEnds => self.close(),
        }
    }
}

impl Translate for Events {
    fn event(&mut self, _: usize, event: Event) -> String {
        match event {
            Event::Started(usage) => {
                let message = json!({
                    "id": new_id("msg_"), "type": "message", "role": "assistant",
                    "model": self.model.name, "content": [], "stop_reason": null,
                    "stop_sequence": null, "usage": usage_json(usage),
                });
                let begun = json!({ "type": "message_start", "message": message });
                named("message_start", &begun) + &named("ping", &json!({ "type": "ping" }))
            }
            Event::Prefilled(_) => String::new(),
            Event::Token { parts, .. } => parts.into_iter().map(|part| self.part(part)).collect(),
            Event::Done(outcome) => {
                let closed = self.close();
                let (reason, stop) = stop_reason(&outcome);
                let delta = json!({
                    "type": "message_delta",
                    "delta": { "stop_reason": reason, "stop_sequence": stop },
                    "usage": usage_json(outcome.usage),
                });
                let stopped = json!({ "type": "message_stop" });
                closed + &named("message_delta", &delta) + &named("message_stop", &stopped)
            }
            Event::Failed(failure) => {
                named("error", &Refusal::from(failure).body(Dialect::Anthropic, &self.request))
            }
        }
    }

    fn end(&mut self) -> String {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_messages(body: Json) -> Parsed<Vec<Json>> {
        let mut body = body;
        body["max_tokens"] = json!(9);
        Ok(read(body, false)?.conversation.messages)
    }

    #[test]
    fn blocks_become_the_template_s_messages() {
        let body = json!({
            "system": [{ "type": "text", "text": "a", "cache_control": { "type": "ephemeral" } },
                       { "type": "text", "text": "b" }],
            "messages": [
                { "role": "user", "content": "c" },
                { "role": "assistant", "content": [
                    { "type": "thinking", "thinking": "t", "signature": "s" },
                    { "type": "text", "text": "d" },
                    { "type": "tool_use", "id": "1", "name": "f", "input": { "x": 1 } } ] },
                { "role": "user", "content": [
                    { "type": "tool_result", "tool_use_id": "1", "content": [{ "type": "text", "text": "r" }] },
                    { "type": "text", "text": "e" } ] },
            ],
        });
        let expected = json!([
            { "role": "system", "content": "ab" },
            { "role": "user", "content": "c" },
            { "role": "assistant", "content": "d", "reasoning_content": "t", "tool_calls": [
                { "id": "1", "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } } ] },
            { "role": "tool", "tool_call_id": "1", "content": "r" },
            { "role": "user", "content": "e" },
        ]);
        assert_eq!(Json::Array(read_messages(body).unwrap()), expected);
    }

    #[test]
    fn an_attribution_is_no_part_of_the_system_prompt() {
        let said = |first: &str| {
            let block = |text: &str| json!({ "type": "text", "text": text });
            let body = json!({ "system": [block(first), block("a")],
                               "messages": [{ "role": "user", "content": "b" }] });
            read_messages(body).unwrap()[0]["content"].clone()
        };
        assert_eq!(said("x-anthropic-billing-header: cc_version=1.2.3;"), "a");
        assert_eq!(said("billing: "), "billing: a");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (extra, expected) in [
            (json!({ "container": "c" }), "container: is not supported"),
            (
                json!({ "tools": [{ "type": "web_search_20250305", "name": "w" }] }),
                "tools[0].type: \"web_s",
            ),
            (json!({ "thinking": { "type": "maybe" } }), "thinking.type: \"maybe\""),
            (json!({ "context_management": { "edits": [{}] } }), "context_management.edits:"),
            (json!({ "n": 2 }), "n: is not a parameter"),
            (
                json!({ "messages": [{ "role": "user", "content": [{ "type": "image" }] }] }),
                "messages[0].content[0].type: \"image\": this server reads text alone",
            ),
        ] {
            let mut body = json!({ "messages": [{ "role": "user", "content": "c" }] });
            for (name, value) in extra.as_object().unwrap() {
                body[name] = value.clone();
            }
            let message = read_messages(body).unwrap_err().message;
            assert!(message.starts_with(expected), "{message}");
        }
        let unbounded = json!({ "messages": [{ "role": "user", "content": "c" }] });
        assert!(read(unbounded.clone(), false).is_err() && read(unbounded, true).is_ok());
    }
}
