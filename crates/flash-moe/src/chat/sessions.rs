//! Conversations on disk: one file of JSON lines each, written as things happen.
//!
//! A line is appended by one write when it is known, a question as it is asked, so a process
//! that is killed loses at most the answer that was coming. Lines that a full disk did not take are
//! written with the next one. A last line that is cut off is dropped; any other line that does not read
//! is an error that names it. A session is open in one process at a time. Refuses to guess which
//! session is meant.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, anyhow, bail, ensure};
use flash_moe_engine::chat_template::clock::strftime;
use serde::{Deserialize, Serialize};

use super::conversation::{Conversation, Message};
use super::private;

/// Version of the lines that this build writes and reads.
const VERSION: u32 = 1;
const ENDING: &str = "jsonl";

/// A line.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// The first one.
    Session { version: u32, id: String, model: String },
    /// The system prompt from here on.
    System { text: Option<String> },
    /// One more message.
    Message { message: Message },
    /// Only so many messages are left.
    Cut { messages: usize },
    /// The user's name for it.
    Name { name: String },
}

/// The directory of the sessions.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// What a list shows of a session.
#[derive(Clone, PartialEq, Debug)]
pub struct Summary {
    pub id: String,
    pub title: String,
    pub model: String,
    pub messages: usize,
    pub changed: SystemTime,
    /// Why it cannot be read, where that is so.
    pub damage: Option<String>,
}

/// A session that is read.
#[derive(Default, Debug)]
pub struct Loaded {
    pub conversation: Conversation,
    pub model: String,
    pub name: Option<String>,
    /// Bytes that were whole lines.
    whole: u64,
    /// Whether the last line was cut off.
    pub was_cut_off: bool,
}

/// A session that is written to. Its file is made with the first message.
#[derive(Debug)]
pub struct SessionFile {
    id: String,
    path: PathBuf,
    model: String,
    file: Option<File>,
    whole: u64,   // bytes of lines that are on disk
    held: String, // lines that are not
}

impl Store {
    /// Sessions below a directory, which need not be there.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// A session with nothing in it.
    pub fn create(&self, model: &str) -> SessionFile {
        let now = strftime("%Y%m%d-%H%M%S", SystemTime::now());
        let now = now.unwrap_or_else(|_| "session".into());
        let id = format!("{now}-{:04x}", random());
        let (path, model) = (self.path(&id), model.into());
        SessionFile { path, id, model, file: None, whole: 0, held: String::new() }
    }

    /// Opens the session that `wanted` names: its id, the beginning of one, its name, or nothing
    /// for the latest. `own` is the id of the session that is open here and cannot be meant; empty
    /// where there is none.
    ///
    /// # Errors
    /// There is none, or more than one; it is open elsewhere, or here; it is damaged.
    pub fn open(&self, wanted: &str, own: &str) -> Result<(SessionFile, Loaded)> {
        let id = self.find(wanted, own)?;
        ensure!(id != own, "session {id} is this conversation");
        let path = self.path(&id);
        let named = || path.display().to_string();
        let file = private::open(&path).with_context(named)?;
        lock(&file, &id)?;
        let loaded = load(&path)?;
        if loaded.was_cut_off {
            file.set_len(loaded.whole).with_context(named)?;
        }
        let (model, whole) = (loaded.model.clone(), loaded.whole);
        let file = Some(file);
        Ok((SessionFile { id, path, model, file, whole, held: String::new() }, loaded))
    }

