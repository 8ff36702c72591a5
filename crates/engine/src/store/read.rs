//! Positioned whole reads, the same on every system.
//!
//! The only place that reads expert files. A read either fills the buffer or is an error: what came
//! up short is never computed with.

use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Threads that read one long run of bytes.
const READERS: usize = 4;
/// Bytes that one of them reads at a time.
const PIECE_BYTES: usize = 8 << 20;

/// As [`read_exact_at`], with several reads in flight where the buffer is long: one alone leaves a fast
/// disk idle while it copies.
///
/// # Errors
/// As there; the error of any piece.
pub fn read_long_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let readers = READERS.min(buffer.len() / PIECE_BYTES);
    if readers < 2 {
        return read_exact_at(file, buffer, offset);
    }
    let pieces = Mutex::new(buffer.chunks_mut(PIECE_BYTES).enumerate());
    let read = || {
        loop {
            let next = pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((i, piece)) = next else { return Ok(()) };
            read_exact_at(file, piece, offset + (i * PIECE_BYTES) as u64)?;
        }
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("a read does not panic"))
    })
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_read_gives_every_byte_its_place_and_a_short_file_is_an_error() {
        let bytes: Vec<u8> = (0..3 * PIECE_BYTES + 77).map(|i| (i / 5 % 251) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let file = File::open(file.path()).unwrap();
        let mut buffer = vec![0; bytes.len() - 5];
        read_long_at(&file, &mut buffer, 5).unwrap();
        assert!(buffer == bytes[5..]);
        let error = read_long_at(&file, &mut buffer, 6).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
