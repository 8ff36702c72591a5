//! Everything the program takes from the environment, read here and nowhere else.
//!
//! Where caches, data and configurations are, whether colour is wanted, which streams are terminals, which editor the
//! user likes, and the original engine's `TQ_KV`.

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
    let xdg = ("XDG_CACHE_HOME", &[".cache"][..]);
    system_dir("LOCALAPPDATA", &["Library", "Caches"], xdg)
}

/// The directory for what the user would miss, or `None` where the system names none.
///
/// `flash-moe` in the system's data directory.
pub fn data_dir() -> Option<PathBuf> {
    let xdg = ("XDG_DATA_HOME", &[".local", "share"][..]);
    system_dir("APPDATA", &["Library", "Application Support"], xdg)
}

/// The directory for what the user has written for this program, or `None` where the system names none.
///
/// `flash-moe` in the system's directory of configurations.
pub fn config_dir() -> Option<PathBuf> {
    let xdg = ("XDG_CONFIG_HOME", &[".config"][..]);
    system_dir("APPDATA", &["Library", "Application Support"], xdg)
}

/// `flash-moe` in one of the system's directories: a variable of Windows, a place below the home of
/// macOS, elsewhere a variable and a place below the home where that is not set.
fn system_dir(windows: &str, mac: &[&str], (xdg, elsewhere): (&str, &[&str])) -> Option<PathBuf> {
    let below_home =
        |parts: &[&str]| Some(PathBuf::from(set("HOME")?).join(parts.iter().collect::<PathBuf>()));
    let base = if cfg!(windows) {
        PathBuf::from(set(windows)?)
    } else if cfg!(target_os = "macos") {
        below_home(mac)?
    } else {
        match set(xdg) {
            Some(dir) => PathBuf::from(dir),
            None => below_home(elsewhere)?,
        }
    };
    Some(base.join("flash-moe"))
}

/// The user's editor, with arguments, as a shell would read it.
pub fn editor() -> Option<String> {
    set("VISUAL").or_else(|| set("EDITOR")).and_then(|name| name.into_string().ok())
}

/// The shell that runs commands.
pub fn shell() -> &'static str {
    if cfg!(windows) { "cmd" } else { "/bin/sh" }
}

/// Whether a program may draw on this terminal: both ends are one, and it is not a dumb one.
pub fn may_draw() -> bool {
    let knows = cfg!(windows) || set("TERM").is_some_and(|term| term != "dumb");
    io::stdin().is_terminal() && io::stdout().is_terminal() && knows
}

/// Whether colours are wanted where they are possible.
pub fn may_color() -> bool {
    set("NO_COLOR").is_none()
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
