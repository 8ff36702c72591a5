//! The destination directory: whose it is, what is already done, what is still to do.
//!
//! `convert.json` is written first and says which source and which settings the directory belongs
//! to; the manifest is written last and makes it a container. In between, every finished file has
//! its final name and is never touched again, so the same command continues where it was stopped.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::container::{
    DENSE_FILE, DenseFile, ExpertFile, MANIFEST_FILE, Manifest, VERSION,
};
use flash_moe_engine::shape::Shape;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::dense::{DenseLayout, read_checksums};
use super::experts::{EXPERTS_DIR, Records, SUMS_DIR};
use super::files::{PARTIAL, make_directory, remove_partial_files, write_whole};
use super::source::FileIdentity;

/// Path of the dense checksums within a container.
pub const DENSE_SUMS_FILE: &str = "checksums/dense.json";
/// Name of the record of a conversion.
pub const RECORD_FILE: &str = "convert.json";

/// What a conversion is made from and with.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Effective settings by flag.
    pub settings: BTreeMap<String, String>,
    /// Files of the checkpoint.
    pub source: Vec<FileIdentity>,
}

/// How far a destination is.
pub enum Progressed {
    /// A finished container of the same record.
    Complete,
    /// Something is left to do; the directory is ours until this is dropped.
    Open(Destination),
}

/// What a manifest says about the model as a whole.
pub struct About {
    /// Name for people.
    pub name: String,
    /// What the weights came from, for people.
    pub source: String,
    /// The shape.
    pub shape: Shape,
    /// What was skipped or rounded, for people.
    pub notes: Vec<String>,
}

/// A directory that is being written.
pub struct Destination {
    dir: PathBuf,
    /// Keeps a second conversion out; released by the system however we end.
    _lock: File,
}

/// Whether a directory must be empty before we write into it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A new container.
    New,
    /// A directory whose own files become part of the container.
    InPlace,
}

impl Destination {
    /// Opens `dir` for the conversion that `record` describes, new or unfinished.
    ///
    /// # Errors
    /// The directory holds something else, cannot be written, or is being written by another process.
    pub fn open(dir: &Path, record: &Record, place: Place) -> Result<Progressed> {
        let record_path = dir.join(RECORD_FILE);
        let complete = dir.join(MANIFEST_FILE).exists();
        match (read_record(&record_path)?, complete) {
            (Some(found), _) => {
                if let Some(difference) = difference(&found, record) {
                    let state = if complete { "a container" } else { "an unfinished container" };
                    ensure!(
                        !complete && nothing_finished(dir)?,
                        "{}: holds {state} made differently: {difference}",
                        dir.display()
                    );
                    write_whole(&record_path, &serde_json::to_vec_pretty(record)?)?;
                }
            }
            (None, true) => {
                bail!("{}: already holds a container, made by another command", dir.display())
            }
            (None, false) => {
                ensure!(
                    place == Place::InPlace || is_empty(dir)?,
                    "{}: not empty, and not a conversion to continue; give a new directory",
                    dir.display()
                );
                make_directory(dir)?;
                write_whole(&record_path, &serde_json::to_vec_pretty(record)?)?;
            }
        }
        if complete {
            return Ok(Progressed::Complete);
        }
        let lock = File::open(&record_path).with_context(|| record_path.display().to_string())?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            bail!("{}: another conversion is writing there", dir.display());
        }
        for sub in [EXPERTS_DIR, SUMS_DIR] {
            if sub == SUMS_DIR || place == Place::New {
                make_directory(&dir.join(sub))?;
            }
            remove_partial_files(&dir.join(sub))?;
        }
        remove_partial_files(dir)?;
        Ok(Progressed::Open(Self { dir: dir.into(), _lock: lock }))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the dense file was finished by an earlier run.
    ///
    /// # Errors
    /// As [`Destination::is_done`]; its checksums are gone.
    pub fn dense_done(&self, bytes: u64) -> Result<bool> {
        let done = self.is_done(DENSE_FILE, bytes)?;
        ensure!(
            !done || self.dir.join(DENSE_SUMS_FILE).exists(),
            "{DENSE_FILE} is there without {DENSE_SUMS_FILE}; delete it and run the command again"
        );
        Ok(done)
    }

    /// Whether a layer's file was finished by an earlier run.
    ///
    /// # Errors
    /// As [`Destination::is_done`]; its checksums are gone.
    pub fn records_done(&self, records: &Records) -> Result<bool> {
        let done = self.is_done(&records.file(), records.bytes())?;
        ensure!(
            !done || self.is_done(&records.sums_file(), records.sums_bytes())?,
            "{} is there without {}; delete it and run the command again",
            records.file(),
            records.sums_file()
        );
        Ok(done)
    }

