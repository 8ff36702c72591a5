//! The engine's one error type.
//!
//! Every message names the thing that is wrong (layer, expert, file, offset, field) and, where we
//! know one, the next thing to do. Libraries return these; only the program prints them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::shape::{ExpertId, LayerId};

/// Everything that can go wrong between a model directory and a token.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.json` or the shape in `flash-moe.json` is unusable.
    #[error("shape: {0}")]
    Shape(String),
    /// A container file is missing, malformed or contradicts the manifest.
    #[error("container: {0}")]
    Container(String),
    /// The memory limit is below what the smallest useful setting needs.
    #[error("budget: {0}")]
    Budget(String),
    /// A token id, position or prompt that the model cannot take.
    #[error("prompt: {0}")]
    Prompt(String),
    /// A kept state that is damaged, of another model or settings, or too long for the context.
    #[error("state: {0}")]
    State(String),
    /// A kept state in another version of its layout.
    #[error(
        "state: version {found}, this build reads {known}; make it again with --save-state of this build"
    )]
    StateVersion {
        /// The file's.
        found: u32,
        /// This build's.
        known: u32,
    },
    /// A kept state could not be read; it may be sound.
    #[error("state: reading failed: {0}")]
    StateUnread(#[source] std::io::Error),
    /// The tokenizer file is missing, unreadable or refused by the tokenizer library.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template is missing, does not parse, or refuses the conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// A sampling setting outside its range.
    #[error("sampling: {0}")]
    Sampling(String),
    /// A computed value is not finite, so nothing after it can be trusted.
    #[error("numbers: {0}")]
    NotFinite(String),
    /// An operating system call on a named file failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// One expert record could not be read whole.
    #[error("layer {layer} expert {expert}: {} at offset {offset}: {reason}", path.display())]
    Record {
        /// Layer of the record.
        layer: LayerId,
        /// Expert of the record.
        expert: ExpertId,
        /// Layer file.
        path: PathBuf,
        /// Byte offset of the record in the file.
        offset: u64,
        /// Short read, end of file or the system's error.
        reason: String,
    },
    /// The caller gave a chunk of a prompt up before its last layer.
    #[error("stopped in the middle of a prompt")]
    Stopped,
    /// No adapter, a driver that refuses, a plan above the video memory, a device that failed.
    #[error("gpu: {0}")]
    Gpu(String),
    /// What failed a step that several timelines took together.
    #[error("{0}")]
    Together(Arc<Self>),
}

/// Result of every fallible engine call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An I/O error with its file.
    pub fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }
}
