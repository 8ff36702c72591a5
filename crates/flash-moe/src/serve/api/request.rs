//! A request in the model's own terms, whatever interface it came through.
//!
//! The interfaces read their fields into a [`Conversation`] and [`Wishes`]; from here on there is one
//! way to a prompt, a constraint and jobs. Refuses what the model or its template cannot do.

use std::time::Instant;

use flash_moe_engine::chat_template::{self, ChatTemplate};
use flash_moe_engine::reply::{Start, Tool, Tools};
use flash_moe_engine::sampler::Sampling;
use flash_moe_engine::shape::TokenId;
use serde_json::{Value as Json, json};
use tokio::sync::mpsc::UnboundedSender;

use super::super::constrain::{Calls, Constraint};
use super::super::model::Model;
use super::super::prefix::{Mark, Place, positions};
use super::super::schedule::{Event, Format, Job, Limits, Origin};
use super::super::turns::{self, Before};
use super::refusal::{Parsed, Refusal};
use crate::options::run::SamplingArgs;

/// Most texts of one request.
pub const CHOICES_MAX: usize = 16;
/// Most texts that end an answer: each is looked for after every token.
const STOPS_MAX: usize = 64;
/// Longest name of a conversation.
const SESSION_BYTES_MAX: usize = 128;

/// A user's message that nobody writes: what stands before it is the same for all conversations.
const OTHER_USER: &str = "\u{1}";

/// A conversation as the model sees it.
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<TokenId>,
    /// Where the answer begins.
    start: Start,
    /// Where the answer stands.
    before: Before,
    /// What was rendered.
    messages: Vec<Json>,
    text: String,
}

/// A conversation as text and as tokens.
struct Rendered {
    messages: Vec<Json>,
    text: String,
    tokens: Vec<TokenId>,
}

/// What was said so far, and how to go on.
#[derive(Debug, Default)]
pub struct Conversation {
    /// In the template's terms.
    pub messages: Vec<Json>,
    /// Tools that were offered.
    pub tools: Vec<OfferedTool>,
    /// Whether they must be called.
    pub choice: Choice,
    /// Whether only one may be called.
    pub one_call: bool,
    /// Whether the model should think first; `None` leaves it to the template.
    pub thinking: Option<bool>,
    /// Schema of the answer.
    pub schema: Option<Json>,
}

/// A tool of a request.
#[derive(Clone, Debug)]
pub struct OfferedTool {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// JSON schema of its arguments.
    pub parameters: Json,
    /// Whether calls must follow the schema.
    pub strict: bool,
}

/// Which tools must be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The model decides.
    #[default]
    Auto,
    /// None may be.
    Never,
    /// At least one must be.
    Any,
    /// This one must be.
    Named(String),
}

/// How the text is to be made.
#[derive(Debug)]
pub struct Wishes {
    /// Choice of tokens, as far as the request says.
    pub sampling: SamplingArgs,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Texts that end it.
    pub stops: Vec<String>,
    /// Most tokens.
    pub max_tokens: Option<usize>,
    /// Tokens after which thinking is ended; 0: never; `None`: the server's own.
    pub think_budget: Option<usize>,
    /// Texts, at least 1.
    pub choices: usize,
    /// Most probable tokens to tell; `None`: no probabilities.
    pub logprobs: Option<usize>,
    /// Whether it is sent as it comes.
    pub stream: bool,
    /// The client's name for the conversation.
    pub session: Option<String>,
}

/// A prompt and all that makes texts of it.
pub struct Prepared {
    /// Its tokens.
    pub prompt: Vec<TokenId>,
    marks: Vec<Mark>,
    before: Option<Before>,
    sampling: Sampling,
    limits: Limits,
    format: Format,
    constraint: Option<Constraint>,
    logprobs: Option<usize>,
    choices: usize,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            sampling: SamplingArgs::none(),
            logit_bias: Vec::new(),
            stops: Vec::new(),
            max_tokens: None,
            think_budget: None,
            choices: 1,
            logprobs: None,
            stream: false,
            session: None,
        }
    }
}

