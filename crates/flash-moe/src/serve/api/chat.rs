//! OpenAI's chat completions: `POST /v1/chat/completions`.
//!
//! Thinking goes to `reasoning_content`, calls to `tool_calls`, both as they come when streamed. Every
//! parameter is either obeyed, known to have no effect, or refused by name.

use flash_moe_engine::reply::Part;
use flash_moe_engine::shape::TokenId;
use serde_json::{Value as Json, json};

use super::super::model::Model;
use super::super::schedule::{Event, TokenLogprobs, Usage};
use super::super::sse::{Translate, data};
use super::chat_messages;
use super::fields::Fields;
use super::message::{Message, finish_reason, new_id, total, usage_json};
use super::refusal::{Dialect, Parsed, Refusal};
use super::request::{CHOICES_MAX, Conversation, Wishes, effort};

/// A request that has been read.
pub struct Request {
    /// What was said.
    pub conversation: Conversation,
    /// How to go on.
    pub wishes: Wishes,
    /// Whether a stream ends with the tokens used.
    pub usage: bool,
}

/// Reads a request.
///
/// # Errors
/// Names the field that is wrong, unknown or not supported.
pub fn read(body: Json) -> Parsed<Request> {
    let mut fields = Fields::of(body, "")?;
    fields.accept(&[
        "model",
        "user",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
    ]);
    fields.only("store", &[json!(false)])?;
    fields.only("service_tier", &[json!("auto"), json!("default")])?;
    fields.only("verbosity", &[json!("medium")])?;
    fields.only("modalities", &[json!(["text"])])?;
    for (name, why) in [
        ("audio", chat_messages::TEXT_ALONE),
        ("functions", "use tools"),
        ("function_call", "use tool_choice"),
        ("prediction", "there is no speculation on given text"),
        ("web_search_options", "this server searches nothing"),
    ] {
        fields.refuse(name, why)?;
    }
    let messages = fields.list("messages")?;
    let messages = messages.ok_or_else(|| fields.refusal("messages", "is required"))?;
    let mut conversation = Conversation {
        messages: chat_messages::messages(messages, "messages")?,
        tools: chat_messages::tools(fields.list("tools")?.unwrap_or_else(Vec::new), "tools")?,
        choice: chat_messages::choice(fields.take("tool_choice"))?,
        one_call: fields.flag("parallel_tool_calls")? == Some(false),
        ..Conversation::default()
    };
    conversation.schema = response_format(&mut fields)?;
    let mut wishes = wishes(&mut fields)?;
    if let Some(word) = fields.text("reasoning_effort")? {
        let (thinks, budget) = effort("reasoning_effort", &word)?;
        (conversation.thinking, wishes.think_budget) = (Some(thinks), budget);
    }
    if let Some(mut options) = fields.object("chat_template_kwargs")? {
        conversation.thinking = options.flag("enable_thinking")?.or(conversation.thinking);
        options.finish()?;
    }
    conversation.thinking = fields.flag("enable_thinking")?.or(conversation.thinking);
    wishes.max_tokens = max_tokens(&mut fields)?;
    let probabilities = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0)?;
    match (probabilities, top) {
        (true, top) if top.unwrap_or(0) <= 20 => wishes.logprobs = Some(top.unwrap_or(0)),
        (true, _) => return Err(fields.refusal("top_logprobs", "is above 20")),
        (false, Some(1..)) => return Err(fields.refusal("top_logprobs", "needs logprobs: true")),
        _ => {}
    }
    let usage = stream_options(&mut fields, wishes.stream)?;
    fields.finish()?;
    Ok(Request { conversation, wishes, usage })
}

/// What every one of OpenAI's older interfaces knows.
///
/// # Errors
/// Names the field that is wrong.
pub fn wishes(fields: &mut Fields) -> Parsed<Wishes> {
    let mut wishes = Wishes {
        stops: fields.texts("stop")?,
        choices: fields.count("n", 1)?.unwrap_or(1),
        stream: fields.flag("stream")?.unwrap_or(false),
        session: fields.text("session_id")?,
        ..Wishes::default()
    };
    if wishes.choices > CHOICES_MAX {
        return Err(fields.refusal("n", format!("is above {CHOICES_MAX}")));
    }
    wishes.sampling.temperature = fields.number("temperature")?;
    wishes.sampling.top_p = fields.number("top_p")?;
    wishes.sampling.top_k = top_k(fields)?;
    wishes.sampling.min_p = fields.number("min_p")?;
    wishes.sampling.presence_penalty = fields.number("presence_penalty")?;
    wishes.sampling.frequency_penalty = fields.number("frequency_penalty")?;
    wishes.sampling.repetition_penalty = fields.number("repetition_penalty")?;
    wishes.sampling.seed = seed(fields)?;
    wishes.logit_bias = logit_bias(fields)?;
    Ok(wishes)
}

