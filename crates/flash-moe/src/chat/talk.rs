//! One conversation under way: what is said is asked, heard, written down and taken back here.
//!
//! Owns the messages, the session file, the settings and the answer that is coming, and knows nothing
//! of how they look: the screen and the plain mode both stand on it. A question is on disk as soon as
//! it is asked. Whatever fails leaves the conversation as it was before the answer.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::reply::Part;

use super::backend::{Answering, Backend, Done, Event, Gauges, Question, Settings};
use super::conversation::{Answer, Call, Conversation, End, Message, fence_for};
use super::sessions::{Loaded, Record, SessionFile, Store};
use super::tools::{Tools, declined};
use crate::options::chat::ChatArgs;

/// Calls of one answer; a model that makes more has lost its way.
const CALLS_MAX: usize = 32;
/// Answers in a row that called nothing but tools that are not there.
const REFUSED_ANSWERS_MAX: usize = 8;
/// Largest file that `/read` takes, in bytes.
const READ_BYTES_MAX: u64 = 256 << 10;

/// A conversation and who answers.
pub struct Talk {
    pub args: ChatArgs,
    pub backend: Backend,
    pub settings: Settings,
    pub tools: Tools,
    pub conversation: Conversation,
    pub store: Store,
    pub session: SessionFile,
    pub last: Option<Figures>,
    files: Vec<(String, String)>, // name and text, for the next message
    pending: Option<Pending>,
    warned: HashSet<String>,
    notes: Vec<String>, // for the user, not yet shown
}

/// An answer that is coming.
pub struct Pending {
    answering: Answering,
    pub answer: Answer,
    pub started: Instant,
    pub prompt: Option<Prompt>,
    pub thinking: Option<Instant>, // since when it thinks
    pub thought: Duration,
    pub tokens: usize,
    pub first: Option<Instant>,
    begins: Option<Call>, // a call that is not whole
    pub before: Option<Gauges>,
    replaced: Vec<Message>, // what this answer takes the place of, once it is kept
}

/// How far the prompt is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Prompt {
    pub done: usize,
    pub cached: usize,
    pub all: usize,
    pub since: Instant,
}

/// What is heard of an answer, in the order in which it is to be shown.
#[derive(Clone, PartialEq, Debug)]
pub enum Heard {
    /// Something moved that only the status shows.
    Progress,
    Thinking(String),
    /// Thinking is over; it took so long.
    Thought(Duration),
    Content(String),
    /// A whole call.
    Call(Call),
    /// The answer is over and written down.
    Ended(End),
    /// It failed; what came of it is gone, and the question can be asked again.
    Failed(String),
    /// Another model answers from here on, or why it does not.
    Model(Result<String, String>),
}

/// What an answer took.
#[derive(Clone, PartialEq, Debug)]
pub struct Figures {
    pub done: Done,
    pub thought: Duration,
    pub gauges: Option<Gauges>,
    pub hit_rate: Option<f64>,
    pub read_bytes: Option<u64>,
    pub whole: Duration,
}

impl Talk {
    /// A new conversation, or the one that the flags resume.
    ///
    /// # Errors
    /// What the backend, the tools or the session have to say.
    pub fn open(args: ChatArgs, store: Store) -> Result<Self> {
        // What can be refused is refused before a model is loaded.
        let resumed =
            args.session.resume.as_ref().map(|wanted| store.open(wanted, "")).transpose()?;
        let tools = Tools::new(&args.tools)?;
        let backend = Backend::open(&args)?;
        if tools.are_on() {
            backend.check_tools()?;
        }
        let settings = Settings {
            sampling: args.sampling.clone(),
            thinking: args.thinking(),
            think_budget: args.answer.think_budget,
            max_tokens: args.answer.max_tokens,
        };
        let session = store.create(backend.model());
        let mut talk = Self {
            args,
            backend,
            settings,
            tools,
            conversation: Conversation::default(),
            store,
            session,
            last: None,
            files: Vec::new(),
            pending: None,
            warned: HashSet::new(),
            notes: Vec::new(),
        };
        match resumed {
            Some((session, loaded)) => talk.adopt(session, loaded),
            None => talk.start_anew()?,
        }
        if let Some(system) = talk.args.session.system.clone() {
            talk.set_system(Some(system));
        }
        Ok(talk)
    }

