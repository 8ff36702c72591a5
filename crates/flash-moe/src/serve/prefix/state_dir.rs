//! Checkpoints in files, which survive the server.
//!
//! Owns the files `prefix-PLACE-HASH.state` of one directory, in the layout of `--save-state`, and their
//! sum, which stays within a bound: those not used for longest are removed. At the start only
//! headers and tokens are read. Threads read and write states without waiting for what others do on
//! the disk. A file that is damaged is removed with a warning; one of another model or other settings, or
//! that could not be read, is left alone until the bound removes it. Nothing here is ever
//! an error of a request: what cannot be read is computed again.

use std::fs::File;
use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Error, Result, anyhow, ensure};
use flash_moe_engine::Error as EngineError;
use flash_moe_engine::engine::Engine;
use flash_moe_engine::session::{Checkpoint, StateReader};
use flash_moe_engine::shape::TokenId;
use xxhash_rust::xxh3::Xxh3Default;

use super::Place;
use super::lock::Lock;
use crate::convert::files::remove_partial_files;
use crate::serve::log;
use crate::state_file::NewState;

/// Bytes read at once of a header and its tokens.
const BUFFER_BYTES: usize = 64 << 10;
const PREFIX: &str = "prefix-";
const ENDING: &str = ".state";

/// The directory.
pub struct StateDir {
    dir: PathBuf,
    bytes_max: u64,
    files: Mutex<Vec<StateFile>>, // least recently used first
    _lock: Lock,
}

/// A file of the directory.
#[derive(Clone)]
pub struct StateFile {
    path: PathBuf,
    bytes: u64,
    place: Place,
    tokens: Vec<TokenId>, // none: not to be used
    is_read: bool,        // by a thread, now
}

/// What the directory has for a prompt.
pub enum Claim {
    /// Nothing.
    Nothing,
    /// A state that somebody reads already.
    Taken,
    /// A state that the caller is to [`StateDir::load`].
    Yours(StateFile),
}

