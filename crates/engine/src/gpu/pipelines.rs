//! Compiled kernels, kept on disk from one run to the next.
//!
//! A driver takes seconds to compile what a model needs. Where wgpu hands out what the driver made, which
//! is Vulkan, it is kept in the user's cache directory, one file for each adapter: a mark, a checksum, then
//! the bytes. What is damaged, too large or not ours counts as absent and is written anew; wgpu and the
//! driver refuse what another driver made. Nothing here fails: without the file kernels are compiled.

use std::fs;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::device::Device;

/// What the file begins with.
const MARK: &[u8; 8] = b"fm-kern1";
/// Mark and checksum.
const HEADER_BYTES: usize = 16;
/// A larger file is begun anew: kernels of every model that was ever run are in it.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// The file of an adapter, and what was in it.
pub struct KeptPipelines {
    path: PathBuf,
    read: Option<Vec<u8>>,
}

impl KeptPipelines {
    /// Reads what is kept for an adapter and hands it to the device, which compiles with it from here on.
    /// `None` where there is nothing to keep.
    pub fn open(dir: &Path, adapter: &wgpu::Adapter, device: &mut Device) -> Option<Self> {
        let path = dir.join(wgpu::util::pipeline_cache_key(&adapter.get_info())?);
        let read = contents(&path);
        device.keep_pipelines(read.as_deref()).then_some(Self { path, read })
    }

    /// Bytes that an earlier run has left.
    #[cfg(test)]
    pub fn read_bytes(&self) -> usize {
        self.read.as_ref().map_or(0, Vec::len)
    }

    /// Keeps what the device has compiled, if that is more than there was.
    pub fn save(&self, device: &Device) {
        let Some(now) = device.pipelines().filter(|now| self.read.as_ref() != Some(now)) else {
            return;
        };
        let partial = self.path.with_extension(format!("{}.partial", std::process::id()));
        let file = [&MARK[..], &xxh3_64(&now).to_le_bytes(), &now].concat();
        let dir = self.path.parent().map_or(Ok(()), fs::create_dir_all);
        let kept = dir
            .and_then(|()| fs::write(&partial, file))
            .and_then(|()| fs::rename(&partial, &self.path));
        if kept.is_err() {
            // A directory that cannot be written costs time at the next start and nothing else.
            let _ = fs::remove_file(&partial);
        }
    }
}

/// What a file holds, if it is whole and ours.
fn contents(path: &Path) -> Option<Vec<u8>> {
    let bytes = fs::metadata(path).ok()?.len();
    if bytes > FILE_BYTES_MAX {
        return None;
    }
    let mut file = fs::read(path).ok()?;
    let (mark, rest) = file.split_at_checked(MARK.len())?;
    let (checksum, data) = rest.split_first_chunk()?;
    let whole = mark == MARK && xxh3_64(data) == u64::from_le_bytes(*checksum);
    whole.then(|| file.split_off(HEADER_BYTES))
}
