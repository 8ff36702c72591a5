//! Everything the program takes from the environment, read here and nowhere else.
//!
//! Four things: where caches go, whether colour is wanted, which streams are terminals, and the original
//! engine's `TQ_KV`.

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

/// The variable that moves the cache directory.
pub const CACHE_VARIABLE: &str = "FLASH_MOE_CACHE";

/// The directory for files that can be made again, or `None` where the system names none.
///
/// `FLASH_MOE_CACHE`, else `flash-moe` in the system's cache directory.
pub fn cache_dir() -> Option<PathBuf> {
    if let Some(dir) = set(CACHE_VARIABLE) {
        return Some(dir.into());
    }
    let base = if cfg!(windows) {
        PathBuf::from(set("LOCALAPPDATA")?)
    } else if cfg!(target_os = "macos") {
        PathBuf::from(set("HOME")?).join("Library").join("Caches")
    } else {
        match set("XDG_CACHE_HOME") {
            Some(dir) => PathBuf::from(dir),
            None => PathBuf::from(set("HOME")?).join(".cache"),
        }
    };
    Some(base.join("flash-moe"))
}

/// Whether the original engine's variable asks for its compressed keys and values.
pub fn original_kv_codes() -> bool {
    set("TQ_KV").is_some_and(|value| value == "1")
}

/// Whether text on standard output may be dimmed: it is a terminal that can, and nobody objects.
pub fn may_style() -> bool {
    let dumb = set("TERM").is_some_and(|term| term == "dumb");
    io::stdout().is_terminal() && set("NO_COLOR").is_none() && !dumb
}

/// Whether standard input is typed by a person.
pub fn input_is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Whether progress on standard error is seen by a person.
pub fn errors_are_seen() -> bool {
    io::stderr().is_terminal()
}

/// A variable that is set to something.
fn set(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}
