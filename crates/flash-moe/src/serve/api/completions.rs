//! OpenAI's completions: `POST /v1/completions`.
//!
//! Prompts are continued as they stand, without a template; thinking and calls are not told apart. A
//! list of prompts gives the texts of each, one after the other.

use std::sync::Arc;

use flash_moe_engine::reply::Part;
use flash_moe_engine::shape::TokenId;
use serde_json::{Map, Value as Json, json};

use super::super::model::Model;
use super::super::schedule::{Event, TokenLogprobs, Usage};
use super::super::sse::{Translate, data};
use super::chat::{created, stream_options, token_text, wishes};
use super::fields::{Fields, expected};
use super::message::{Message, finish_reason, new_id, usage_json};
use super::refusal::{Dialect, Parsed, Refusal};
use super::request::{CHOICES_MAX, Wishes};

/// Tokens of an answer whose length nobody gives, as OpenAI's interface has it.
const TOKENS_DEFAULT: usize = 16;

/// A request that has been read.
pub struct Request {
    /// What is continued.
    pub prompts: Vec<Prompt>,
    /// How to go on.
    pub wishes: Wishes,
    /// Whether a stream ends with the tokens used.
    pub usage: bool,
}

/// A text or its tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Ids.
    Tokens(Vec<TokenId>),
}

impl Prompt {
    /// Its tokens.
    ///
    /// # Errors
    /// The tokenizer gave up, or an id stands for no token.
    pub fn tokens(self, model: &Model) -> Parsed<Vec<TokenId>> {
        match self {
            Self::Text(text) => {
                model.tokenizer.encode(&text).map_err(|e| Refusal::field("prompt", e.to_string()))
            }
            Self::Tokens(tokens) => {
                let count = model.tokenizer.count();
                match tokens.iter().find(|token| token.0 as usize >= count) {
                    Some(token) => {
                        let why = format!("token {} is beyond the vocabulary of {count}", token.0);
                        Err(Refusal::field("prompt", why))
                    }
                    None => Ok(tokens),
                }
            }
        }
    }
}

/// Reads a request.
///
/// # Errors
/// Names the field that is wrong, unknown or not supported.
pub fn read(body: Json) -> Parsed<Request> {
    let mut fields = Fields::of(body, "")?;
    fields.accept(&["model", "user", "metadata"]);
    fields.only("echo", &[json!(false)])?;
    fields.only("best_of", &[json!(1)])?;
    fields.only("suffix", &[json!("")])?;
    let prompts = prompts(&mut fields)?;
    let mut wishes = wishes(&mut fields)?;
    wishes.max_tokens = Some(fields.count("max_tokens", 1)?.unwrap_or(TOKENS_DEFAULT));
    wishes.logprobs = fields.count("logprobs", 0)?;
    if wishes.logprobs.is_some_and(|top| top > 20) {
        return Err(fields.refusal("logprobs", "is above 20"));
    }
    if prompts.len() * wishes.choices > CHOICES_MAX {
        return Err(fields.refusal("prompt", format!("asks for more than {CHOICES_MAX} texts")));
    }
    let usage = stream_options(&mut fields, wishes.stream)?;
    fields.finish()?;
    Ok(Request { prompts, wishes, usage })
}

fn prompts(fields: &mut Fields) -> Parsed<Vec<Prompt>> {
    let Some(value) = fields.take("prompt") else {
        return Err(fields.refusal("prompt", "is required"));
    };
    let one = |value: &Json| match value {
        Json::String(text) => Some(Prompt::Text(text.clone())),
        Json::Array(_) => ids(value).map(Prompt::Tokens),
        _ => None,
    };
    let all = match &value {
        Json::Array(list) if list.is_empty() => None,
        Json::Array(list) if !list[0].is_number() => list.iter().map(one).collect(),
        other => one(other).map(|prompt| vec![prompt]),
    };
    let wanted = "a string, token ids, or a list of either";
    all.ok_or_else(|| expected("prompt", &value, wanted))
}

/// A list of token ids.
pub fn ids(value: &Json) -> Option<Vec<TokenId>> {
    let id = |id: &Json| u32::try_from(id.as_u64()?).ok().map(TokenId);
    value.as_array()?.iter().map(id).collect()
}