    /// The answer that is coming.
    pub fn pending(&self) -> Option<&Pending> {
        self.pending.as_ref()
    }

    /// Whether an answer is coming.
    pub fn is_answering(&self) -> bool {
        self.pending.is_some()
    }

    /// Whether nothing is under way: no answer, no call that has no result, no other model.
    ///
    /// # Errors
    /// Says what is, and what ends it.
    pub fn at_rest(&self) -> Result<()> {
        ensure!(!self.is_answering(), "an answer is coming; Ctrl-C stops it");
        let open = self.conversation.open_calls();
        ensure!(open.is_empty(), "a command waits or runs; Ctrl-C ends it");
        if let Some(switching) = self.backend.switching() {
            bail!("{} is loading; send this again when it has", switching.name);
        }
        Ok(())
    }

    /// What the user should know, once.
    pub fn take_notes(&mut self) -> Vec<String> {
        let mut notes = std::mem::take(&mut self.notes);
        notes.extend(self.tools.take_notes());
        notes
    }

    /// Files that go with the next message.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|(name, _)| name.as_str())
    }

    /// Adds a message and asks for an answer.
    ///
    /// # Errors
    /// The message cannot be asked; it is taken back, and the files go with the next one.
    pub fn say(&mut self, text: &str) -> Result<()> {
        self.at_rest()?;
        let content = self.with_files(text);
        let message = Message::User { content };
        self.conversation.messages.push(message.clone());
        match self.ask() {
            Ok(()) => {
                self.files.clear();
                // The session's file is for later runs; asking does not wait for it to be writable.
                self.record(Record::Message { message });
                Ok(())
            }
            Err(error) => {
                self.conversation.messages.pop();
                Err(error)
            }
        }
    }

    /// Adds the result of a tool.
    pub fn add_result(&mut self, id: &str, content: &str) {
        let message = Message::Tool { id: id.into(), content: content.into() };
        self.conversation.messages.push(message.clone());
        self.record(Record::Message { message });
    }

    /// Answers the calls that are open for a user who wants none of them; says whether there were any.
    pub fn decline_calls(&mut self) -> bool {
        let open = self.conversation.open_calls();
        open.iter().for_each(|call| self.add_result(&call.id, &declined()));
        !open.is_empty()
    }

    /// Asks for the answer to the results of tools.
    ///
    /// # Errors
    /// It cannot be asked for; the answers before called nothing but tools that are not there.
    pub fn go_on(&mut self) -> Result<()> {
        ensure!(
            self.refused_answers() < REFUSED_ANSWERS_MAX,
            "the model keeps calling tools that are not there; say something, or /retry lets it go on"
        );
        self.ask()
    }

    /// Answers since the last question, counted from the end, all of whose calls were refused.
    fn refused_answers(&self) -> usize {
        let is_refused = |call: &Call| self.tools.asked(call).is_err();
        let mut count = 0;
        for message in self.conversation.messages.iter().rev() {
            match message {
                Message::Tool { .. } => {}
                Message::Assistant(answer) if answer.calls.iter().all(is_refused) => count += 1,
                _ => break,
            }
        }
        count
    }

    /// Asks for the next answer.
    ///
    /// # Errors
    /// It cannot be asked for.
    pub fn ask(&mut self) -> Result<()> {
        ensure!(!self.is_answering(), "an answer is coming; Ctrl-C stops it");
        let tools = self.tools.described();
        let (conversation, settings) = (&self.conversation, &self.settings);
        let question = Question { conversation, tools: &tools, settings };
        let answering = self.backend.ask(&question)?;
        self.pending = Some(Pending {
            answering,
            answer: Answer::default(),
            started: Instant::now(),
            prompt: None,
            thinking: None,
            thought: Duration::ZERO,
            tokens: 0,
            first: None,
            begins: None,
            before: self.backend.gauges(),
            replaced: Vec::new(),
        });
        Ok(())
    }

    /// Asks for the last question's answer once more; what was answered is taken back when there is
    /// another answer. Results of tools that have no answer yet are answered, not asked for again.
    ///
    /// # Errors
    /// There is no question.
    pub fn retry(&mut self) -> Result<()> {
        self.at_rest()?;
        let question = self.conversation.before_last_question();
        let question = question.context("there is no question yet")?;
        if matches!(self.conversation.messages.last(), Some(Message::Tool { .. })) {
            return self.ask();
        }
        let replaced = self.conversation.messages.split_off(question + 1);
        match (self.ask(), &mut self.pending) {
            (Ok(()), Some(pending)) => pending.replaced = replaced,
            (failed, _) => {
                self.conversation.messages.extend(replaced);
                return failed;
            }
        }
        Ok(())
    }

    /// Takes the last question back with all that followed, and gives its text.
    ///
    /// # Errors
    /// There is no question, or its answer is coming.
    pub fn undo(&mut self) -> Result<String> {
        self.at_rest()?;
        let at = self.conversation.before_last_question().context("there is nothing to undo")?;
        let text = self.conversation.last_question().unwrap_or("").to_string();
        self.conversation.messages.truncate(at);
        self.record(Record::Cut { messages: at });
        Ok(text)
    }

    /// Asks the answer to end after the token at hand.
    pub fn stop(&mut self) {
        self.pending.iter().for_each(|pending| pending.answering.stop());
    }

    /// The switch that stops the answer that is coming, for whoever hears Ctrl-C.
    pub fn stopper(&self) -> Option<std::sync::Arc<std::sync::atomic::AtomicBool>> {
        self.pending.as_ref().map(|pending| pending.answering.stopper())
    }

    /// What has been heard since the last time; waits for none of it.
    pub fn hear(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        if let Some(outcome) = self.backend.try_switched() {
            heard.push(self.end_switch(outcome));
        }
        while let Some(event) = self.pending.as_mut().and_then(|p| p.answering.try_next()) {
            self.take(event, &mut heard);
        }
        heard
    }

    /// What is heard next, waited for; nothing if no answer is coming.
    pub fn hear_next(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        if let Some(event) = self.pending.as_mut().map(|pending| pending.answering.next()) {
            self.take(event, &mut heard);
        }
        heard
    }

    /// Begins to switch to another model, and does not wait for it.
    ///
    /// # Errors
    /// Something is under way.
    pub fn switch(&mut self, name: &str) -> Result<()> {
        self.at_rest()?;
        self.backend.switch(&self.args, name)
    }

    /// The end of a switch, waited for; nothing if there is none.
    pub fn hear_switched(&mut self) -> Option<Heard> {
        let outcome = self.backend.switched()?;
        Some(self.end_switch(outcome))
    }

    fn end_switch(&mut self, outcome: Result<ChatArgs>) -> Heard {
        self.backend.recall(&self.conversation);
        let model = self.backend.model();
        Heard::Model(match outcome {
            Ok(args) => {
                self.args = args;
                Ok(format!("{model} answers from here on"))
            }
            Err(why) => Err(format!("{why:#}; {model} answers on")),
        })
    }

    /// Waits so long for an answer that was stopped to end, so that it is kept.
    pub fn settle(&mut self, patience: Duration) {
        let started = Instant::now();
        self.stop();
        while self.is_answering() && started.elapsed() < patience {
            self.hear();
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn take(&mut self, event: Event, heard: &mut Vec<Heard>) {
        let Some(pending) = &mut self.pending else { return };
        match event {
            Event::Prompt { done, cached, prompt } => {
                pending.progress(done, cached, prompt);
                heard.push(Heard::Progress);
            }
            Event::Token(parts) => {
                pending.tokens += 1;
                pending.first.get_or_insert_with(Instant::now);
                let id = format!("call_{}", self.conversation.messages.len());
                parts.into_iter().for_each(|part| pending.part(part, &id, heard));
                if pending.answer.calls.len() > CALLS_MAX {
                    self.fail(
                        &format!("the model makes more than {CALLS_MAX} calls at once"),
                        heard,
                    );
                }
            }
            Event::Done(done) => self.end(*done, heard),
            Event::Failed(why) => self.fail(&why, heard),
        }
    }

    /// Gives the answer up; what it was to take the place of stays.
    fn fail(&mut self, why: &str, heard: &mut Vec<Heard>) {
        let Some(pending) = self.pending.take() else { return };
        let stays = if pending.replaced.is_empty() { "" } else { "; the answer before stays" };
        self.conversation.messages.extend(pending.replaced);
        heard.push(Heard::Failed(format!("{why}{stays}; /retry asks again")));
    }

    /// Writes the answer down.
    fn end(&mut self, done: Done, heard: &mut Vec<Heard>) {
        let Some(mut pending) = self.pending.take() else { return };
        pending.end_thinking(heard);
        let mut answer = pending.answer;
        answer.end = done.end;
        // A call of a text that was stopped or cut off is not to be run.
        if done.end != End::Stop {
            answer.calls.clear();
        }
        answer.emitted = self.backend.emitted(&self.conversation, &answer);
        let gauges = self.backend.gauges();
        let spent = gauges.zip(pending.before);
        self.last = Some(Figures {
            thought: pending.thought,
            whole: pending.started.elapsed(),
            gauges,
            hit_rate: spent.and_then(|(now, then)| hit_rate(&now, &then)),
            read_bytes: spent.map(|(now, then)| now.read_bytes.saturating_sub(then.read_bytes)),
            done,
        });
        let end = answer.end;
        let calls = answer.calls.clone();
        let is_empty = answer.content.is_empty() && answer.thinking.is_empty() && calls.is_empty();
        if is_empty && end != End::Stop {
            self.conversation.messages.extend(pending.replaced);
        } else {
            if !pending.replaced.is_empty() {
                self.record(Record::Cut { messages: self.conversation.messages.len() });
            }
            let message = Message::Assistant(answer);
            self.conversation.messages.push(message.clone());
            self.record(Record::Message { message });
        }
        heard.extend(calls.into_iter().map(Heard::Call));
        heard.push(Heard::Ended(end));
    }

    /// Sets or removes the system prompt.
    pub fn set_system(&mut self, system: Option<String>) {
        if self.conversation.system == system {
            return;
        }
        self.conversation.system.clone_from(&system);
        // A conversation that nothing was said in is not worth a file.
        if self.session.has_begun() {
            self.record(Record::System { text: system });
        }
    }

    /// Begins a conversation with nothing in it but the system prompt.
    ///
    /// # Errors
    /// Something is under way.
    pub fn start_anew(&mut self) -> Result<()> {
        self.at_rest()?;
        self.session = self.store.create(self.backend.model());
        self.conversation.messages.clear();
        self.files.clear();
        self.last = None;
        Ok(())
    }

    /// Goes on with an earlier conversation; without a name the latest but this one.
    ///
    /// # Errors
    /// Something is under way. See [`Store::open`].
    pub fn resume(&mut self, wanted: &str) -> Result<()> {
        self.at_rest()?;
        let (session, loaded) = self.store.open(wanted, self.session.id())?;
        self.adopt(session, loaded);
        Ok(())
    }

    fn adopt(&mut self, session: SessionFile, loaded: Loaded) {
        if loaded.was_cut_off {
            self.notes.push("the last line of the session was cut off and is dropped".into());
        }
        if loaded.model != self.backend.model() {
            let note = format!("this conversation was with {}", loaded.model);
            self.notes.push(note);
        }
        self.session = session;
        self.conversation = loaded.conversation;
        self.files.clear();
        self.last = None;
        self.backend.recall(&self.conversation);
    }

    /// Names the session.
    ///
    /// # Errors
    /// Nothing was said yet; the file cannot be written.
    pub fn name(&mut self, name: &str) -> Result<()> {
        ensure!(self.session.has_begun(), "nothing was said yet that could be kept");
        self.session.append(&Record::Name { name: name.into() })
    }

    /// Takes a file along with the next message.
    ///
    /// # Errors
    /// It cannot be read, is too large, or is not text.
    pub fn attach(&mut self, path: &Path) -> Result<usize> {
        let named = || path.display().to_string();
        let data = std::fs::metadata(path).with_context(named)?;
        ensure!(data.is_file(), "{}: is no file", path.display());
        if data.len() > READ_BYTES_MAX {
            bail!("{}: has {} bytes, the most is {READ_BYTES_MAX}", path.display(), data.len());
        }
        let bytes = std::fs::read(path).with_context(named)?;
        let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
        let text = text.with_context(|| format!("{}: is not UTF-8 text", path.display()))?;
        let bytes = text.len();
        self.files.push((named(), text));
        Ok(bytes)
    }

    fn with_files(&self, text: &str) -> String {
        let mut content = String::new();
        for (name, file) in &self.files {
            let fence = fence_for(file);
            content += &format!("{name}:\n{fence}\n{}\n{fence}\n\n", file.trim_end_matches('\n'));
        }
        content + text
    }

    /// Writes a line of the session. Where that fails the user is told once, and the talk goes on.
    fn record(&mut self, record: Record) {
        let is_first = !self.session.has_begun();
        let system = self.conversation.system.clone().filter(|_| is_first);
        let system = system.map(|text| Record::System { text: Some(text) });
        for record in system.into_iter().chain([record]) {
            if let Err(error) = self.session.append(&record) {
                let note = format!("this conversation is not kept: {error:#}");
                if self.warned.insert(note.clone()) {
                    self.notes.push(note);
                }
            }
        }
    }
}

impl Pending {
    fn progress(&mut self, done: usize, cached: usize, all: usize) {
        match &mut self.prompt {
            Some(prompt) => {
                prompt.done = done;
                prompt.all = prompt.all.max(all);
            }
            None => self.prompt = Some(Prompt { done, cached, all, since: Instant::now() }),
        }
    }

    fn part(&mut self, part: Part, id: &str, heard: &mut Vec<Heard>) {
        if !matches!(part, Part::Thinking(_)) {
            self.end_thinking(heard);
        }
        match part {
            Part::Thinking(text) => {
                self.thinking.get_or_insert_with(Instant::now);
                self.answer.thinking += &text;
                heard.push(Heard::Thinking(text));
            }
            Part::Content(text) => {
                self.answer.content += &text;
                heard.push(Heard::Content(text));
            }
            Part::CallBegins(name) => {
                let id = format!("{id}_{}", self.answer.calls.len());
                self.begins = Some(Call { id, name, arguments: String::new() });
            }
            Part::Arguments(text) => {
                self.begins.iter_mut().for_each(|call| call.arguments += &text);
            }
            Part::CallEnds => self.answer.calls.extend(self.begins.take()),
            Part::Broken(text) => {
                self.begins = None;
                self.answer.content += &text;
                heard.push(Heard::Content(text));
            }
        }
    }

    fn end_thinking(&mut self, heard: &mut Vec<Heard>) {
        if let Some(since) = self.thinking.take() {
            self.thought += since.elapsed();
            heard.push(Heard::Thought(self.thought));
        }
    }
}

impl Figures {
    /// Tokens a second between the first token and the last.
    pub fn speed(&self) -> Option<f64> {
        let tokens = self.done.generated?.checked_sub(1).filter(|tokens| *tokens > 0)?;
        let seconds = self.done.decode.as_secs_f64();
        (seconds > 0.0).then(|| tokens as f64 / seconds)
    }

    /// Bytes a second that were read from the disk during the whole answer.
    pub fn read_rate(&self) -> Option<f64> {
        let seconds = self.whole.as_secs_f64();
        self.read_bytes.filter(|_| seconds > 0.0).map(|bytes| bytes as f64 / seconds)
    }
}

fn hit_rate(now: &Gauges, then: &Gauges) -> Option<f64> {
    let hits = now.hits.checked_sub(then.hits)?;
    let all = hits + now.misses.checked_sub(then.misses)?;
    (all > 0).then(|| hits as f64 / all as f64)
}

#[cfg(test)]
impl Talk {
    /// One that nobody answers, with its files below a directory.
    pub fn with_nobody(dir: &Path, flags: &[&str]) -> Self {
        use crate::options::{Command, Options};
        let line = ["flash-moe", "chat"].iter().chain(flags);
        let parsed = <Options as clap::Parser>::try_parse_from(line).unwrap();
        let Command::Chat(args) = parsed.command else { unreachable!("the line says chat") };
        let store = Store::new(dir.join("sessions"));
        let settings = Settings {
            sampling: args.sampling.clone(),
            thinking: None,
            think_budget: None,
            max_tokens: None,
        };
        Self {
            tools: Tools::new(&args.tools).unwrap(),
            args: *args,
            backend: Backend::Nobody,
            settings,
            conversation: Conversation::default(),
            session: store.create("nobody"),
            store,
            last: None,
            files: Vec::new(),
            pending: None,
            warned: HashSet::new(),
            notes: Vec::new(),
        }
    }
}
