//! Checkpoints in files, which survive the server.
//!
//! Owns the files `prefix-PLACE-HASH.state` of one directory, in the layout of `--save-state`, and their
//! sum, which stays within a bound: those not used for longest are removed. At the start only
//! headers and tokens are read. One thread looks states up while another writes them, and neither
//! waits for what the other does on the disk. A file that is damaged is removed with a warning, and one of
//! another model or other settings is left alone until the bound removes it. Nothing here is ever
//! an error of a request: what cannot be read is computed again.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Error, Result, ensure};
use flash_moe_engine::engine::Engine;
use flash_moe_engine::session::{Checkpoint, StateReader};
use flash_moe_engine::shape::TokenId;
use xxhash_rust::xxh3::Xxh3Default;

use super::Place;
use crate::convert::files::{make_directory, remove_partial_files};
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
}

struct StateFile {
    path: PathBuf,
    bytes: u64,
    place: Place,
    tokens: Vec<TokenId>, // none: of another model or other settings
}

impl StateDir {
    /// Reads what there is; makes the directory if there is none.
    ///
    /// # Errors
    /// The directory cannot be made or listed.
    pub fn open(dir: &Path, bytes_max: u64, engine: &Engine) -> Result<Self> {
        make_directory(dir)?;
        remove_partial_files(dir)?;
        let mut found: Vec<(SystemTime, StateFile)> = Vec::new();
        for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
            let path = entry.with_context(|| dir.display().to_string())?.path();
            let Some(place) = place_of(&path) else { continue };
            match indexed(&path, place, engine) {
                Ok(file) => found.push(file),
                Err(error) => remove_damaged(&path, &error),
            }
        }
        found.sort_by_key(|(time, _)| *time);
        let files = found.into_iter().map(|(_, file)| file).collect();
        let all = Self { dir: dir.into(), bytes_max, files: Mutex::new(files) };
        all.trim();
        Ok(all)
    }

    /// The longest state of at least `least` tokens that `prompt` begins with.
    pub fn longest(
        &self,
        prompt: &[TokenId],
        least: usize,
        engine: &Engine,
    ) -> Option<(Checkpoint, Place)> {
        loop {
            // While it is read it is not listed, so that it is not removed either.
            let file = take_longest(&mut self.lock(), prompt, least)?;
            match load(&file, engine) {
                Ok(checkpoint) => {
                    let place = file.place;
                    self.list(file);
                    return Some((checkpoint, place));
                }
                Err(error) => remove_damaged(&file.path, &error),
            }
        }
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
                self.list(StateFile { path, bytes, place, tokens: tokens.to_vec() });
                self.trim();
            }
            Err(error) => log::note(&format!("warning: a prefix is not kept on disk: {error:#}")),
        }
    }

    /// Lists a file as the one used last; it was perhaps written anew while it was not listed.
    fn list(&self, file: StateFile) {
        let mut files = self.lock();
        files.retain(|other| other.path != file.path);
        files.push(file);
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

    fn remove_all(&self, goes: impl FnMut(&mut StateFile) -> bool) {
        let gone: Vec<StateFile> = self.lock().extract_if(.., goes).collect();
        gone.iter().for_each(|file| remove(&file.path));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<StateFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take_longest(files: &mut Vec<StateFile>, prompt: &[TokenId], least: usize) -> Option<StateFile> {
    let fits =
        |file: &StateFile| file.tokens.len() >= least.max(1) && prompt.starts_with(&file.tokens);
    let fitting = files.iter().enumerate().filter(|(_, file)| fits(file));
    let (at, _) = fitting.max_by_key(|(_, file)| file.tokens.len())?;
    Some(files.remove(at))
}

/// The place in the name of a file, if it is one of ours.
fn place_of(path: &Path) -> Option<Place> {
    let name = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.strip_suffix(ENDING)?;
    Place::named(name.split_once('-')?.0)
}

/// When a file was used last, and what it holds.
fn indexed(path: &Path, place: Place, engine: &Engine) -> Result<(SystemTime, StateFile)> {
    let file = File::open(path)?;
    let data = file.metadata()?;
    let reader = StateReader::new(BufReader::with_capacity(BUFFER_BYTES, file))?;
    let fits = reader.identity().check(engine.container(), engine.options()).is_ok()
        && reader.position() <= engine.context();
    let tokens = if fits { reader.tokens()? } else { Vec::new() };
    Ok((data.modified()?, StateFile { path: path.into(), bytes: data.len(), place, tokens }))
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
