//! Positioned whole reads, the same on every system.
//!
//! The only place that reads expert files. A read either fills the buffer or is an error: what came
//! up short is never computed with.

use std::fs::File;
use std::io;

/// Fills `buffer` from `offset`, retrying interrupted calls.
///
/// # Errors
/// The system's error, or `UnexpectedEof` when the file ends first.
#[cfg(unix)]
pub fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    file.read_exact_at(buffer, offset)
}

/// Fills `buffer` from `offset`.
///
/// # Errors
/// The system's error, or `UnexpectedEof` when the file ends first.
#[cfg(windows)]
pub fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buffer.is_empty() {
        let read = file.seek_read(buffer, offset)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[read..];
        offset += read as u64;
    }
    Ok(())
}
