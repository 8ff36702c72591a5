//! A model in this process, on the engine's own thread.
//!
//! The thread, the kept prefixes and the record of emitted tokens are those of the server, which this
//! is but for the connections. A question becomes the server's own job, so an answer here and there
//! is the same.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::{Done, Event, Gauges, Question, Tool};
use crate::chat::conversation::{Answer, Arguments, Conversation, Emitted, End, Message};
use crate::hot_set::HotSetFile;
use crate::options::chat::ChatArgs;
use crate::run::report::current_memory;
use crate::serve::api::request::{self, OfferedTool, Prepared, Wishes};
use crate::serve::metrics::Metrics;
use crate::serve::model::Model;
use crate::serve::prefix::{PrefixStore, WhenTaken};
use crate::serve::schedule::{self, Finish, Origin, Refused, Schedule};

/// How long the states of the model may take to be written when the chat ends.
const SAVING: Duration = Duration::from_secs(60);

/// The model and its thread.
pub struct Local {
    model: Arc<Model>,
    schedule: Schedule,
    hot_set: Option<HotSetFile>,
}

impl Local {
    /// Loads the model.
    ///
    /// # Errors
    /// What the container, the memory plan or the directory of states have to say.
    pub fn open(args: &ChatArgs) -> Result<Self> {
        let prefixes = args.prefixes();
        if let Some(dir) = &prefixes.state_dir {
            crate::chat::private::make_directory(dir)
                .with_context(|| format!("{} (--no-state keeps none)", dir.display()))?;
        }
        let model = Arc::new(Model::open(&args.engine, &args.answers(), &prefixes, 1)?);
        if model.template.is_none() {
            bail!("{} has no chat template; --chat-template FILE gives one", model.name);
        }
        let hot_set = args.hot_set.file(model.engine.container());
        hot_set.iter().for_each(|file| file.load(&model.engine));
        let metrics = Arc::new(Metrics::new());
        let prefixes = PrefixStore::open(&model, &metrics, &prefixes, WhenTaken::GoWithout)?;
        let schedule =
            Schedule::start(&model, &metrics, prefixes, 1, 1).context("the engine's thread")?;
        Ok(Self { model, schedule, hot_set })
    }

    pub fn name(&self) -> &str {
        &self.model.name
    }

    pub fn place(&self) -> String {
        let engine = &self.model.engine;
        let dir = engine.container().dir().display();
        format!("{dir}, in this process; context {} tokens\n{}", engine.context(), engine.budget())
    }

    /// Whether the template knows tools.
    ///
    /// # Errors
    /// It does not.
    pub fn check_tools(&self) -> Result<()> {
        let template = self.model.template.as_ref();
        match template.and_then(|template| template.call_format()) {
            Some(_) => Ok(()),
            None => bail!("{}: its chat template knows no tools; leave out --tools", self.name()),
        }
    }

    /// Makes a job of the question.
    ///
    /// # Errors
    /// What the template, the tokenizer or the settings have to say.
    pub fn ask(
        &self,
        question: &Question,
        stop: &Arc<AtomicBool>,
    ) -> Result<UnboundedReceiver<(usize, schedule::Event)>> {
        let Question { conversation, tools, settings } = question;
        let said = request::Conversation {
            messages: conversation.to_json(Arguments::Object),
            tools: tools.iter().map(offered).collect(),
            thinking: settings.thinking,
            ..request::Conversation::default()
        };
        let wishes = Wishes {
            sampling: settings.sampling.clone(),
            max_tokens: settings.max_tokens,
            think_budget: settings.think_budget,
            ..Wishes::default()
        };
        let prepared = Prepared::conversation(&self.model, &said, &wishes, None)
            .map_err(|refusal| anyhow!("{}", refusal.message))?;
        let origin =
            Origin { request: String::new(), api: "chat", session: None, received: Instant::now() };
        let (sender, receiver) = unbounded_channel();
        let mut jobs = prepared.jobs(0, &sender, &origin);
        jobs.iter_mut().for_each(|job| job.limits.stop = Some(Arc::clone(stop)));
        match self.schedule.submit(jobs) {
            Ok(()) => Ok(receiver),
            Err(Refused::Full) => bail!("the answer before has not ended yet; try again"),
            Err(Refused::Closed) => bail!("the engine's thread has ended; start the chat again"),
        }
    }

    pub fn emitted(&self, before: &Conversation, answer: &Answer) -> Option<Emitted> {
        let mut said = before.clone();
        let at = said.to_json(Arguments::Object).len();
        said.messages.push(Message::Assistant(answer.clone()));
        let found = self.model.turns.matching(&said.to_json(Arguments::Object));
        let (_, turn) = found.into_iter().find(|(index, _)| *index == at)?;
        Some(Emitted { model: self.identity(), turn })
    }

    pub fn recall(&self, conversation: &Conversation) {
        let own = self.identity();
        for message in &conversation.messages {
            let Message::Assistant(answer) = message else { continue };
            let emitted = answer.emitted.as_ref().filter(|emitted| emitted.model == own);
            emitted.iter().for_each(|emitted| self.model.turns.record(emitted.turn.clone()));
        }
    }

    pub fn gauges(&self) -> Gauges {
        let counters = self.model.engine.store().counters();
        Gauges {
            hits: counters.hits,
            misses: counters.misses,
            read_bytes: counters.read_bytes,
            memory_bytes: current_memory(),
            context: self.model.engine.context(),
        }
    }

    pub fn close(self) {
        self.schedule.drain(Instant::now() + SAVING);
        self.schedule.stop();
        self.hot_set.iter().for_each(|file| file.save(&self.model.engine));
    }

    fn identity(&self) -> String {
        format!("{:016x}", self.model.engine.container().identity())
    }
}

fn offered(tool: &Tool) -> OfferedTool {
    OfferedTool {
        name: tool.name.clone(),
        description: Some(tool.description.clone()),
        parameters: tool.parameters.clone(),
        strict: false,
    }
}

/// An event of the engine's thread.
pub fn event(event: schedule::Event) -> Event {
    match event {
        schedule::Event::Started(usage) => {
            Event::Prompt { done: usage.cached, cached: usage.cached, prompt: usage.prompt }
        }
        schedule::Event::Prefilled(done) => Event::Prompt { done, cached: 0, prompt: 0 },
        schedule::Event::Token { parts, .. } => Event::Token(parts),
        schedule::Event::Failed(failure) => Event::Failed(failure.message()),
        schedule::Event::Done(outcome) => Event::Done(Box::new(Done {
            end: match outcome.finish {
                Finish::Length => End::Length,
                Finish::Stopped => End::Stopped,
                _ => End::Stop,
            },
            prompt: Some(outcome.usage.prompt),
            cached: Some(outcome.usage.cached),
            generated: Some(outcome.usage.generated),
            first_token: outcome.times.first_token,
            decode: outcome.times.decode,
        })),
    }
}