impl StateDir {
    /// Reads what there is in a directory of one's own.
    ///
    /// # Errors
    /// The directory cannot be listed or written.
    pub fn open(dir: &Path, lock: Lock, bytes_max: u64, engine: &Engine) -> Result<Self> {
        remove_partial_files(dir)?;
        let mut found: Vec<(SystemTime, StateFile)> = Vec::new();
        for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
            let path = entry.with_context(|| dir.display().to_string())?.path();
            let Some(place) = place_of(&path) else { continue };
            let tokens = tokens_of(&path, engine).map_or_else(|e| spared(&path, &e), Some);
            let (Some(tokens), Ok(data)) = (tokens, path.metadata()) else { continue };
            let time = data.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let bytes = data.len();
            found.push((time, StateFile { path, bytes, place, tokens, is_read: false }));
        }
        found.sort_by_key(|(time, _)| *time);
        let files = found.into_iter().map(|(_, file)| file).collect();
        let all = Self { dir: dir.into(), bytes_max, files: Mutex::new(files), _lock: lock };
        all.trim();
        Ok(all)
    }

    /// The longest state of at least `least` tokens that `prompt` begins with.
    pub fn claim(&self, prompt: &[TokenId], least: usize) -> Claim {
        let mut files = self.lock();
        let fits = |file: &&mut StateFile| {
            file.tokens.len() >= least.max(1) && prompt.starts_with(&file.tokens)
        };
        match files.iter_mut().filter(fits).max_by_key(|file| file.tokens.len()) {
            None => Claim::Nothing,
            Some(file) if file.is_read => Claim::Taken,
            Some(file) => {
                file.is_read = true;
                Claim::Yours(file.clone())
            }
        }
    }

    /// Reads a claimed state, which takes as long as the disk needs. What goes wrong is a warning, and
    /// the file is not used again.
    pub fn load(&self, file: StateFile, engine: &Engine) -> Option<(Checkpoint, Place)> {
        // A file that stayed claimed would be waited for without end.
        let read = catch_unwind(AssertUnwindSafe(|| load(&file, engine)));
        let (tokens, loaded) = match read.unwrap_or_else(|_| Err(anyhow!("reading it failed"))) {
            Ok(checkpoint) => (Some(checkpoint.tokens().to_vec()), Some((checkpoint, file.place))),
            Err(error) => (spared(&file.path, &error), None),
        };
        let mut files = self.lock();
        files.retain(|other| other.path != file.path);
        files.extend(tokens.map(|tokens| StateFile { tokens, is_read: false, ..file }));
        loaded
    }

    /// Writes a checkpoint; one that it continues from the same place is no longer needed. What goes
    /// wrong is a warning.
    pub fn save(&self, checkpoint: &Checkpoint, place: Place) {
        let tokens = checkpoint.tokens();
        if self.lock().iter().any(|file| file.tokens == tokens) {
            return;
        }
        let bytes = Checkpoint::bytes_of_all([checkpoint]);
        if bytes > self.bytes_max {
            let why = "a prefix is larger than --state-dir-size";
            return log::note(&format!("warning: {why}: {} tokens, {bytes} bytes", tokens.len()));
        }
        let path =
            self.dir.join(format!("{PREFIX}{}-{:016x}{ENDING}", place.name(), hash(checkpoint)));
        let written = NewState::create(&path)
            .and_then(|file| file.write(|to| checkpoint.write(to)))
            .and_then(|()| Ok(std::fs::metadata(&path)?.len()));
        match written {
            Ok(bytes) => {
                self.remove_all(|file| {
                    file.place == place
                        && !file.tokens.is_empty()
                        && tokens.starts_with(&file.tokens)
                });
                self.lock().push(StateFile {
                    path,
                    bytes,
                    place,
                    tokens: tokens.to_vec(),
                    is_read: false,
                });
                self.trim();
            }
            Err(error) => log::note(&format!("warning: a prefix is not kept on disk: {error:#}")),
        }
    }

    /// Removes what has not been used for longest until the rest is within the bound.
    fn trim(&self) {
        let mut bytes: u64 = self.lock().iter().map(|file| file.bytes).sum();
        self.remove_all(|file| {
            let goes = bytes > self.bytes_max;
            bytes -= if goes { file.bytes } else { 0 };
            goes
        });
    }

    /// Removes files, but none that is being read.
    fn remove_all(&self, mut goes: impl FnMut(&StateFile) -> bool) {
        let goes = |file: &mut StateFile| !file.is_read && goes(file);
        let gone: Vec<StateFile> = self.lock().extract_if(.., goes).collect();
        gone.iter().for_each(|file| remove(&file.path));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<StateFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place in the name of a file, if it is one of ours.
fn place_of(path: &Path) -> Option<Place> {
    let name = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.strip_suffix(ENDING)?;
    Place::named(name.split_once('-')?.0)
}

/// What a file's state has taken; none of another model, other settings or another build.
fn tokens_of(path: &Path, engine: &Engine) -> Result<Vec<TokenId>> {
    let reader = StateReader::new(BufReader::with_capacity(BUFFER_BYTES, File::open(path)?))?;
    let fits = reader.identity().check(engine.container(), engine.options()).is_ok()
        && reader.position() <= engine.context();
    Ok(if fits { reader.tokens()? } else { Vec::new() })
}

fn load(file: &StateFile, engine: &Engine) -> Result<Checkpoint> {
    let opened = File::open(&file.path)?;
    let reader = StateReader::new(BufReader::with_capacity(1 << 20, &opened))?;
    let checkpoint = reader.read(engine)?;
    ensure!(checkpoint.tokens() == file.tokens, "its tokens are not those of the start");
    // Its time is that of its last use. Where that cannot be set it is removed earlier, no more.
    File::options().append(true).open(&file.path)?.set_modified(SystemTime::now()).unwrap_or(());
    Ok(checkpoint)
}

/// Removes a file that is damaged. One that is not stays, as of no use: no tokens.
fn spared(path: &Path, error: &Error) -> Option<Vec<TokenId>> {
    if matches!(error.downcast_ref(), Some(EngineError::State(_))) {
        remove_damaged(path, error);
        return None;
    }
    log::note(&format!("warning: {}: {error:#}; it is not used", path.display()));
    Some(Vec::new())
}

/// Removes a file that cannot be used, with a warning.
pub fn remove_damaged(path: &Path, error: &Error) {
    log::note(&format!("warning: {}: {error:#}; it is removed", path.display()));
    remove(path);
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        log::note(&format!("warning: {}: {error}", path.display()));
    }
}

/// Tells the states of one directory apart: by tokens and by what made them.
fn hash(checkpoint: &Checkpoint) -> u64 {
    let mut hash = Xxh3Default::new();
    hash.update(format!("{:?}", checkpoint.identity()).as_bytes());
    checkpoint.tokens().iter().for_each(|token| hash.update(&token.0.to_le_bytes()));
    hash.digest()
}
