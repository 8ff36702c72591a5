//! One tool call, from its opening tag on.
//!
//! In the tagged format a call is known by `<tool_call>`, `<function=` and the name of a tool that
//! was offered; until then it is text. Strings are passed on as they arrive; other values when they
//! are whole, because their type is told by all of their text. A value ends at the first
//! `</parameter>`; the line break on either side of it belongs to the format.

use super::argument::Types;
use super::json_call::{self, JsonCall};
use super::longest_beginning;
use super::{CALL, CALL_END, CallFormat, Part, Tool, Tools};
use serde_json::Value as Json;

const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const VALUE_END: &str = "</parameter>";

/// A call under way.
#[derive(Default)]
pub struct Call {
    tool: Tool,
    text: String, // of the call, as the model wrote it
    arguments: usize,
    body: Body,
}

#[derive(Default)]
enum Body {
    /// Between arguments.
    #[default]
    Between,
    /// In a value.
    Value {
        types: Types,
        begun: bool,
    },
    Json(JsonCall),
    /// Whole but for the closing tag.
    Whole,
}

/// Whether a text that starts with the opening tag is a call.
pub enum Beginning {
    /// It is; its beginning takes so many bytes.
    Is(Box<Call>, usize),
    /// More text will tell.
    May,
    /// It is not.
    IsNot,
}

/// What a call made of its text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Something; there may be more.
    More,
    /// Nothing: it needs more text.
    Waits,
    /// The call is whole.
    Whole,
    /// Its closing tag has been met, or what follows is no part of it.
    Closed,
    /// It is no call.
    Failed,
}

impl Call {
    /// Reads the beginning of a call from `text`, which starts with the opening tag.
    pub fn begin(tools: &Tools, text: &str) -> Beginning {
        let after_tag = text[CALL.len()..].trim_start();
        let (name, rest, body) = match tools.format {
            CallFormat::Tagged => match name_in(after_tag, FUNCTION, &tools.offered) {
                Name::Is(name, rest) => (name, rest, Body::Between),
                Name::May => return Beginning::May,
                Name::IsNot => return Beginning::IsNot,
            },
            CallFormat::Json => match json_call::begin(after_tag) {
                json_call::Header::Is { name, rest, call } => (name, rest, Body::Json(call)),
                json_call::Header::May => return Beginning::May,
                json_call::Header::IsNot => return Beginning::IsNot,
            },
        };
        let Some(tool) = tools.offered.iter().find(|tool| tool.name == name) else {
            return Beginning::IsNot;
        };
        let taken = text.len() - rest.len();
        let call = Self { tool: tool.clone(), text: text[..taken].to_string(), arguments: 0, body };
        Beginning::Is(Box::new(call), taken)
    }

    /// The name of the tool.
    pub fn name(&self) -> &str {
        &self.tool.name
    }

    /// Whether nothing but the closing tag is missing.
    pub fn is_whole(&self) -> bool {
        matches!(self.body, Body::Whole)
    }

    /// The call as the model wrote it.
    pub fn into_text(self) -> String {
        self.text
    }

    /// Takes what it can from the beginning of `held`.
    pub fn advance(&mut self, held: &mut String, parts: &mut Vec<Part>) -> Progress {
        let (taken, progress) = match &mut self.body {
            Body::Between => self.between(held, parts),
            Body::Value { .. } => self.value(held, parts),
            Body::Json(call) => call.advance(held, parts),
            Body::Whole => closing(held),
        };
        self.text.push_str(&held[..taken]);
        held.drain(..taken);
        if progress == Progress::Whole {
            self.body = Body::Whole;
            parts.push(Part::CallEnds);
        }
        progress
    }

    fn between(&mut self, held: &str, parts: &mut Vec<Part>) -> (usize, Progress) {
        let text = held.trim_start();
        if let Some(rest) = text.strip_prefix(FUNCTION_END) {
            let close = if self.arguments == 0 { "{}" } else { "}" };
            parts.push(Part::Arguments(close.into()));
            return (held.len() - rest.len(), Progress::Whole);
        }
        if let Some(rest) = text.strip_prefix(PARAMETER) {
            let line = rest.find(['>', '\n']);
            let Some(end) = line else { return (0, Progress::Waits) };
            let name = &rest[..end];
            if name.is_empty() || rest.as_bytes()[end] != b'>' {
                return (0, Progress::Failed);
            }
            let before = if self.arguments == 0 { "{" } else { ", " };
            parts.push(Part::Arguments(format!("{before}{}: ", Json::from(name))));
            self.arguments += 1;
            let types = Types::of(&self.tool.parameters, name);
            self.body = Body::Value { types, begun: false };
            return (held.len() - rest.len() + end + 1, Progress::More);
        }
        let may = [FUNCTION_END, PARAMETER].iter().any(|tag| tag.starts_with(text));
        (0, if may { Progress::Waits } else { Progress::Failed })
    }

    fn value(&mut self, held: &str, parts: &mut Vec<Part>) -> (usize, Progress) {
        let Body::Value { types, begun } = &mut self.body else { return (0, Progress::Waits) };
        let skipped = usize::from(!*begun && held.starts_with('\n'));
        let text = &held[skipped..];
        if let Some(end) = text.find(VALUE_END) {
            let value = text[..end].strip_suffix('\n').unwrap_or(&text[..end]);
            parts.push(Part::Arguments(match (types.is_text(), *begun) {
                (true, true) => format!("{}\"", escaped(value)),
                (true, false) => format!("\"{}\"", escaped(value)),
                (false, _) => types.json(value),
            }));
            self.body = Body::Between;
            return (skipped + end + VALUE_END.len(), Progress::More);
        }
        if !types.is_text() || held.is_empty() {
            return (0, Progress::Waits);
        }
        let ends = ["\n</parameter>", VALUE_END];
        let safe = text.len() - longest_beginning(text, &ends);
        if safe == 0 {
            return (0, Progress::Waits);
        }
        let open = if *begun { "" } else { "\"" };
        parts.push(Part::Arguments(format!("{open}{}", escaped(&text[..safe]))));
        *begun = true;
        (skipped + safe, Progress::Waits)
    }
}

impl Default for Tool {
    fn default() -> Self {
        Self { name: String::new(), parameters: Json::Null }
    }
}

/// What follows a whole call.
fn closing(held: &str) -> (usize, Progress) {
    let text = held.trim_start();
    match text.strip_prefix(CALL_END) {
        Some(rest) => (held.len() - rest.len(), Progress::Closed),
        None if CALL_END.starts_with(text) => (0, Progress::Waits),
        None => (0, Progress::Closed),
    }
}

enum Name<'t> {
    Is(String, &'t str),
    May,
    IsNot,
}

/// The name between `tag` and `>`, if it may be that of a tool.
fn name_in<'t>(text: &'t str, tag: &str, offered: &[Tool]) -> Name<'t> {
    let Some(rest) = text.strip_prefix(tag) else {
        return if tag.starts_with(text) { Name::May } else { Name::IsNot };
    };
    let known = offered.iter().find_map(|tool| {
        let rest = rest.strip_prefix(tool.name.as_str())?.strip_prefix('>')?;
        Some((tool.name.clone(), rest))
    });
    let may = |tool: &Tool| tool.name.starts_with(rest);
    match known {
        Some((name, rest)) => Name::Is(name, rest),
        None if offered.iter().any(may) => Name::May,
        None => Name::IsNot,
    }
}

/// The text as it stands between the quotes of a JSON string.
fn escaped(text: &str) -> String {
    let quoted = Json::from(text).to_string();
    quoted[1..quoted.len() - 1].to_string()
}
