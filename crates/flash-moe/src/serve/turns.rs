//! Answers that were given, so that a conversation which repeats them has their real tokens.
//!
//! A client sends an answer back as JSON: arguments written anew, thinking often left out. Rendered by
//! the template it is seldom the tokens that the model emitted, and a checkpoint behind them would be
//! of no use. [`Turns::matching`] finds the answers by what was said before them and by their
//! content; [`splice`] puts their tokens in the place of the template's wording, where the template
//! shows such an answer at all. Refuses whatever differs in meaning: that is tokenized as it stands.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flash_moe_engine::reply::Part;
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// Answers that are remembered at once.
const TURNS_MAX: usize = 1024;
/// Tokens and bytes of text that all of them have together.
const SIZE_MAX: usize = 8 << 20;

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Thinking.
    pub thinking: String,
    /// Answer.
    pub content: String,
    /// Whole calls.
    pub calls: Vec<Call>,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Name of the tool.
    pub name: String,
    /// A JSON object.
    pub arguments: String,
}

/// What stands before an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    messages: u64, // hash of their meaning
    prompt: u64,   // hash of the text
    prompt_bytes: usize,
}

/// An answer that was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Its place.
    pub before: Before,
    /// What it says.
    pub said: Said,
    /// What the model emitted, without the token that ended it.
    pub tokens: Vec<u32>,
}

/// The answers, the oldest first.
#[derive(Default)]
pub struct Turns(Mutex<VecDeque<Turn>>);

impl Said {
    /// Adds a piece. A call that broke off is no call: its text joins the content.
    pub fn take(&mut self, part: Part) {
        match part {
            Part::Thinking(text) => self.thinking.push_str(&text),
            Part::Content(text) => self.content.push_str(&text),
            Part::CallBegins(name) => self.calls.push(Call { name, arguments: String::new() }),
            Part::Arguments(text) => {
                self.calls.last_mut().into_iter().for_each(|call| call.arguments.push_str(&text));
            }
            Part::CallEnds => {}
            Part::Broken(text) => {
                self.calls.pop();
                self.content.push_str(&text);
            }
        }
    }

    /// Whether an assistant's message in the template's terms says this. White space around texts
    /// and the form of the arguments do not count, and thinking may be left out.
    fn is(&self, message: &Json) -> bool {
        let text = |name: &str| message[name].as_str().unwrap_or("").trim();
        let calls = message["tool_calls"].as_array().map_or(&[][..], Vec::as_slice);
        let thinking = text("reasoning_content");
        (thinking.is_empty() || thinking == self.thinking.trim())
            && text("content") == self.content.trim()
            && calls.len() == self.calls.len()
            && self.calls.iter().zip(calls).all(|(own, call)| {
                let function = &call["function"];
                let arguments = serde_json::from_str::<Json>(&own.arguments);
                function["name"] == own.name.as_str()
                    && arguments.is_ok_and(|arguments| arguments == function["arguments"])
            })
    }

    fn size(&self) -> usize {
        let calls = self.calls.iter().map(|call| call.name.len() + call.arguments.len());
        self.thinking.len() + self.content.len() + calls.sum::<usize>()
    }
}

impl Before {
    /// The place behind these messages, whose prompt is `text`.
    pub fn new(messages: &[Json], text: &str) -> Self {
        let mut hash = Xxh3Default::new();
        messages.iter().for_each(|message| hash.update(meaning(message).as_bytes()));
        Self { messages: hash.digest(), prompt: xxh3_64(text.as_bytes()), prompt_bytes: text.len() }
    }
}

impl Turns {
    /// Remembers an answer; the oldest ones make room.
    pub fn record(&self, turn: Turn) {
        let mut turns = self.lock();
        turns.retain(|other| other.before != turn.before || other.said != turn.said);
        turns.push_back(turn);
        let size = |turn: &Turn| turn.said.size() + turn.tokens.len() * size_of::<u32>();
        let mut all: usize = turns.iter().map(size).sum();
        while turns.len() > TURNS_MAX || all > SIZE_MAX {
            all -= turns.pop_front().as_ref().map_or(all, size);
        }
    }

    /// The answers among these messages that were given in that place, each with its index; in
    /// order, and of those of one index the latest first.
    pub fn matching(&self, messages: &[Json]) -> Vec<(usize, Turn)> {
        let turns = self.lock();
        let (mut found, mut hash) = (Vec::new(), Xxh3Default::new());
        for (index, message) in messages.iter().enumerate() {
            if message["role"] == "assistant" {
                let before = hash.digest();
                let given = turns.iter().rev().filter(|turn| turn.before.messages == before);
                let given = given.filter(|turn| turn.said.is(message));
                found.extend(given.map(|turn| (index, turn.clone())));
            }
            hash.update(meaning(message).as_bytes());
        }
        found
    }

    /// All of them, the oldest first.
    pub fn list(&self) -> Vec<Turn> {
        self.lock().iter().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Turn>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tokens of a rendered conversation in which `turns` stand for the text that they are rendered
/// as; `None` if the text shows none of them in its place. `ends` are the texts that end a message.
///
/// A turn is in its place if the text before it is the prompt it was given to, and if all that it
/// says, thinking included, stands before the end of the message.
///
/// # Errors
/// The tokenizer gave up.
pub fn splice(
    text: &str,
    turns: &[(usize, Turn)],
    ends: &[String],
    tokenizer: &Tokenizer,
) -> flash_moe_engine::Result<Option<Vec<TokenId>>> {
    let (mut tokens, mut done) = (Vec::new(), 0);
    for (_, turn) in turns {
        let at = turn.before.prompt_bytes;
        let Some(prompt) = text.get(..at).filter(|_| at >= done) else { continue };
        if xxh3_64(prompt.as_bytes()) != turn.before.prompt {
            continue;
        }
        let rest = &text[at..];
        let end = ends.iter().filter_map(|end| rest.find(end.as_str())).min();
        let Some(end) = end.filter(|&end| shows(&rest[..end], &turn.said)) else { continue };
        tokens.extend(tokenizer.encode(&text[done..at])?);
        tokens.extend(turn.tokens.iter().copied().map(TokenId));
        done = at + end;
    }
    if done == 0 {
        return Ok(None);
    }
    tokens.extend(tokenizer.encode(&text[done..])?);
    Ok(Some(tokens))
}

fn shows(rendered: &str, said: &Said) -> bool {
    let names = said.calls.iter().map(|call| call.name.as_str());
    let texts = [said.thinking.trim(), said.content.trim()].into_iter().chain(names);
    texts.into_iter().all(|text| rendered.contains(text))
}

/// What a message says, as one text: without ids, thinking and the order of fields.
fn meaning(message: &Json) -> String {
    let content = match &message["content"] {
        Json::String(text) if message["role"] == "assistant" => json!(text.trim()),
        other => other.clone(),
    };
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let calls: Vec<Json> = calls
        .map(|call| json!([call["function"]["name"], sorted(&call["function"]["arguments"])]))
        .collect();
    json!([message["role"], content, calls]).to_string()
}

fn sorted(value: &Json) -> Json {
    match value {
        Json::Object(fields) => {
            let mut fields: Vec<(&String, &Json)> = fields.iter().collect();
            fields.sort_by_key(|(name, _)| *name);
            Json::Object(fields.into_iter().map(|(name, v)| (name.clone(), sorted(v))).collect())
        }
        Json::Array(items) => items.iter().map(sorted).collect(),
        other => other.clone(),
    }
}