    /// Writes the manifest, which makes the directory a container.
    ///
    /// # Errors
    /// Checksums cannot be read; the disk is full or fails.
    pub fn conclude(
        self,
        about: About,
        dense: &DenseLayout,
        experts: [Vec<ExpertFile>; 2],
    ) -> Result<()> {
        let [experts, mtp_experts] = experts;
        let manifest = Manifest {
            format: "flash-moe".into(),
            version: VERSION,
            name: about.name,
            source: about.source,
            shape: about.shape,
            dense: DenseFile {
                file: DENSE_FILE.into(),
                bytes: dense.bytes,
                header_checksum: format!("{:016x}", xxh3_64(dense.header())),
                checksums: read_checksums(&self.dir.join(DENSE_SUMS_FILE))?,
            },
            experts,
            mtp_experts,
            notes: about.notes,
        };
        write_whole(&self.dir.join(MANIFEST_FILE), &serde_json::to_vec_pretty(&manifest)?)
    }

    /// Whether a file was finished by an earlier run.
    ///
    /// # Errors
    /// The file exists with another size: something else has touched it.
    pub fn is_done(&self, file: &str, bytes: u64) -> Result<bool> {
        let path = self.dir.join(file);
        let Ok(metadata) = std::fs::metadata(&path) else { return Ok(false) };
        ensure!(
            metadata.len() == bytes,
            "{}: {} bytes, expected {bytes}: changed since it was written; delete it and run the command again",
            path.display(),
            metadata.len()
        );
        Ok(true)
    }
}

fn read_record(path: &Path) -> Result<Option<Record>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    let record = serde_json::from_slice(&text)
        .with_context(|| format!("{}: not the record of a conversion", path.display()))?;
    Ok(Some(record))
}

/// What differs between two conversions, for people.
fn difference(there: &Record, here: &Record) -> Option<String> {
    let mut parts = Vec::new();
    let names: std::collections::BTreeSet<&String> =
        there.settings.keys().chain(here.settings.keys()).collect();
    for name in names {
        let value = |r: &Record| r.settings.get(name).map_or("absent", String::as_str).to_string();
        if value(there) != value(here) {
            parts.push(format!("{name} is {} there and {} here", value(there), value(here)));
        }
    }
    if there.source != here.source {
        let changed = there.source.iter().zip(&here.source).find(|(a, b)| a != b);
        parts.push(match changed {
            Some((a, b)) if a.file == b.file => format!("the source's {} is another", a.file),
            _ => "the source's files are others".into(),
        });
    }
    if parts.is_empty() { None } else { Some(parts.join("; ")) }
}

/// Whether a conversion stopped before its first file was whole, so that nothing can be mixed.
fn nothing_finished(dir: &Path) -> Result<bool> {
    if dir.join(DENSE_FILE).exists() {
        return Ok(false);
    }
    for sub in [EXPERTS_DIR, SUMS_DIR].map(|sub| dir.join(sub)) {
        if sub.exists() && !is_empty(&sub)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a directory is absent or holds nothing of anybody's.
fn is_empty(dir: &Path) -> Result<bool> {
    if !dir.exists() {
        return Ok(true);
    }
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let ours = name.starts_with('.') || name == "lost+found";
        if !ours && !name.ends_with(&format!(".{PARTIAL}")) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(bits: &str) -> Record {
        let settings = BTreeMap::from([("--bits".to_string(), bits.to_string())]);
        Record { settings, source: Vec::new() }
    }

    #[test]
    fn another_setting_is_named() {
        let message = difference(&record("4"), &record("8")).unwrap();
        assert_eq!(message, "--bits is 4 there and 8 here");
        assert_eq!(difference(&record("4"), &record("4")), None);
    }

    #[test]
    fn settings_may_change_until_the_first_file_is_whole() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("new");
        let open = |bits| Destination::open(&dir, &record(bits), Place::New);
        drop(open("4").ok().unwrap());
        std::fs::write(dir.join(EXPERTS_DIR).join("layer_00.bin.partial"), "half").unwrap();
        drop(open("8").ok().unwrap());
        std::fs::write(dir.join(EXPERTS_DIR).join("layer_00.bin"), "whole").unwrap();
        drop(open("8").ok().unwrap());
        let message = open("4").err().unwrap().to_string();
        assert!(message.contains("--bits is 8 there and 4 here"), "{message}");
    }

    #[test]
    fn a_directory_in_use_or_not_ours_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("new");
        let Ok(Progressed::Open(open)) = Destination::open(&dir, &record("4"), Place::New) else {
            panic!("a new directory opens")
        };
        let again = Destination::open(&dir, &record("4"), Place::New).err().unwrap().to_string();
        assert!(again.contains("another conversion"), "{again}");
        drop(open);
        assert!(Destination::open(&dir, &record("4"), Place::New).is_ok());
        std::fs::write(temp.path().join("notes.txt"), "mine").unwrap();
        let foreign = Destination::open(temp.path(), &record("4"), Place::New).err().unwrap();
        assert!(foreign.to_string().contains("not empty"), "{foreign}");
    }
}
