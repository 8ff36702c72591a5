//! The files of `--save-state` and `--load-state`.
//!
//! Owns paths and the order of things: a place that cannot be written and a state that cannot be
//! continued are found before a model runs, and a name never stands for half a state. What is in the
//! file is the engine's business.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flash_moe_engine::container::Container;
use flash_moe_engine::engine::{Engine, Options};
use flash_moe_engine::session::{Checkpoint, StateReader};

use crate::convert::files::PartialFile;

/// Bytes written and read at once where a part is smaller.
const BUFFER_BYTES: usize = 1 << 20;

/// A state that a run will continue; its header is read and fits.
pub struct SavedState {
    path: PathBuf,
    reader: StateReader<BufReader<File>>,
}

impl SavedState {
    /// Opens a file and checks that an engine of this container and these options may continue it.
    ///
    /// # Errors
    /// No such file, no state, a state of another model or other settings.
    pub fn open(path: &Path, container: &Container, options: &Options) -> Result<Self> {
        let named = || path.display().to_string();
        let file = File::open(path).with_context(named)?;
        let reader = StateReader::new(BufReader::with_capacity(BUFFER_BYTES, file));
        let reader = reader.with_context(named)?;
        reader.identity().check(container, options).with_context(named)?;
        Ok(Self { path: path.into(), reader })
    }

    /// Tokens that it has taken.
    pub fn position(&self) -> usize {
        self.reader.position()
    }

    /// Reads the rest.
    ///
    /// # Errors
    /// The file is cut off or damaged, or longer than the context.
    pub fn load(self, engine: &Engine) -> Result<Checkpoint> {
        self.reader.read(engine).with_context(|| self.path.display().to_string())
    }
}

/// A state file that does not have its name yet.
pub struct NewState {
    file: PartialFile,
}

impl NewState {
    /// Starts a file.
    ///
    /// # Errors
    /// The place cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self { file: PartialFile::create(path)? })
    }

    /// Has `state` write itself, flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// The disk is full or fails; no file is left behind.
    pub fn write(self, state: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        let to = Appending { file: &self.file, offset: 0 };
        let written = state(&mut BufWriter::with_capacity(BUFFER_BYTES, to));
        match written {
            Ok(()) => self.file.finish(),
            Err(error) => {
                self.file.discard()?;
                Err(error.into())
            }
        }
    }

    /// Leaves no file behind; one of that name that was there stays.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn discard(self) -> Result<()> {
        self.file.discard()
    }
}

/// Writes one part after the other.
struct Appending<'a> {
    file: &'a PartialFile,
    offset: u64,
}

impl Write for Appending<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(bytes, self.offset).map_err(|e| io::Error::other(format!("{e:#}")))?;
        self.offset += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