    /// All sessions, the latest first. One that does not read says why.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn list(&self) -> Result<Vec<Summary>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| self.dir.display().to_string())?,
        };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let paths = paths.filter(|path| path.extension().is_some_and(|ending| ending == ENDING));
        let mut all: Vec<Summary> = paths.filter_map(|path| summary(&path)).collect();
        all.sort_by(|a, b| (b.changed, &b.id).cmp(&(a.changed, &a.id)));
        Ok(all)
    }

    fn find(&self, wanted: &str, own: &str) -> Result<String> {
        let all = self.list()?;
        let is_readable = |s: &&Summary| s.damage.is_none();
        if wanted.is_empty() {
            let latest = all.iter().filter(is_readable).find(|s| s.id != own);
            let others = if own.is_empty() { "" } else { "other " };
            return latest.map(|s| s.id.clone()).with_context(|| {
                format!("there are no {others}sessions in {}", self.dir.display())
            });
        }
        let is_exact = |s: &&Summary| s.id == wanted || (is_readable(s) && s.title == wanted);
        if let Some(exact) = all.iter().find(is_exact) {
            return Ok(exact.id.clone());
        }
        let found: Vec<&Summary> = all.iter().filter(|s| s.id.starts_with(wanted)).collect();
        match found.as_slice() {
            [one] => Ok(one.id.clone()),
            [] => bail!("no session is called {wanted:?}; --sessions and /sessions list them"),
            several => {
                bail!("{wanted:?} is the beginning of {} sessions; give more", several.len())
            }
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.{ENDING}"))
    }
}

impl SessionFile {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether anything has been written.
    pub fn is_on_disk(&self) -> bool {
        self.whole > 0
    }

    /// Whether there is anything that is written, or would be if the disk took it.
    pub fn has_begun(&self) -> bool {
        self.is_on_disk() || !self.held.is_empty()
    }

    /// Writes a line; makes the file where there is none.
    ///
    /// # Errors
    /// The place cannot be written, and the line is held for the next call; the session is open
    /// elsewhere.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let was_refused = !self.held.is_empty();
        if !self.has_begun() {
            let (id, model) = (self.id.clone(), self.model.clone());
            self.held += &line(&Record::Session { version: VERSION, id, model })?;
        }
        self.held += &line(record)?;
        self.write(was_refused).with_context(|| self.path.display().to_string())
    }

    /// Writes the lines that are held, after what of them is there from an attempt that failed.
    fn write(&mut self, was_refused: bool) -> Result<()> {
        if self.file.is_none() {
            let file = private::open(&self.path)?;
            lock(&file, &self.id)?;
            self.file = Some(file);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        if was_refused {
            file.set_len(self.whole)?;
        }
        let written = file.write_all(self.held.as_bytes());
        match &written {
            Ok(()) => {
                self.whole += self.held.len() as u64;
                self.held.clear();
            }
            // Half a line would spoil the next one; the next call tries again where this fails.
            Err(_) => file.set_len(self.whole).unwrap_or(()),
        }
        Ok(written?)
    }
}

impl Drop for SessionFile {
    fn drop(&mut self) {
        // A file that the disk took nothing of is no session.
        if self.file.is_some() && self.whole == 0 {
            fs::remove_file(&self.path).unwrap_or(());
        }
    }
}

fn line(record: &Record) -> Result<String> {
    Ok(serde_json::to_string(record)? + "\n")
}

fn lock(file: &File, id: &str) -> Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => bail!("session {id} is open, in this chat or another"),
        // A file system without locks takes the risk.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

fn summary(path: &Path) -> Option<Summary> {
    let changed = fs::metadata(path).and_then(|data| data.modified()).ok()?;
    let (loaded, damage) = match load(path) {
        Ok(loaded) => (loaded, None),
        Err(error) => (Loaded::default(), Some(format!("{error:#}"))),
    };
    Some(Summary {
        id: path.file_stem()?.to_str()?.into(),
        damage,
        title: loaded.name.unwrap_or_else(|| loaded.conversation.title()),
        model: loaded.model,
        messages: loaded.conversation.messages.len(),
        changed,
    })
}