impl OfferedTool {
    /// As templates show it.
    pub fn described(&self) -> Json {
        let mut function = json!({ "name": self.name });
        if let Some(description) = &self.description {
            function["description"] = json!(description);
        }
        function["parameters"] = self.parameters.clone();
        json!({ "type": "function", "function": function })
    }

    fn tool(&self) -> Tool {
        Tool { name: self.name.clone(), parameters: self.parameters.clone() }
    }
}

impl Conversation {
    /// The prompt.
    ///
    /// # Errors
    /// The model has no template, or the template refuses.
    pub fn prompt(&self, model: &Model) -> Parsed<Prompt> {
        let template = self.template(model)?;
        let refused = |e: flash_moe_engine::Error| Refusal::field("messages", e.to_string());
        let rendered = match self.replayed(model, template).map_err(refused)? {
            Some(found) => found,
            None => {
                let text = self.render(template, &self.messages, true).map_err(refused)?;
                let tokens = model.tokenizer.encode(&text).map_err(refused)?;
                Rendered { messages: self.messages.clone(), text, tokens }
            }
        };
        let Rendered { messages, text, tokens } = rendered;
        let end = text.trim_end();
        let start = match (end.ends_with("<think>"), end.ends_with("</think>")) {
            (true, _) => Start::Thinking,
            (_, true) => Start::Content,
            _ if model.tokenizer.id("<think>").is_some() => Start::Either,
            _ => Start::Content,
        };
        let before = Before::new(&messages, &text);
        Ok(Prompt { tokens, start, before, messages, text })
    }