/// Zero and -1 both keep all tokens.
fn top_k(fields: &mut Fields) -> Parsed<Option<usize>> {
    match fields.take("top_k") {
        Some(value) if value.as_i64() == Some(-1) => Ok(Some(0)),
        Some(value) => match value.as_u64() {
            Some(k) => Ok(Some(k as usize)),
            None => Err(fields.refusal("top_k", format!("is {value}, expected a whole number"))),
        },
        None => Ok(None),
    }
}

fn seed(fields: &mut Fields) -> Parsed<Option<u64>> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some).ok_or_else(|| fields.refusal("seed", "is not a whole number"))
}

fn logit_bias(fields: &mut Fields) -> Parsed<Vec<(TokenId, f32)>> {
    let wrong = "is not an object of token ids and numbers";
    match fields.take("logit_bias") {
        None => Ok(Vec::new()),
        Some(Json::Object(biases)) => biases
            .into_iter()
            .map(|(id, bias)| {
                let bias = bias.as_f64().map(|bias| bias as f32);
                Some((TokenId(id.parse().ok()?), bias?))
            })
            .collect::<Option<_>>()
            .ok_or_else(|| fields.refusal("logit_bias", wrong)),
        Some(_) => Err(fields.refusal("logit_bias", wrong)),
    }
}

fn max_tokens(fields: &mut Fields) -> Parsed<Option<usize>> {
    let (old, new) = (fields.count("max_tokens", 1)?, fields.count("max_completion_tokens", 1)?);
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            Err(fields.refusal("max_tokens", "differs from max_completion_tokens; give one"))
        }
        (old, new) => Ok(new.or(old)),
    }
}

/// Whether a stream ends with the tokens used.
///
/// # Errors
/// Options without a stream, or unknown ones.
pub fn stream_options(fields: &mut Fields, stream: bool) -> Parsed<bool> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(fields.refusal("stream_options", "needs stream: true"));
    }
    let usage = options.flag("include_usage")?.unwrap_or(false);
    options.only("include_obfuscation", &[json!(false)])?;
    options.accept(&["continuous_usage_stats"]);
    options.finish()?;
    Ok(usage)
}

fn response_format(fields: &mut Fields) -> Parsed<Option<Json>> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let kind = format.needed_text("type")?;
    let schema = match kind.as_str() {
        "text" => None,
        "json_object" => Some(json!({ "type": "object" })),
        "json_schema" => {
            let mut outer = format
                .object("json_schema")?
                .ok_or_else(|| format.refusal("json_schema", "is required"))?;
            outer.accept(&["name", "description", "strict"]);
            let schema = outer.take("schema");
            let schema = schema.ok_or_else(|| outer.refusal("schema", "is required"))?;
            outer.finish()?;
            Some(schema)
        }
        other => {
            let known = "text, json_object, json_schema";
            return Err(format.refusal("type", format!("{other:?} is none of {known}")));
        }
    };
    format.finish()?;
    Ok(schema)
}

/// The whole answer.
pub fn answer(model: &Model, messages: &[Message]) -> Json {
    let choices: Vec<Json> = messages
        .iter()
        .enumerate()
        .map(|(index, message)| {
            json!({
                "index": index,
                "message": message_json(message),
                "logprobs": logprobs_json(model, &message.logprobs),
                "finish_reason": finish_reason(&message.outcome),
            })
        })
        .collect();
    json!({
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": created(),
        "model": model.name,
        "choices": choices,
        "usage": usage_json(total(messages.iter().map(|message| message.outcome.usage))),
        "system_fingerprint": null,
    })
}

fn message_json(message: &Message) -> Json {
    let calls: Vec<Json> = message
        .said
        .calls
        .iter()
        .map(|call| {
            json!({ "id": new_id("call_"), "type": "function",
                    "function": { "name": call.name, "arguments": call.arguments } })
        })
        .collect();
    let no_content = message.said.content.is_empty() && !calls.is_empty();
    let content = if no_content { Json::Null } else { json!(message.said.content) };
    let mut json = json!({ "role": "assistant", "content": content, "refusal": null });
    if !message.said.thinking.is_empty() {
        json["reasoning_content"] = json!(message.said.thinking);
    }
    if !calls.is_empty() {
        json["tool_calls"] = Json::Array(calls);
    }
    json
}

/// Seconds since 1970.
pub fn created() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs())
}

/// Probabilities of tokens; null where none were asked for.
fn logprobs_json(model: &Model, tokens: &[TokenLogprobs]) -> Json {
    if tokens.is_empty() {
        return Json::Null;
    }
    let content: Vec<Json> = tokens.iter().map(|token| token_json(model, token)).collect();
    json!({ "content": content, "refusal": null })
}

