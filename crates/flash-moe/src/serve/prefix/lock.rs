//! A directory of states belongs to one process at a time.
//!
//! Owns the file `lock` of the directory. The system frees it when the process ends, however it does.

use std::fs::{File, TryLockError};
use std::path::Path;

use anyhow::{Context, Result};

use crate::serve::log;

const NAME: &str = "lock";

/// Holds the directory until it is dropped.
pub struct Lock(#[expect(dead_code, reason = "held, not used")] File);

/// The directory for this process; none if another one has it.
///
/// # Errors
/// The directory cannot be written.
pub fn take(dir: &Path) -> Result<Option<Lock>> {
    let path = dir.join(NAME);
    let named = || path.display().to_string();
    let file = File::options().create(true).append(true).open(&path).with_context(named)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => {
            // Some file systems know no locks.
            let why = "it is not locked, so give it to no other process";
            log::note(&format!("warning: {}: {error}; {why}", path.display()));
        }
    }
    Ok(Some(Lock(file)))
}
