//! Files that hold what was said: readable by their owner alone.
//!
//! A line is appended by one write to a file that is open for appending, so that lines of two
//! processes never mix and a crash leaves whole lines and at most one that is cut off.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Opens a file for appending, and makes it and its directory where they are absent.
///
/// # Errors
/// The place cannot be written.
pub fn open(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        make_directory(dir)?;
    }
    options().append(true).read(true).create(true).open(path)
}

/// Appends bytes in one write.
///
/// # Errors
/// The place cannot be written.
pub fn append(path: &Path, bytes: &[u8]) -> io::Result<()> {
    open(path)?.write_all(bytes)
}

/// Puts bytes in the place of a file's contents: a reader sees all of the old or all of the new.
///
/// # Errors
/// The place cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        make_directory(dir)?;
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let written = options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&partial)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // What went wrong is in `written`; a leftover that cannot be removed adds nothing to it.
        fs::remove_file(&partial).unwrap_or(());
    }
    written
}

/// Makes a directory and its parents.
///
/// # Errors
/// The place cannot be written.
pub fn make_directory(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}
