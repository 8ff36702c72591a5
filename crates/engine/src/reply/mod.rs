//! A model's text, taken apart as it arrives: thinking, answer, tool calls.
//!
//! [`Reply`] takes text in any pieces and gives [`Part`]s. Text is held back only while it may still
//! turn out to be something else: the beginning of a tag, of a stop text, or white space before a
//! call. However the text is cut into pieces, the parts put together are the same, and nothing but
//! tags and the white space around them is dropped. A call that does not parse is given back as
//! text. Refuses to guess: only a tool that was offered can be called.

mod argument;
mod call;
mod json_call;
mod stop;

use serde_json::Value as Json;

use call::{Call, Progress};
pub use stop::longest_beginning;

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";

/// A piece of a reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    /// Thinking, without its tags and the white space around it.
    Thinking(String),
    /// Answer.
    Content(String),
    /// A call of this tool begins.
    CallBegins(String),
    /// The next piece of the call's arguments, a JSON object in all.
    Arguments(String),
    /// The call is whole: its arguments are valid JSON.
    CallEnds,
    /// What had begun is no call; this is all of its text. The arguments given so far are never a
    /// whole JSON value, so that nobody acts on half a call.
    Broken(String),
}

/// How a model was trained to write calls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallFormat {
    /// `<function=NAME>` with one `<parameter=NAME>` an argument, inside `<tool_call>`.
    Tagged,
    /// One JSON object with `name` and `arguments`, inside `<tool_call>`.
    Json,
}

/// A tool that was offered.
#[derive(Clone, PartialEq, Debug)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments; null is an object of anything.
    pub parameters: Json,
}

/// The tools that a reply may call.
#[derive(Clone, PartialEq, Debug)]
pub struct Tools {
    /// How calls are written.
    pub format: CallFormat,
    /// What may be called.
    pub offered: Vec<Tool>,
    /// Calls after which the reply is over; `None`: any number.
    pub calls_max: Option<usize>,
}

/// Where a reply begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// The prompt opened the thinking.
    Thinking,
    /// The reply may open the thinking itself.
    Either,
    /// All of it is answer, whatever tags it has.
    Content,
}

/// The reply so far.
pub struct Reply {
    stops: Vec<String>,
    tools: Option<Tools>,
    state: State,
    held: String,
    blank: bool, // white space at the beginning of `held` is dropped
    ended: Option<Ended>,
    calls: usize,
}

enum State {
    Opening,
    Thinking,
    Content,
    Call(Box<Call>),
}

/// What ended a reply before the model did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ended {
    /// This stop text.
    StopText(String),
    /// As many calls as were allowed.
    Calls,
}

impl Reply {
    /// An empty reply. Stop texts are looked for in the answer, not in thinking and calls.
    pub fn new(start: Start, stops: Vec<String>, tools: Option<Tools>) -> Self {
        let state = match start {
            Start::Thinking => State::Thinking,
            Start::Either => State::Opening,
            Start::Content => State::Content,
        };
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self {
            stops,
            tools,
            blank: start == Start::Thinking,
            state,
            held: String::new(),
            ended: None,
            calls: 0,
        }
    }

    /// Takes the next piece of text and appends what it settles to `parts`.
    pub fn push(&mut self, piece: &str, parts: &mut Vec<Part>) {
        if self.ended.is_some() {
            return;
        }
        self.held.push_str(piece);
        while self.ended.is_none() && self.settle(parts) {}
    }