fn token_json(model: &Model, token: &TokenLogprobs) -> Json {
    let entry = |id: TokenId, logprob: f32| {
        let bytes = model.tokenizer.bytes(id);
        // JSON has no infinity; what cannot happen is as good as this.
        json!({ "token": token_text(model, id), "logprob": logprob.max(-9999.0), "bytes": bytes })
    };
    let mut json = entry(token.token, token.logprobs.chosen);
    let top = token.logprobs.top.iter().map(|&(id, logprob)| entry(id, logprob));
    json["top_logprobs"] = top.collect();
    json
}

/// A token as text: its own, or the name of a special one.
pub fn token_text(model: &Model, id: TokenId) -> String {
    match model.tokenizer.bytes(id) {
        [] => model.tokenizer.name(id).into_iter().collect(),
        bytes => String::from_utf8_lossy(bytes).into_owned(),
    }
}

/// Writes the chunks of a streamed answer.
pub struct Chunks {
    id: String,
    created: u64,
    model: std::sync::Arc<Model>,
    usage: bool,
    usages: Vec<Usage>,
    calls: Vec<usize>, // [choices], begun
    failed: bool,
}

impl Chunks {
    /// For `choices` answers.
    pub fn new(model: std::sync::Arc<Model>, choices: usize, usage: bool) -> Self {
        Self {
            id: new_id("chatcmpl-"),
            created: created(),
            model,
            usage,
            usages: vec![Usage::default(); choices],
            calls: vec![0; choices],
            failed: false,
        }
    }

    fn chunk(&self, choices: Json) -> String {
        let mut chunk = json!({
            "id": self.id, "object": "chat.completion.chunk", "created": self.created,
            "model": self.model.name, "choices": choices, "system_fingerprint": null,
        });
        if self.usage {
            chunk["usage"] = Json::Null;
        }
        data(&chunk)
    }

    fn delta(&self, index: usize, delta: Json, finish: Option<&str>) -> String {
        self.chunk(
            json!([{ "index": index, "delta": delta, "logprobs": null, "finish_reason": finish }]),
        )
    }

    fn part(&mut self, index: usize, part: Part) -> Option<Json> {
        let call = |at: usize, call: Json| {
            let mut call = call;
            call["index"] = json!(at);
            Some(json!({ "tool_calls": [call] }))
        };
        match part {
            Part::Thinking(text) => Some(json!({ "reasoning_content": text })),
            Part::Content(text) | Part::Broken(text) => Some(json!({ "content": text })),
            Part::CallBegins(name) => {
                self.calls[index] += 1;
                let begun = json!({ "id": new_id("call_"), "type": "function",
                                    "function": { "name": name, "arguments": "" } });
                call(self.calls[index] - 1, begun)
            }
            Part::Arguments(text) => {
                call(self.calls[index] - 1, json!({ "function": { "arguments": text } }))
            }
            Part::CallEnds => None,
        }
    }

    /// A chunk for each part; probabilities go with the first, or alone.
    fn token(&mut self, index: usize, parts: Vec<Part>, ranked: Option<TokenLogprobs>) -> String {
        let mut deltas: Vec<Json> =
            parts.into_iter().filter_map(|part| self.part(index, part)).collect();
        if deltas.is_empty() && ranked.is_some() {
            deltas.push(json!({}));
        }
        let mut ranked: Vec<TokenLogprobs> = ranked.into_iter().collect();
        let chunk = |delta: Json| {
            let logprobs = logprobs_json(&self.model, &std::mem::take(&mut ranked));
            let choice = json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null });
            self.chunk(json!([choice]))
        };
        deltas.into_iter().map(chunk).collect()
    }
}

impl Translate for Chunks {
    fn event(&mut self, index: usize, event: Event) -> String {
        match event {
            Event::Started(_) => {
                self.delta(index, json!({ "role": "assistant", "content": "" }), None)
            }
            Event::Prefilled(_) => String::new(),
            Event::Token { parts, logprobs } => self.token(index, parts, logprobs),
            Event::Done(outcome) => {
                self.usages[index] = outcome.usage;
                self.delta(index, json!({}), Some(finish_reason(&outcome)))
            }
            Event::Failed(failure) => {
                self.failed = true;
                data(&Refusal::from(failure).body(Dialect::OpenAi, ""))
            }
        }
    }

    fn end(&mut self) -> String {
        let mut text = String::new();
        if self.usage && !self.failed {
            let usage = usage_json(total(self.usages.iter().copied()));
            text += &data(&json!({
                "id": self.id, "object": "chat.completion.chunk", "created": self.created,
                "model": self.model.name, "choices": [], "usage": usage,
            }));
        }
        text + "data: [DONE]\n\n"
    }
}