    /// The model's template, if it can render this.
    fn template<'a>(&self, model: &'a Model) -> Parsed<&'a ChatTemplate> {
        let Some(template) = &model.template else {
            let why = "this model has no chat template: use /v1/completions";
            return Err(Refusal::field("messages", why));
        };
        let offers = self.choice != Choice::Never && !self.tools.is_empty();
        let uses_tools =
            self.messages.iter().any(|m| m["role"] == "tool" || m.get("tool_calls").is_some());
        if template.call_format().is_none() && (offers || uses_tools) {
            return Err(Refusal::field("tools", "this model's chat template knows no tools"));
        }
        Ok(template)
    }

    fn render(
        &self,
        template: &ChatTemplate,
        messages: &[Json],
        generation_prompt: bool,
    ) -> flash_moe_engine::Result<String> {
        let tools: Vec<Json> = match self.choice {
            Choice::Never => Vec::new(),
            _ => self.tools.iter().map(OfferedTool::described).collect(),
        };
        let thinking = self.thinking.filter(|_| template.has_thinking_switch());
        template.render(&chat_template::Conversation {
            messages,
            tools: &tools,
            generation_prompt,
            thinking,
        })
    }

    /// Messages, text and tokens of a conversation that repeats answers which this server gave, as far as the
    /// template shows them whole.
    fn replayed(
        &self,
        model: &Model,
        template: &ChatTemplate,
    ) -> flash_moe_engine::Result<Option<Rendered>> {
        let turns = model.turns.matching(&self.messages);
        if turns.is_empty() {
            return Ok(None);
        }
        let mut messages = self.messages.clone();
        for (index, turn) in turns.iter().rev().filter(|(_, t)| !t.said.thinking.is_empty()) {
            messages[*index]["reasoning_content"] = json!(turn.said.thinking);
        }
        let text = self.render(template, &messages, true)?;
        let ends: Vec<String> = model.eos.iter().filter_map(|&t| model.tokenizer.name(t)).collect();
        let tokens = turns::splice(&text, &turns, &ends, &model.tokenizer)?;
        Ok(tokens.map(|tokens| Rendered { messages, text, tokens }))
    }

    /// Where in the prompt other requests may part from this one: behind the system prompt and the
    /// tools, and behind a user's last message, since a template may hide later what it opens now. A
    /// round of tool calls goes on from the answer before instead.
    fn marks(&self, model: &Model, prompt: &Prompt) -> flash_moe_engine::Result<Vec<Mark>> {
        let Some(template) = &model.template else { return Ok(Vec::new()) };
        let mut marks = Vec::new();
        let system = self.messages.iter().take_while(|m| m["role"] == "system").cloned();
        let nobody = json!({ "role": "user", "content": OTHER_USER });
        let other: Vec<Json> = system.chain([nobody]).collect();
        // A template that refuses these messages has no such place.
        if let Ok(other) = self.render(template, &other, true) {
            let other = model.tokenizer.encode(&other)?;
            let common = prompt.tokens.iter().zip(&other).take_while(|(a, b)| a == b).count();
            marks.push(Mark { position: common, place: Place::System });
        }
        if prompt.messages.last().is_none_or(|last| last["role"] != "user") {
            return Ok(marks);
        }
        let closed = self.render(template, &prompt.messages, false);
        let opening = closed.ok().and_then(|closed| prompt.text.strip_prefix(&closed));
        if let Some(opening) = opening {
            let opening = model.tokenizer.encode(opening)?;
            if prompt.tokens.ends_with(&opening) {
                let position = prompt.tokens.len() - opening.len();
                marks.push(Mark { position, place: Place::Prompt });
            }
        }
        Ok(marks)
    }

    /// The tools that a reply may call.
    fn callable(&self, model: &Model) -> Parsed<Option<Tools>> {
        let format = model.template.as_ref().and_then(|template| template.call_format());
        let offered: Vec<Tool> = match &self.choice {
            Choice::Never => Vec::new(),
            Choice::Auto | Choice::Any => self.tools.iter().map(OfferedTool::tool).collect(),
            Choice::Named(name) => {
                let named = self.tools.iter().filter(|tool| tool.name == *name);
                let named: Vec<Tool> = named.map(OfferedTool::tool).collect();
                if named.is_empty() {
                    let why = format!("{name:?} is not among the tools of this request");
                    return Err(Refusal::field("tool_choice", why));
                }
                named
            }
        };
        if offered.is_empty() && self.choice == Choice::Any {
            return Err(Refusal::field("tool_choice", "asks for a call, but there are no tools"));
        }
        let one = self.one_call || matches!(self.choice, Choice::Named(_));
        let calls_max = one.then_some(1);
        Ok(format.filter(|_| !offered.is_empty()).map(|format| Tools {
            format,
            offered,
            calls_max,
        }))
    }

    /// What the answer must look like.
    fn constraint(
        &self,
        model: &Model,
        tools: Option<&Tools>,
        start: Start,
    ) -> Parsed<Option<Constraint>> {
        let blank = start == Start::Thinking;
        let calls = tools.map(|tools| Calls {
            format: tools.format,
            tools: tools.offered.clone(),
            many: tools.calls_max.is_none(),
        });
        let must = matches!(self.choice, Choice::Any | Choice::Named(_));
        let (made, field) = match (&self.schema, &calls) {
            (_, Some(calls)) if must => (model.grammars.answer(None, Some(calls), blank), "tools"),
            (Some(schema), calls) => {
                (model.grammars.answer(Some(schema), calls.as_ref(), blank), "response_format")
            }
            (None, Some(calls)) if self.tools.iter().any(|tool| tool.strict) => {
                (model.grammars.begun_calls(calls), "tools")
            }
            _ => return Ok(None),
        };
        made.map(Some).map_err(|why| Refusal::field(field, why))
    }
}

impl Prepared {
    /// From a conversation.
    ///
    /// # Errors
    /// The template refuses, the prompt is too long, a setting is out of range, a schema is not
    /// supported.
    pub fn conversation(
        model: &Model,
        conversation: &Conversation,
        wishes: &Wishes,
        deadline: Option<Instant>,
    ) -> Parsed<Self> {
        let prompt = conversation.prompt(model)?;
        let tools = conversation.callable(model)?;
        let constraint = conversation.constraint(model, tools.as_ref(), prompt.start)?;
        let format = Format { start: prompt.start, stops: wishes.stops.clone(), tools };
        let marks = conversation.marks(model, &prompt);
        let mut marks = marks.map_err(|e| Refusal::field("messages", e.to_string()))?;
        if wishes.choices > 1 {
            marks.push(Mark { position: prompt.tokens.len(), place: Place::Prompt });
        }
        let before = Some(prompt.before);
        let prepared = Self::new(model, prompt.tokens, format, wishes, deadline)?;
        Ok(Self { constraint, before, ..prepared.with_marks(model, marks) })
    }