/// The whole answer; `choices` texts belong to each prompt.
pub fn answer(model: &Model, messages: &[Message], choices: usize) -> Json {
    let texts = messages.iter().enumerate().map(|(index, message)| {
        json!({
            "index": index,
            "text": message.said.content,
            "logprobs": logprobs_json(model, &message.logprobs, &mut 0),
            "finish_reason": finish_reason(&message.outcome),
        })
    });
    let texts: Vec<Json> = texts.collect();
    let usages: Vec<Usage> = messages.iter().map(|message| message.outcome.usage).collect();
    json!({
        "id": new_id("cmpl-"), "object": "text_completion", "created": created(),
        "model": model.name, "choices": texts, "usage": usage_json(summed(&usages, choices)),
    })
}

/// Tokens of all texts, each prompt counted once.
fn summed(usages: &[Usage], choices: usize) -> Usage {
    let mut sum = Usage::default();
    for (index, usage) in usages.iter().enumerate() {
        if index % choices == 0 {
            sum.prompt += usage.prompt;
            sum.cached += usage.cached;
        }
        sum.generated += usage.generated;
    }
    sum
}

/// Probabilities in this interface's own lists; `offset` is where the tokens begin in the text.
fn logprobs_json(model: &Model, tokens: &[TokenLogprobs], offset: &mut usize) -> Json {
    if tokens.is_empty() {
        return Json::Null;
    }
    let mut offsets = Vec::new();
    for token in tokens {
        offsets.push(*offset);
        *offset += token_text(model, token.token).chars().count();
    }
    let top = |token: &TokenLogprobs| {
        let entries = token.logprobs.top.iter();
        let entries = entries.map(|&(id, p)| (token_text(model, id), json!(p.max(-9999.0))));
        Json::Object(entries.collect::<Map<String, Json>>())
    };
    json!({
        "tokens": tokens.iter().map(|t| token_text(model, t.token)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprobs.chosen.max(-9999.0)).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

/// Writes the chunks of a streamed answer.
pub struct Chunks {
    id: String,
    created: u64,
    model: Arc<Model>,
    usage: bool,
    choices: usize,
    usages: Vec<Usage>,
    offsets: Vec<usize>,
    failed: bool,
}

impl Chunks {
    /// For `texts` texts, `choices` of each prompt.
    pub fn new(model: Arc<Model>, texts: usize, choices: usize, usage: bool) -> Self {
        Self {
            id: new_id("cmpl-"),
            created: created(),
            model,
            usage,
            choices,
            usages: vec![Usage::default(); texts],
            offsets: vec![0; texts],
            failed: false,
        }
    }

    fn chunk(&self, choices: Json, usage: Json) -> String {
        let mut chunk = json!({
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.model.name, "choices": choices,
        });
        if self.usage {
            chunk["usage"] = usage;
        }
        data(&chunk)
    }

    fn text(&self, index: usize, text: &str, logprobs: Json, finish: Option<&str>) -> String {
        let choice =
            json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish });
        self.chunk(json!([choice]), Json::Null)
    }
}

impl Translate for Chunks {
    fn event(&mut self, index: usize, event: Event) -> String {
        match event {
            Event::Started(_) | Event::Prefilled(_) => String::new(),
            Event::Token { parts, logprobs } => {
                let texts = parts.into_iter().map(|part| match part {
                    Part::Content(text) => text,
                    _ => String::new(),
                });
                let text: String = texts.collect();
                let ranked: Vec<TokenLogprobs> = logprobs.into_iter().collect();
                if text.is_empty() && ranked.is_empty() {
                    return String::new();
                }
                let logprobs = logprobs_json(&self.model, &ranked, &mut self.offsets[index]);
                self.text(index, &text, logprobs, None)
            }
            Event::Done(outcome) => {
                self.usages[index] = outcome.usage;
                self.text(index, "", Json::Null, Some(finish_reason(&outcome)))
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
            text += &self.chunk(json!([]), usage_json(summed(&self.usages, self.choices)));
        }
        text + "data: [DONE]\n\n"
    }
}