/// Reads a file whole.
fn load(path: &Path) -> Result<Loaded> {
    let named = || path.display().to_string();
    let bytes = fs::read(path).with_context(named)?;
    let mut loaded = Loaded::default();
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').zip(1..).peekable();
    while let Some((bytes, number)) = lines.next() {
        if !bytes.ends_with(b"\n") && lines.peek().is_none() {
            loaded.was_cut_off = true;
            break;
        }
        let record = serde_json::from_slice(bytes)
            .map_err(|error| anyhow!("{}: line {number}: {error}", path.display()))?;
        loaded.take(record).with_context(|| format!("{}: line {number}", path.display()))?;
        loaded.whole += bytes.len() as u64;
    }
    ensure!(loaded.whole > 0, "{}: is no session: it is empty", path.display());
    Ok(loaded)
}

impl Loaded {
    fn take(&mut self, record: Record) -> Result<()> {
        if self.whole == 0 && !matches!(record, Record::Session { .. }) {
            bail!("is no session: its first line is another one");
        }
        let messages = &mut self.conversation.messages;
        match record {
            Record::Session { version, model, .. } => {
                ensure!(version == VERSION, "version {version}, this build reads {VERSION}");
                self.model = model;
            }
            Record::System { text } => self.conversation.system = text,
            Record::Message { message } => messages.push(message),
            Record::Cut { messages: left } => messages.truncate(left),
            Record::Name { name } => self.name = Some(name),
        }
        Ok(())
    }
}

/// Tells the sessions of one second apart.
fn random() -> u16 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(()) as u16
}

#[cfg(test)]
mod tests {
    use super::super::conversation::{Answer, End};
    use super::*;