    /// From a prompt that is continued as it stands.
    ///
    /// # Errors
    /// The prompt is empty or too long, a setting is out of range.
    pub fn raw(
        model: &Model,
        prompt: Vec<TokenId>,
        wishes: &Wishes,
        deadline: Option<Instant>,
    ) -> Parsed<Self> {
        let format = Format { start: Start::Content, stops: wishes.stops.clone(), tools: None };
        let marks = vec![Mark { position: prompt.len(), place: Place::Prompt }];
        Ok(Self::new(model, prompt, format, wishes, deadline)?.with_marks(model, marks))
    }

    fn with_marks(mut self, model: &Model, marks: Vec<Mark>) -> Self {
        self.marks = positions(marks, model.prefix_every, self.prompt.len());
        self
    }

    fn new(
        model: &Model,
        prompt: Vec<TokenId>,
        format: Format,
        wishes: &Wishes,
        deadline: Option<Instant>,
    ) -> Parsed<Self> {
        let (tokens, context) = (prompt.len(), model.engine.context());
        if tokens == 0 {
            return Err(Refusal::field("prompt", "has no tokens"));
        }
        if tokens > context {
            let advice = "shorten it, or start with a larger --context";
            let why =
                format!("the prompt has {tokens} tokens, the context holds {context}; {advice}");
            return Err(Refusal::new(400, why));
        }
        let sampling = wishes.sampling.resolve(&model.config);
        let mut sampling = sampling.map_err(|e| Refusal::new(400, e.to_string()))?;
        sampling.logit_bias.clone_from(&wishes.logit_bias);
        sampling.check().map_err(|e| Refusal::new(400, e.to_string()))?;
        if wishes.stops.len() > STOPS_MAX {
            return Err(Refusal::field("stop", format!("has more than {STOPS_MAX} texts")));
        }
        if wishes.session.as_ref().is_some_and(|session| session.len() > SESSION_BYTES_MAX) {
            return Err(Refusal::field(
                "session_id",
                format!("is above {SESSION_BYTES_MAX} bytes"),
            ));
        }
        Ok(Self {
            prompt,
            marks: Vec::new(),
            before: None,
            sampling,
            limits: Limits {
                max_tokens: wishes.max_tokens,
                think_budget: wishes.think_budget.unwrap_or(model.think_budget),
                deadline,
                stop: None,
            },
            format,
            constraint: None,
            logprobs: wishes.logprobs,
            choices: wishes.choices,
        })
    }

    /// A job for each of its texts, numbered from `first` on. Each has a seed of its own.
    pub fn jobs(
        self,
        first: usize,
        events: &UnboundedSender<(usize, Event)>,
        origin: &Origin,
    ) -> Vec<Job> {
        let job = |choice: usize| {
            let mut sampling = self.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(choice as u64);
            Job {
                prompt: self.prompt.clone(),
                marks: self.marks.clone(),
                before: self.before,
                sampling,
                limits: self.limits.clone(),
                format: self.format.clone(),
                constraint: self.constraint.as_ref().map(Constraint::copy),
                logprobs: self.logprobs,
                index: first + choice,
                events: events.clone(),
                origin: origin.clone(),
            }
        };
        (0..self.choices).map(job).collect()
    }
}

/// Tokens of thinking that an effort stands for: whether to think, and the budget.
///
/// # Errors
/// Names the efforts there are.
pub fn effort(path: &str, effort: &str) -> Parsed<(bool, Option<usize>)> {
    Ok(match effort {
        "none" => (false, None),
        "minimal" => (true, Some(256)),
        "low" => (true, Some(1024)),
        "medium" => (true, Some(4096)),
        "high" => (true, Some(16384)),
        "xhigh" | "max" => (true, Some(0)),
        other => {
            let known = "none, minimal, low, medium, high, xhigh, max";
            return Err(Refusal::field(path, format!("{other:?} is none of {known}")));
        }
    })
}
