//! A switch of models that is under way, on a thread of its own.
//!
//! The memory holds one model at a time, so the one before is closed first, with its states written. Where
//! the other cannot be loaded, or cannot do what the chat needs, the one before is loaded again, and the
//! error is the only thing that has changed. Refuses to be waited for but by the end of the chat.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Error, Result};

use super::Backend;
use super::local::Local;
use crate::options::chat::ChatArgs;

/// A switch.
pub struct Switching {
    /// The name of the model that is to answer.
    pub name: String,
    pub since: Instant,
    steps: Receiver<Step>,
}

enum Step {
    /// The model before has written its states.
    Closed,
    Over(Box<Switched>),
}

/// How a switch ended.
pub struct Switched {
    pub backend: Backend,
    /// The flags with the new model, or why the one before answers on.
    pub outcome: Result<ChatArgs>,
}

impl Switching {
    /// Begins a switch.
    ///
    /// # Errors
    /// The system has no thread to give; `before` is lost with it.
    pub fn begin(before: Backend, args: ChatArgs, name: &str) -> Result<Self> {
        let (sender, steps) = channel();
        let own = name.to_string();
        thread::Builder::new()
            .name("switch".into())
            .spawn(move || {
                let switched = switched(before, args, &own, &sender);
                // The chat may have ended.
                sender.send(Step::Over(Box::new(switched))).unwrap_or(());
            })
            .context("the thread that loads a model")?;
        Ok(Self { name: name.into(), since: Instant::now(), steps })
    }

    /// How it ended, if it has.
    pub fn try_switched(&self) -> Option<Switched> {
        loop {
            match self.steps.try_recv() {
                Ok(Step::Closed) => {}
                Ok(Step::Over(switched)) => return Some(*switched),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(lost()),
            }
        }
    }

    /// How it ended, waited for.
    pub fn switched(self) -> Switched {
        loop {
            match self.steps.recv() {
                Ok(Step::Closed) => {}
                Ok(Step::Over(switched)) => return *switched,
                Err(_) => return lost(),
            }
        }
    }

    /// Gives it up, once the model before has written its states.
    pub fn abandon(self) {
        if let Ok(Step::Over(switched)) = self.steps.recv() {
            switched.backend.close();
        }
    }
}

fn lost() -> Switched {
    let why = Error::msg("the thread that loaded the model has failed; /model DIR loads one");
    Switched { backend: Backend::Nobody, outcome: Err(why) }
}

fn switched(before: Backend, args: ChatArgs, name: &str, steps: &Sender<Step>) -> Switched {
    if let Backend::Remote(mut remote) = before {
        let outcome = remote.switch(name).map(|()| args);
        return Switched { backend: Backend::Remote(remote), outcome };
    }
    let mut wanted = args.clone();
    wanted.engine.model = Some(name.into());
    // What can be seen to be none is seen before anything is closed.
    if let Err(why) = wanted.engine.open() {
        return Switched { backend: before, outcome: Err(why) };
    }
    before.close();
    // Nobody listens any more when the chat has ended.
    steps.send(Step::Closed).unwrap_or(());
    match opened(&wanted) {
        Ok(backend) => Switched { backend, outcome: Ok(wanted) },
        Err(why) => match opened(&args) {
            Ok(backend) => Switched { backend, outcome: Err(why) },
            Err(again) => {
                let why =
                    why.context(format!("the model before cannot be loaded again: {again:#}"));
                Switched { backend: Backend::Nobody, outcome: Err(why) }
            }
        },
    }
}

fn opened(args: &ChatArgs) -> Result<Backend> {
    let local = Local::open(args)?;
    if args.tools.are_on() {
        local.check_tools()?;
    }
    Ok(Backend::Local(Box::new(local)))
}
