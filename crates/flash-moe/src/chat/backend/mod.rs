//! Who answers: a model in this process, or a server.
//!
//! Both take a question and give the same events, read without waiting or one by one. An answer is
//! stopped by its own switch and ends within one token; dropping it gives it up. What either cannot do
//! it says in words, so that the conversation goes on.

mod local;
mod remote;
mod switch;
mod tls;
mod url;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use flash_moe_engine::reply::Part;
use serde_json::Value as Json;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::mpsc::error::TryRecvError;

use super::conversation::{Answer, Conversation, Emitted, End};
use crate::options::chat::ChatArgs;
use crate::options::run::SamplingArgs;
use crate::serve::schedule;
use local::Local;
use remote::Remote;
use switch::{Switched, Switching};

/// Who answers.
pub enum Backend {
    Local(Box<Local>),
    Remote(Remote),
    /// Nobody yet: another model is being loaded.
    Switching(Switching),
    /// Nobody: a switch of models failed, and the model before is gone.
    Nobody,
}

/// How to answer.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    pub sampling: SamplingArgs,
    /// Whether to think first; `None` leaves it to the model.
    pub thinking: Option<bool>,
    /// Tokens after which thinking is ended; 0: never.
    pub think_budget: Option<usize>,
    /// Most tokens; `None`: what the context holds.
    pub max_tokens: Option<usize>,
}

/// What is asked.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    pub conversation: &'a Conversation,
    pub tools: &'a [Tool],
    pub settings: &'a Settings,
}

/// A tool that the model may call.
#[derive(Clone, PartialEq, Debug)]
pub struct Tool {
    pub name: String,
    pub description: String,
    /// JSON schema of its arguments.
    pub parameters: Json,
}

/// What is heard of an answer.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// So many tokens of the prompt of `prompt` are known, of which `cached` were from before.
    Prompt { done: usize, cached: usize, prompt: usize },
    /// A token, and the pieces of text that it settled.
    Token(Vec<Part>),
    /// It is over.
    Done(Box<Done>),
    /// It could not be finished.
    Failed(String),
}

/// How an answer ended.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Done {
    pub end: End,
    /// Tokens of the prompt, of them not computed again, and of the answer, where known.
    pub prompt: Option<usize>,
    pub cached: Option<usize>,
    pub generated: Option<usize>,
    /// From the question to the first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

impl Done {
    /// Tokens of the context, where known. A server may say any number.
    pub fn context(&self) -> Option<usize> {
        Some(self.prompt?.saturating_add(self.generated.unwrap_or(0)))
    }
}

/// What the engine of this process has done and takes.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Gauges {
    pub hits: u64,
    pub misses: u64,
    pub read_bytes: u64,
    /// Memory of the process, where the system says.
    pub memory_bytes: Option<u64>,
    /// Tokens that the context holds.
    pub context: usize,
}

/// An answer that is coming.
pub struct Answering {
    source: Source,
    stop: Arc<AtomicBool>,
}

enum Source {
    Local(UnboundedReceiver<(usize, schedule::Event)>),
    Remote(UnboundedReceiver<Event>),
}

impl Backend {
    /// The one that the flags name.
    ///
    /// # Errors
    /// What the model, the memory plan or the address have to say.
    pub fn open(args: &ChatArgs) -> Result<Self> {
        match &args.server.connect {
            Some(address) => {
                let model = args.engine.model.as_ref().map(|name| name.display().to_string());
                Ok(Self::Remote(Remote::open(address, args.server.key()?, model)?))
            }
            None => Ok(Self::Local(Box::new(Local::open(args)?))),
        }
    }

    /// The name of the model.
    pub fn model(&self) -> &str {
        match self {
            Self::Local(local) => local.name(),
            Self::Remote(remote) => remote.model(),
            Self::Switching(switching) => &switching.name,
            Self::Nobody => "no model",
        }
    }

    /// Where it is, for people.
    pub fn place(&self) -> String {
        match self {
            Self::Local(local) => local.place(),
            Self::Remote(remote) => remote.place(),
            Self::Switching(_) => "it is loading".into(),
            Self::Nobody => String::new(),
        }
    }