    /// Takes the end of the text.
    pub fn finish(&mut self, parts: &mut Vec<Part>) {
        if self.ended.is_some() {
            return;
        }
        if matches!(self.state, State::Content) && self.stop(self.held.len(), parts) {
            return;
        }
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Content) {
            State::Thinking => emit(parts, Part::Thinking, self.trimmed(&held).trim_end()),
            State::Opening | State::Content => emit(parts, Part::Content, self.trimmed(&held)),
            State::Call(call) => match call.is_whole() {
                true => emit(parts, Part::Content, held.trim_start()),
                false => parts.push(Part::Broken(call.into_text() + &held)),
            },
        }
    }

    /// Whether the text so far ends inside the thinking.
    pub fn is_thinking(&self) -> bool {
        matches!(self.state, State::Thinking)
    }

    /// Whether the text so far ends right behind the tag that opens a call.
    pub fn is_at_call(&self) -> bool {
        matches!(self.state, State::Content) && self.tools.is_some() && self.held.ends_with(CALL)
    }

    /// What ended the reply, if something other than its text did.
    pub fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    /// Whole calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Settles one thing; says whether there may be more.
    fn settle(&mut self, parts: &mut Vec<Part>) -> bool {
        match &mut self.state {
            State::Opening => self.open(),
            State::Thinking => self.think(parts),
            State::Content => self.answer(parts),
            State::Call(_) => self.call(parts),
        }
    }

    fn open(&mut self) -> bool {
        let text = self.held.trim_start();
        if let Some(rest) = text.strip_prefix(THINK) {
            self.held = rest.to_string();
            self.blank = true;
            self.state = State::Thinking;
            return true;
        }
        if THINK.starts_with(text) {
            return false;
        }
        self.state = State::Content;
        true
    }

    fn think(&mut self, parts: &mut Vec<Part>) -> bool {
        let end = self.held.find(THINK_END);
        let begins = self.first_call(&self.held[..end.unwrap_or(self.held.len())]);
        let is_call = begins.as_ref().is_some_and(|begins| begins.call.is_some());
        if let Some(end) = end.filter(|_| !is_call) {
            let thought = self.held[..end].to_string();
            self.held.drain(..end + THINK_END.len());
            emit(parts, Part::Thinking, self.trimmed(&thought).trim_end());
            self.become_content();
            return true;
        }
        // A call inside the thinking ends it: some models forget the closing tag.
        if let Some(begins) = begins {
            return self.begin(begins, parts, Part::Thinking);
        }
        let mut tags = vec![THINK_END];
        tags.extend(self.tools.as_ref().map(|_| CALL));
        let safe = self.held.len() - longest_beginning(&self.held, &tags);
        self.release(self.held[..safe].trim_end().len(), parts, Part::Thinking);
        false
    }

    fn answer(&mut self, parts: &mut Vec<Part>) -> bool {
        if self.blank {
            let text = self.held.trim_start().len();
            self.held.drain(..self.held.len() - text);
            self.blank = text == 0;
        }
        let begins = self.first_call(&self.held);
        if self.stop(begins.as_ref().map_or(self.held.len(), |begins| begins.at), parts) {
            return false;
        }
        if let Some(begins) = begins {
            return self.begin(begins, parts, Part::Content);
        }
        let stops: Vec<&str> = self.stops.iter().map(String::as_str).collect();
        let mut safe = self.held.len() - longest_beginning(&self.held, &stops);
        if self.tools.is_some() {
            safe = safe.min(self.held.len() - longest_beginning(&self.held, &[CALL]));
            safe = self.held[..safe].trim_end().len();
        }
        self.release(safe, parts, Part::Content);
        false
    }

    /// Ends the reply at the first stop text that begins at `last` or before.
    fn stop(&mut self, last: usize, parts: &mut Vec<Part>) -> bool {
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop)));
        let found = found.filter(|&(at, _)| at <= last).min_by_key(|&(at, _)| at);
        let Some((at, stop)) = found else { return false };
        self.ended = Some(Ended::StopText(stop.clone()));
        let text = std::mem::take(&mut self.held);
        emit(parts, Part::Content, self.trimmed(&text[..at]));
        true
    }

    fn call(&mut self, parts: &mut Vec<Part>) -> bool {
        let State::Call(call) = &mut self.state else { return false };
        match call.advance(&mut self.held, parts) {
            Progress::More => true,
            Progress::Waits => false,
            Progress::Whole => {
                self.calls += 1;
                let most = self.tools.as_ref().and_then(|tools| tools.calls_max);
                if most.is_some_and(|most| self.calls >= most) {
                    self.ended = Some(Ended::Calls);
                }
                true
            }
            Progress::Closed => {
                self.become_content();
                true
            }
            Progress::Failed => {
                let text = std::mem::take(call).into_text();
                parts.push(Part::Broken(text));
                self.state = State::Content;
                true
            }
        }
    }

    fn become_content(&mut self) {
        self.state = State::Content;
        self.blank = true;
    }

    /// The first place in `text` at which a call begins, or may.
    fn first_call(&self, text: &str) -> Option<Begins> {
        let tools = self.tools.as_ref()?;
        let mut from = 0;
        loop {
            let at = from + text[from..].find(CALL)?;
            match Call::begin(tools, &text[at..]) {
                call::Beginning::Is(call, taken) => {
                    return Some(Begins { at, call: Some((call, taken)) });
                }
                call::Beginning::May => return Some(Begins { at, call: None }),
                call::Beginning::IsNot => from = at + CALL.len(),
            }
        }
    }

    /// Gives what stands before a call; goes into the call if it is one.
    fn begin(&mut self, begins: Begins, parts: &mut Vec<Part>, kind: fn(String) -> Part) -> bool {
        let before = self.held[..begins.at].trim_end().len();
        let Some((call, taken)) = begins.call else {
            self.release(before, parts, kind);
            return false;
        };
        let text = self.held[..before].to_string();
        self.held.drain(..begins.at + taken);
        emit(parts, kind, self.trimmed(&text));
        parts.push(Part::CallBegins(call.name().to_string()));
        self.state = State::Call(call);
        self.blank = false;
        true
    }

    /// Gives the first `bytes` of what is held.
    fn release(&mut self, bytes: usize, parts: &mut Vec<Part>, kind: fn(String) -> Part) {
        let text: String = self.held.drain(..bytes).collect();
        let text = self.trimmed(&text);
        if !text.is_empty() {
            let text = text.to_string();
            self.blank = false;
            parts.push(kind(text));
        }
    }

    fn trimmed<'t>(&self, text: &'t str) -> &'t str {
        if self.blank { text.trim_start() } else { text }
    }
}

/// A call, or what may become one, in the held text.
struct Begins {
    at: usize,
    call: Option<(Box<Call>, usize)>, // the call and how many bytes its beginning took
}

fn emit(parts: &mut Vec<Part>, kind: fn(String) -> Part, text: &str) {
    if !text.is_empty() {
        parts.push(kind(text.to_string()));
    }
}

#[cfg(test)]
mod tests;