    fn said(content: &str) -> Record {
        Record::Message { message: Message::User { content: content.into() } }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().join("made/on demand"));
        (dir, store)
    }

    fn contents(loaded: &Loaded) -> Vec<String> {
        let text = |message: &Message| match message {
            Message::User { content } => content.clone(),
            Message::Assistant(answer) => format!("< {}", answer.content),
            Message::Tool { content, .. } => format!("= {content}"),
        };
        loaded.conversation.messages.iter().map(text).collect()
    }

    #[test]
    fn what_was_written_is_read_back_with_cuts_and_names() {
        let (_dir, store) = store();
        let mut session = store.create("tiny");
        let id = session.id().to_string();
        assert!(!session.is_on_disk() && store.list().unwrap().is_empty());
        let answer = Answer { content: "two".into(), end: End::Stopped, ..Answer::default() };
        session.append(&said("one")).unwrap();
        session.append(&Record::Message { message: Message::Assistant(answer) }).unwrap();
        session.append(&said("three")).unwrap();
        session.append(&Record::Cut { messages: 2 }).unwrap();
        session.append(&Record::System { text: Some("s".into()) }).unwrap();
        session.append(&Record::Name { name: "a name".into() }).unwrap();
        drop(session);
        let (_, loaded) = store.open(&id[..10], "").unwrap();
        assert_eq!(contents(&loaded), ["one", "< two"]);
        assert_eq!(loaded.conversation.system.as_deref(), Some("s"));
        let listed = store.list().unwrap();
        assert_eq!((listed[0].title.as_str(), listed[0].messages), ("a name", 2));
        assert_eq!(store.find("a name", "").unwrap(), id);
    }

    #[test]
    fn a_line_that_was_cut_off_is_dropped_and_written_over() {
        let (_dir, store) = store();
        let mut session = store.create("tiny");
        session.append(&said("one")).unwrap();
        let path = session.path.clone();
        drop(session);
        let whole = fs::read(&path).unwrap();
        for cut in [&b"{\"kind\":\"mess"[..], b"{", b"\xff"] {
            fs::write(&path, [&whole[..], cut].concat()).unwrap();
            let (mut session, loaded) = store.open("", "").unwrap();
            assert!(loaded.was_cut_off);
            assert_eq!(contents(&loaded), ["one"]);
            session.append(&said("two")).unwrap();
            drop(session);
            let (_, again) = store.open("", "").unwrap();
            assert_eq!(
                (contents(&again), again.was_cut_off),
                (vec!["one".into(), "two".into()], false)
            );
        }
    }

    #[test]
    fn a_damaged_line_is_named() {
        let (_dir, store) = store();
        let mut session = store.create("tiny");
        session.append(&said("one")).unwrap();
        let text =
            fs::read_to_string(&session.path).unwrap() + "rubbish\n" + &line(&said("x")).unwrap();
        let (id, path) = (session.id().to_string(), session.path.clone());
        drop(session);
        for (text, why) in [
            (text.as_str(), "line 3"),
            ("{\"kind\":\"cut\",\"messages\":0}\n", "is no session"),
            ("{\"kind\":\"session\",\"version\":9,\"id\":\"\",\"model\":\"\"}\n", "version 9"),
        ] {
            fs::write(&path, text).unwrap();
            for wanted in [id.as_str(), &id[..12]] {
                let error = format!("{:#}", store.open(wanted, "").unwrap_err());
                assert!(error.contains(why) && error.contains(&id), "{error}");
            }
            let listed = store.list().unwrap();
            assert!(listed[0].damage.as_ref().is_some_and(|damage| damage.contains(why)));
            assert!(store.open("", "").unwrap_err().to_string().contains("no sessions"));
        }
    }

    #[test]
    fn a_disk_that_was_full_loses_nothing() {
        let (_dir, store) = store();
        for lines_before in [0, 1] {
            let mut session = store.create("tiny");
            let (id, path) = (session.id().to_string(), session.path.clone());
            for _ in 0..lines_before {
                session.append(&said("one")).unwrap();
            }
            private::open(&path).unwrap();
            let writable = session.file.replace(File::open(&path).unwrap());
            let refused = if lines_before == 0 { "one" } else { "two" };
            session.append(&said(refused)).unwrap_err();
            assert_eq!(session.is_on_disk(), lines_before == 1);
            // As a short write leaves it.
            private::append(&path, b"{\"kind\":\"mess").unwrap();
            session.file = writable;
            session.append(&said("three")).unwrap();
            session.append(&said("four")).unwrap();
            drop(session);
            let (_, loaded) = store.open(&id, "").unwrap();
            let expected = ["one", "two", "three", "four"];
            let expected = expected.iter().filter(|&&text| lines_before == 1 || text != "two");
            assert!(contents(&loaded).iter().eq(expected), "{loaded:?}");
            assert!(!loaded.was_cut_off);
        }
    }

    #[test]
    fn nothing_is_left_of_a_session_that_the_disk_never_took() {
        let (_dir, store) = store();
        let mut session = store.create("tiny");
        let path = session.path.clone();
        private::open(&path).unwrap();
        session.file = Some(File::open(&path).unwrap());
        session.append(&said("one")).unwrap_err();
        drop(session);
        assert!(!path.exists());
    }

    #[test]
    fn a_session_is_open_once_and_must_be_meant_clearly() {
        let (_dir, store) = store();
        assert!(store.open("", "").unwrap_err().to_string().contains("no sessions"));
        let mut session = store.create("tiny");
        session.append(&said("one")).unwrap();
        let error = store.open(session.id(), "").err().unwrap().to_string();
        assert!(error.contains("is open, in this chat"), "{error}");
        let error = store.open("", session.id()).err().unwrap().to_string();
        assert!(error.contains("no other sessions"), "{error}");
        let error = store.open(session.id(), session.id()).err().unwrap().to_string();
        assert!(error.contains("is this conversation"), "{error}");
        let mut other = store.create("tiny");
        other.append(&said("two")).unwrap();
        assert!(store.find("2", "").unwrap_err().to_string().contains("2 sessions"));
        assert!(store.find("zzz", "").unwrap_err().to_string().contains("no session is called"));
        let latest = store.find("", other.id()).unwrap();
        assert_eq!(latest, session.id(), "the conversation that is open here is not resumed");
    }

    #[cfg(unix)]
    #[test]
    fn files_are_their_owner_s_alone() {
        use std::os::unix::fs::PermissionsExt;
        let (_dir, store) = store();
        let mut session = store.create("tiny");
        session.append(&said("one")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&session.path), mode(&store.dir)), (0o600, 0o700));
    }
}
