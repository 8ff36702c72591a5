//! A call written as one JSON object with `name` and `arguments`.
//!
//! Where the two stand in this order, as every template of the family shows them, the arguments are
//! passed on as they arrive. Any other order waits for the closing tag and is read as a whole.

use super::call::Progress;
use super::{CALL_END, Part};
use serde_json::Value as Json;

/// The arguments of a call whose name is known.
#[derive(Debug)]
pub struct JsonCall {
    arguments: String,
    depth: usize,
    in_string: bool,
    escaped: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// In the arguments.
    Arguments,
    /// Behind them, before the brace of the whole object.
    Brace,
    /// The arguments are known already.
    Ready,
}

/// What stands behind the opening tag.
pub enum Header<'t> {
    /// A call of `name`; its arguments begin at `rest`.
    Is {
        /// Name of the tool.
        name: String,
        /// Text behind the header.
        rest: &'t str,
        /// What reads on.
        call: JsonCall,
    },
    /// More text will tell.
    May,
    /// No call.
    IsNot,
}

/// Reads the beginning of a call.
pub fn begin(text: &str) -> Header<'_> {
    match streamed(text) {
        Header::IsNot => whole(text),
        other => other,
    }
}

impl JsonCall {
    fn new(arguments: String, state: State) -> Self {
        Self { arguments, depth: 0, in_string: false, escaped: false, state }
    }

    /// Takes what it can from `held`; says how many bytes.
    pub fn advance(&mut self, held: &str, parts: &mut Vec<Part>) -> (usize, Progress) {
        match self.state {
            State::Ready => {
                parts.push(Part::Arguments(std::mem::take(&mut self.arguments)));
                (0, Progress::Whole)
            }
            State::Brace => {
                let text = held.trim_start();
                match text.strip_prefix('}') {
                    Some(rest) => (held.len() - rest.len(), self.close(parts)),
                    None if text.is_empty() => (0, Progress::Waits),
                    None => (0, Progress::Failed),
                }
            }
            State::Arguments => self.scan(held, parts),
        }
    }

    /// The last brace of the arguments is kept back until all of them are known to be valid.
    fn scan(&mut self, held: &str, parts: &mut Vec<Part>) -> (usize, Progress) {
        for (at, c) in held.char_indices() {
            self.follow(c);
            if self.depth == 0 {
                let taken = &held[..=at];
                self.arguments.push_str(taken);
                self.state = State::Brace;
                give(parts, &held[..at]);
                return (at + 1, Progress::More);
            }
        }
        self.arguments.push_str(held);
        give(parts, held);
        (held.len(), Progress::Waits)
    }

    fn follow(&mut self, c: char) {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' if self.in_string => self.escaped = true,
            '"' => self.in_string = !self.in_string,
            '{' | '[' if !self.in_string => self.depth += 1,
            '}' | ']' if !self.in_string => self.depth -= 1,
            _ => {}
        }
    }

    fn close(&mut self, parts: &mut Vec<Part>) -> Progress {
        match serde_json::from_str::<Json>(&self.arguments) {
            Ok(_) => {
                parts.push(Part::Arguments("}".into()));
                Progress::Whole
            }
            Err(_) => Progress::Failed,
        }
    }
}

fn give(parts: &mut Vec<Part>, text: &str) {
    if !text.is_empty() {
        parts.push(Part::Arguments(text.into()));
    }
}

/// `{ "name": NAME, "arguments": {`, up to before the last brace.
fn streamed(text: &str) -> Header<'_> {
    let mut rest = text;
    let mut name = None;
    for expected in ["{", "\"name\"", ":", "NAME", ",", "\"arguments\"", ":"] {
        rest = rest.trim_start();
        if expected == "NAME" {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Json>();
            match values.next() {
                Some(Ok(Json::String(found))) => name = Some(found),
                Some(Err(e)) if e.is_eof() => return Header::May,
                None => return Header::May,
                _ => return Header::IsNot,
            }
            rest = &rest[values.byte_offset()..];
            continue;
        }
        match rest.strip_prefix(expected) {
            Some(after) => rest = after,
            None if expected.starts_with(rest) => return Header::May,
            None => return Header::IsNot,
        }
    }
    let rest = rest.trim_start();
    match (rest.chars().next(), name) {
        (Some('{'), Some(name)) => {
            Header::Is { name, rest, call: JsonCall::new(String::new(), State::Arguments) }
        }
        (None, _) => Header::May,
        _ => Header::IsNot,
    }
}

/// The object in any order, known when its closing tag is there.
fn whole(text: &str) -> Header<'_> {
    if !text.starts_with('{') && !text.is_empty() {
        return Header::IsNot;
    }
    let Some(end) = text.find(CALL_END) else { return Header::May };
    let Ok(Json::Object(mut object)) = serde_json::from_str(&text[..end]) else {
        return Header::IsNot;
    };
    let arguments = match object.remove("arguments") {
        Some(arguments @ Json::Object(_)) => arguments.to_string(),
        Some(Json::String(text)) if is_object(&text) => text,
        None => "{}".into(),
        Some(_) => return Header::IsNot,
    };
    match object.remove("name") {
        Some(Json::String(name)) => {
            Header::Is { name, rest: &text[end..], call: JsonCall::new(arguments, State::Ready) }
        }
        _ => Header::IsNot,
    }
}

fn is_object(text: &str) -> bool {
    serde_json::from_str::<Json>(text).is_ok_and(|value| value.is_object())
}
