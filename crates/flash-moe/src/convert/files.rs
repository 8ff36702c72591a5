//! Writing files so that a name never stands for half a file.
//!
//! Data goes into `NAME.partial`, is flushed to the disk and then takes its name, so what exists is
//! whole and a conversion that was stopped can trust it. Writes are by position and may come from
//! several threads. Running out of disk space is reported as such, with what to do.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, ensure};

/// Ending of a file that is being written.
pub const PARTIAL: &str = "partial";

/// A file that does not have its name yet.
pub struct PartialFile {
    path: PathBuf,
    partial: PathBuf,
    file: File,
}

impl PartialFile {
    /// Starts a file, discarding what an earlier attempt left.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let partial = partial_path(path);
        let file = File::create(&partial).map_err(|e| write_error(&partial, e))?;
        Ok(Self { path: path.into(), partial, file })
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(&self.file, bytes, offset).map_err(|e| write_error(&self.partial, e))
    }

    /// Gives the file up.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn discard(self) -> Result<()> {
        std::fs::remove_file(&self.partial).map_err(|e| write_error(&self.partial, e))
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(|e| write_error(&self.partial, e))?;
        std::fs::rename(&self.partial, &self.path).map_err(|e| write_error(&self.path, e))?;
        sync_directory(&self.path)
    }
}

/// Writes a small file whole.
///
/// # Errors
/// As [`PartialFile`].
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = PartialFile::create(path)?;
    file.write_at(bytes, 0)?;
    file.finish()
}

/// Removes what an earlier attempt left in a directory, so that its space counts as free.
///
/// # Errors
/// The directory cannot be listed or written.
pub fn remove_partial_files(dir: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| dir.display().to_string())?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == PARTIAL) {
            std::fs::remove_file(&path).map_err(|e| write_error(&path, e))?;
        }
    }
    Ok(())
}

/// Makes a directory and its parents.
///
/// # Errors
/// The place cannot be written.
pub fn make_directory(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| write_error(dir, e))
}

/// Refuses to start a conversion that will not fit.
///
/// # Errors
/// The file system has less than `needed` bytes free.
pub fn check_space(dir: &Path, needed: u64) -> Result<()> {
    let Some(free) = free_bytes(dir) else { return Ok(()) };
    ensure!(
        needed <= free,
        "{}: {:.2} GB are needed and {:.2} GB are free ({needed} and {free} bytes)",
        dir.display(),
        needed as f64 / 1e9,
        free as f64 / 1e9
    );
    Ok(())
}

#[cfg(unix)]
fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(not(unix))]
fn free_bytes(_dir: &Path) -> Option<u64> {
    None
}

/// Name of the file while it is being written.
pub fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(".");
    name.push(PARTIAL);
    name.into()
}

fn write_error(path: &Path, error: io::Error) -> Error {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full; free some space and run the same command again"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "cannot write there",
        _ => "writing failed",
    };
    Error::new(error).context(format!("{}: {hint}", path.display()))
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    file.write_all_at(bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        let written = file.seek_write(bytes, offset)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

/// Makes a rename durable; without it a power cut could lose the name of a flushed file.
#[cfg(unix)]
fn sync_directory(path: &Path) -> Result<()> {
    let dir = directory_of(path);
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| write_error(dir, e))
}

/// Where a file's name is kept; that of a bare name is the directory the program runs in.
#[cfg(unix)]
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
        Some(dir) => dir,
        None => path,
    }
}

#[cfg(not(unix))]
fn sync_directory(_path: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn a_bare_name_is_kept_where_the_program_runs() {
        let of = |path| directory_of(Path::new(path)).to_str().unwrap().to_string();
        assert_eq!(["s.bin", "a/s.bin", "/s.bin", "/"].map(of), [".", "a", "/", "/"]);
    }

    #[test]
    fn a_file_has_its_name_only_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer_00.bin");
        let file = PartialFile::create(&path).unwrap();
        file.write_at(b"cd", 2).unwrap();
        assert!(!path.exists());
        file.write_at(b"ab", 0).unwrap();
        file.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abcd");
        assert!(!partial_path(&path).exists());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        let dir = tempfile::tempdir().unwrap();
        check_space(dir.path(), 1).unwrap();
        if free_bytes(dir.path()).is_some() {
            let message = check_space(dir.path(), u64::MAX).unwrap_err().to_string();
            assert!(message.contains("18446744073709551615 and "), "{message}");
        }
    }
}
