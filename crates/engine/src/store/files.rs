//! Layer files: opened once, through the page cache or past it.
//!
//! Direct reads need the file system's consent and records of whole pages. Whether both hold is tried
//! with one page, never assumed.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use super::read::read_exact_at;
use crate::container::Container;
use crate::error::{Error, Result};
use crate::memory::{Block, PAGE_BYTES};
use crate::shape::LayerId;

/// Through the page cache or past it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoMode {
    /// Past the page cache; refused where the file system cannot.
    Direct,
    /// Through the page cache.
    Buffered,
    /// What suits the machine and the model: see [`super::choice`].
    Auto,
}

impl IoMode {
    /// The name of the flag's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Buffered => "buffered",
            Self::Auto => "auto",
        }
    }
}

/// Where one layer's records lie.
pub(super) struct LayerFile {
    pub layer: LayerId,
    pub path: PathBuf,
    pub file: File,
    pub stride_bytes: usize,
    /// Bytes to read for a record: whole pages when the stride allows it.
    pub read_bytes: usize,
}

/// Opens every layer file of a container.
pub(super) fn open_layers(container: &Container, direct: bool) -> Result<Vec<LayerFile>> {
    let entries = container.manifest().experts.iter().zip(container.layouts());
    let opened = entries.map(|(entry, layout)| {
        let path = container.dir().join(&entry.file);
        let file = open(&path, direct).map_err(|e| Error::io(&path, e))?;
        let padded = entry.stride_bytes.is_multiple_of(PAGE_BYTES);
        Ok(LayerFile {
            layer: entry.layer,
            path,
            file,
            stride_bytes: entry.stride_bytes,
            read_bytes: if padded { layout.padded_bytes() } else { layout.record_bytes() },
        })
    });
    opened.collect()
}

/// Whether the records of a container can be read past the page cache.
pub(super) fn direct_works(container: &Container) -> bool {
    let files = &container.manifest().experts;
    let aligned = files.iter().all(|entry| entry.stride_bytes.is_multiple_of(PAGE_BYTES));
    let first = files.first().map(|entry| container.dir().join(&entry.file));
    aligned && first.is_some_and(|path| direct_reads_work(&path))
}

/// The refusal of `--io direct`.
pub(super) fn no_direct(container: &Container) -> Error {
    Error::Container(format!(
        "{}: direct reads do not work here (file system or record alignment); use --io auto",
        container.dir().display()
    ))
}

/// Some file systems take the flag when opening and refuse the first read, so one page is read.
pub(super) fn direct_reads_work(path: &Path) -> bool {
    let Ok(file) = open(path, true) else { return false };
    let mut page = Block::zeroed(PAGE_BYTES);
    read_exact_at(&file, page.bytes_mut(), 0).is_ok()
}

#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
pub(super) fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.read(true);
    if direct {
        options.custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed());
    }
    options.open(path)
}

#[cfg(target_vendor = "apple")]
pub(super) fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).open(path)?;
    if direct {
        rustix::fs::fcntl_nocache(&file, true)?;
    }
    Ok(file)
}

#[cfg(windows)]
pub(super) fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    use std::os::windows::fs::OpenOptionsExt;
    /// FILE_FLAG_NO_BUFFERING of CreateFileW.
    const NO_BUFFERING: u32 = 0x2000_0000;
    let mut options = OpenOptions::new();
    options.read(true);
    if direct {
        options.custom_flags(NO_BUFFERING);
    }
    options.open(path)
}

#[cfg(not(any(
    target_os = "linux",
    target_os = "android",
    target_os = "freebsd",
    target_vendor = "apple",
    windows
)))]
pub(super) fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    if direct {
        return Err(std::io::ErrorKind::Unsupported.into());
    }
    OpenOptions::new().read(true).open(path)
}