    /// Whether the model can call tools; a server is believed to.
    ///
    /// # Errors
    /// Says why it cannot.
    pub fn check_tools(&self) -> Result<()> {
        match self {
            Self::Local(local) => local.check_tools(),
            Self::Remote(_) | Self::Switching(_) | Self::Nobody => Ok(()),
        }
    }

    /// Begins to answer.
    ///
    /// # Errors
    /// The question cannot be answered: it is too long, the template refuses, a setting is out of its
    /// range.
    pub fn ask(&self, question: &Question) -> Result<Answering> {
        let stop = Arc::new(AtomicBool::new(false));
        let source = match self {
            Self::Local(local) => Source::Local(local.ask(question, &stop)?),
            Self::Remote(remote) => Source::Remote(remote.ask(question, &stop)),
            Self::Switching(switching) => {
                bail!("{} is loading; send this again when it has", switching.name)
            }
            Self::Nobody => bail!("no model is loaded; /model DIR loads one"),
        };
        Ok(Answering { source, stop })
    }

    /// The tokens behind an answer that was just given, for a later run.
    pub fn emitted(&self, before: &Conversation, answer: &Answer) -> Option<Emitted> {
        match self {
            Self::Local(local) => local.emitted(before, answer),
            Self::Remote(_) | Self::Switching(_) | Self::Nobody => None,
        }
    }

    /// Takes the tokens of answers that an earlier run gave.
    pub fn recall(&self, conversation: &Conversation) {
        if let Self::Local(local) = self {
            local.recall(conversation);
        }
    }

    /// Begins to switch to another model, and does not wait for it.
    ///
    /// # Errors
    /// A switch is under way, or the system has no thread to give.
    pub fn switch(&mut self, args: &ChatArgs, name: &str) -> Result<()> {
        ensure!(self.switching().is_none(), "{} is loading", self.model());
        let before = std::mem::replace(self, Self::Nobody);
        *self = Self::Switching(Switching::begin(before, args.clone(), name)?);
        Ok(())
    }

    /// The switch that is under way.
    pub fn switching(&self) -> Option<&Switching> {
        match self {
            Self::Switching(switching) => Some(switching),
            _ => None,
        }
    }

    /// The end of a switch, once, if there is one already: the new flags, or why nothing has changed.
    pub fn try_switched(&mut self) -> Option<Result<ChatArgs>> {
        let Switched { backend, outcome } = self.switching()?.try_switched()?;
        *self = backend;
        Some(outcome)
    }

    /// The end of a switch, waited for.
    pub fn switched(&mut self) -> Option<Result<ChatArgs>> {
        self.switching()?;
        let Self::Switching(switching) = std::mem::replace(self, Self::Nobody) else { return None };
        let Switched { backend, outcome } = switching.switched();
        *self = backend;
        Some(outcome)
    }

    /// What it has done and takes, where that is known.
    pub fn gauges(&self) -> Option<Gauges> {
        match self {
            Self::Local(local) => Some(local.gauges()),
            Self::Remote(_) | Self::Switching(_) | Self::Nobody => None,
        }
    }

    /// Ends, keeping what the next run goes on from.
    pub fn close(self) {
        match self {
            Self::Local(local) => local.close(),
            Self::Switching(switching) => switching.abandon(),
            Self::Remote(_) | Self::Nobody => {}
        }
    }
}

impl Answering {
    /// The next event, if there is one already.
    pub fn try_next(&mut self) -> Option<Event> {
        let got = match &mut self.source {
            Source::Local(events) => events.try_recv().map(|(_, event)| local::event(event)),
            Source::Remote(events) => events.try_recv(),
        };
        match got {
            Ok(event) => Some(event),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(ended_early()),
        }
    }

    /// The next event, waited for.
    pub fn next(&mut self) -> Event {
        let got = match &mut self.source {
            Source::Local(events) => events.blocking_recv().map(|(_, event)| local::event(event)),
            Source::Remote(events) => events.blocking_recv(),
        };
        got.unwrap_or_else(ended_early)
    }

    /// Asks for an end after the token at hand.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The switch that asks for an end.
    pub fn stopper(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }
}

fn ended_early() -> Event {
    Event::Failed("whoever answered has ended".into())
}
