//! The small trained model inside the program, so that the first command works offline.
//!
//! A container needs files: it is unpacked once into the cache directory, under a name made from its
//! contents, and compared with the program's own bytes on every use. A damaged copy is replaced.
//! Unpacking writes a directory beside the final one and renames it, so a reader sees all of it or
//! nothing, and two processes that unpack at once do no harm.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result, anyhow};
use xxhash_rust::xxh3::Xxh3;

use crate::options::environment::CACHE_VARIABLE;

/// One file of the container.
struct File {
    path: &'static str,
    bytes: &'static [u8],
}

macro_rules! files {
    ($($path:literal)*) => {
        [$(File {
            path: $path,
            bytes: include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny/", $path)),
        }),*]
    };
}

/// The container, as `flash-moe convert` wrote it; `models/tiny/README.md` says from what.
const FILES: [File; 30] = files! {
    "flash-moe.json" "config.json" "generation_config.json" "tokenizer.json" "tokenizer_config.json"
    "dense.safetensors"
    "experts/layer_00.bin" "experts/layer_01.bin" "experts/layer_02.bin" "experts/layer_03.bin"
    "experts/layer_04.bin" "experts/layer_05.bin" "experts/layer_06.bin" "experts/layer_07.bin"
    "experts/layer_08.bin" "experts/layer_09.bin" "experts/layer_10.bin" "experts/layer_11.bin"
    "checksums/layer_00.xxh3" "checksums/layer_01.xxh3" "checksums/layer_02.xxh3"
    "checksums/layer_03.xxh3" "checksums/layer_04.xxh3" "checksums/layer_05.xxh3"
    "checksums/layer_06.xxh3" "checksums/layer_07.xxh3" "checksums/layer_08.xxh3"
    "checksums/layer_09.xxh3" "checksums/layer_10.xxh3" "checksums/layer_11.xxh3"
};

/// The directory of the unpacked model, below `cache`; unpacks it where that has not been done.
///
/// # Errors
/// There is no cache directory, or it cannot be written; both say what to do.
pub fn unpacked(cache: Option<PathBuf>) -> Result<PathBuf> {
    let advice =
        format!("set {CACHE_VARIABLE} to a directory that can be written, or name a --model");
    let cache = cache.ok_or_else(|| {
        anyhow!(
            "no place to unpack the built-in model: this system names no cache directory; {advice}"
        )
    })?;
    unpack(&cache, &FILES).with_context(|| {
        format!("cannot unpack the built-in model into {} ({advice})", cache.display())
    })
}

fn unpack(cache: &Path, files: &[File]) -> io::Result<PathBuf> {
    let name = format!("tiny-{:016x}", fingerprint(files));
    let dir = cache.join(&name);
    if is_whole(&dir, files) {
        return Ok(dir);
    }
    let partial = cache.join(format!("{name}.{}.partial", process::id()));
    let outcome = write_all(&partial, files).and_then(|()| publish(&partial, &dir, files));
    if partial.exists() {
        // What went wrong is in `outcome`; a leftover that cannot be removed adds nothing to it.
        fs::remove_dir_all(&partial).unwrap_or(());
    }
    outcome.map(|()| dir)
}

/// Renames `partial` to `dir`, out of whose way a damaged copy goes first.
fn publish(partial: &Path, dir: &Path, files: &[File]) -> io::Result<()> {
    if dir.exists() && !is_whole(dir, files) {
        let damaged = partial.with_extension("damaged");
        fs::rename(dir, &damaged)?;
        fs::remove_dir_all(&damaged)?;
    }
    match fs::rename(partial, dir) {
        // Another process was faster: its copy is as good if it is whole.
        Err(_) if is_whole(dir, files) => Ok(()),
        other => other,
    }
}

fn write_all(dir: &Path, files: &[File]) -> io::Result<()> {
    for file in files {
        let path = dir.join(file.path);
        fs::create_dir_all(path.parent().unwrap_or(dir))?;
        fs::write(path, file.bytes)?;
    }
    Ok(())
}

/// Whether every file is there and is, byte for byte, what it should be.
fn is_whole(dir: &Path, files: &[File]) -> bool {
    files.iter().all(|file| fs::read(dir.join(file.path)).is_ok_and(|bytes| bytes == file.bytes))
}

/// xxh3-64 over names and contents.
fn fingerprint(files: &[File]) -> u64 {
    let mut hash = Xxh3::new();
    for file in files {
        hash.update(file.path.as_bytes());
        hash.update(&file.bytes.len().to_le_bytes());
        hash.update(file.bytes);
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: [File; 2] =
        [File { path: "a.txt", bytes: b"alpha" }, File { path: "b/c.txt", bytes: b"gamma" }];

    fn entries(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn unpacking_twice_gives_one_whole_directory() {
        let cache = tempfile::tempdir().unwrap();
        let below = cache.path().join("made/on/demand");
        let dir = unpack(&below, &SMALL).unwrap();
        assert_eq!(fs::read(dir.join("b/c.txt")).unwrap(), b"gamma");
        assert_eq!(unpack(&below, &SMALL).unwrap(), dir);
        assert_eq!(entries(&below), 1);
    }

    #[test]
    fn damage_is_found_and_repaired() {
        let cache = tempfile::tempdir().unwrap();
        let dir = unpack(cache.path(), &SMALL).unwrap();
        for damage in [&b"alphA"[..], b"alph", b""] {
            fs::write(dir.join("a.txt"), damage).unwrap();
            unpack(cache.path(), &SMALL).unwrap();
            assert_eq!(fs::read(dir.join("a.txt")).unwrap(), b"alpha");
        }
        fs::remove_file(dir.join("a.txt")).unwrap();
        unpack(cache.path(), &SMALL).unwrap();
        assert!(is_whole(&dir, &SMALL));
        assert_eq!(entries(cache.path()), 1);
    }

    #[test]
    fn a_copy_that_comes_second_gives_way() {
        let cache = tempfile::tempdir().unwrap();
        let first = unpack(cache.path(), &SMALL).unwrap();
        let partial = cache.path().join("other.partial");
        write_all(&partial, &SMALL).unwrap();
        publish(&partial, &first, &SMALL).unwrap();
        assert!(is_whole(&first, &SMALL) && partial.exists());
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = format!("{:#}", unpacked(Some(file.clone())).unwrap_err());
        assert!(error.contains(&file.display().to_string()), "{error}");
        assert!(error.contains("FLASH_MOE_CACHE"), "{error}");
        assert!(unpacked(None).unwrap_err().to_string().contains("FLASH_MOE_CACHE"));
    }

    #[test]
    fn the_list_is_the_directory() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny"));
        let mut found = Vec::new();
        for dir in ["", "experts", "checksums"] {
            for entry in fs::read_dir(root.join(dir)).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() && path.extension().is_none_or(|e| e != "md") {
                    found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_string());
                }
            }
        }
        found.sort();
        let mut listed: Vec<String> = FILES.iter().map(|f| f.path.to_string()).collect();
        listed.sort();
        assert_eq!(listed, found);
    }
}
