//! `flash-moe verify`: every byte of a container against its checksums.
//!
//! Sizes first, then the checksum files, then every part of every record and every dense tensor, on
//! all cores. Collects what differs instead of stopping at the first, so that one bad block is told
//! from a bad copy. Changes nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::container::{
    Container, ExpertFile, MANIFEST_FILE, Manifest, RecordLayout, read_safetensors_header,
};
use flash_moe_engine::memory::Block;
use flash_moe_engine::store::read::read_exact_at;
use safetensors::tensor::TensorInfo;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::convert::progress::Progress;
use crate::convert::workers::Workers;
use crate::options::convert::VerifyArgs;
use crate::say::{self, tell};

/// Mismatches that are printed; the rest are counted.
const SHOWN: usize = 20;
/// Bytes of a dense tensor read at once.
const CHUNK_BYTES: usize = 4 << 20;

/// Runs the command.
///
/// # Errors
/// The directory is no container, or something in it is not what was written.
pub fn run(args: &VerifyArgs) -> Result<()> {
    let dir = &args.dir;
    let manifest = read_manifest(dir)?;
    let problems = Problems::default();
    check_sizes(dir, &manifest, &problems);
    problems.conclude("sizes")?;
    let container = Container::open(dir)?;

    let mut jobs = dense_jobs(dir, container.manifest(), &problems)?;
    for (kind, entry) in expert_files(container.manifest()) {
        if let Some(records) = Records::open(dir, kind, entry, &container, &problems)? {
            jobs.extend((0..entry.experts).map(|expert| Job::Record(records.clone(), expert)));
        }
    }
    let total = jobs.iter().map(Job::bytes).sum();
    let widest = jobs.iter().map(Job::buffer_bytes).max().unwrap_or(0);
    let workers = Workers::new(args.threads, widest)?;
    let progress = Progress::new(total, args.quiet);
    workers.run(
        jobs.len(),
        || Block::zeroed(widest),
        |i, block| {
            jobs[i].check(block.bytes_mut(), &problems)?;
            progress.read(jobs[i].bytes());
            Ok(())
        },
    )?;
    progress.finish();
    problems.conclude("checksums")?;
    if !args.quiet {
        let count = jobs.len();
        let text =
            format!("{}: {count} tensors and records, all as they were written", dir.display());
        say::line(&text)?;
    }
    Ok(())
}

#[derive(Default)]
struct Problems(Mutex<Vec<String>>);

impl Problems {
    fn add(&self, problem: String) {
        self.0.lock().expect("nobody panics while holding it").push(problem);
    }

    /// Prints what was found, if anything, and makes an error of it.
    fn conclude(&self, what: &str) -> Result<()> {
        let mut found = self.0.lock().expect("nobody panics while holding it");
        found.sort();
        for problem in found.iter().take(SHOWN) {
            tell!("{problem}");
        }
        if found.len() > SHOWN {
            tell!("... and {} more", found.len() - SHOWN);
        }
        if found.is_empty() { Ok(()) } else { bail!("{what}: {} mismatches", found.len()) }
    }
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST_FILE);
    let Ok(text) = std::fs::read(&path) else {
        // Opening says best what is missing.
        Container::open(dir)?;
        bail!("{}: cannot be read", path.display());
    };
    match serde_json::from_slice(&text) {
        Ok(manifest) => Ok(manifest),
        Err(error) => {
            Container::open(dir)?;
            Err(error).with_context(|| path.display().to_string())
        }
    }
}

/// The expert files with the word that precedes their layer's number.
fn expert_files(manifest: &Manifest) -> impl Iterator<Item = (&'static str, &ExpertFile)> {
    let trunk = manifest.experts.iter().map(|e| ("layer", e));
    trunk.chain(manifest.mtp_experts.iter().map(|e| ("mtp layer", e)))
}

fn check_sizes(dir: &Path, manifest: &Manifest, problems: &Problems) {
    let mut expected = vec![(manifest.dense.file.clone(), manifest.dense.bytes)];
    for (_, entry) in expert_files(manifest) {
        expected.push((entry.file.clone(), (entry.stride_bytes * entry.experts) as u64));
    }
    for (file, bytes) in expected {
        match std::fs::metadata(dir.join(&file)) {
            Err(error) => problems.add(format!("{file}: {error}")),
            Ok(found) if found.len() != bytes => {
                problems.add(format!("{file}: {} bytes, expected {bytes}", found.len()));
            }
            Ok(_) => {}
        }
    }
    let tokenizer = dir.join("tokenizer.json");
    if !tokenizer.exists() {
        problems.add("tokenizer.json: missing".into());
    }
}

enum Job {
    Tensor { file: std::sync::Arc<Opened>, name: String, start: u64, bytes: u64, checksum: String },
    Record(std::sync::Arc<Records>, usize),
}

struct Opened {
    path: PathBuf,
    file: File,
}

impl Opened {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        Ok(Self { path, file })
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.file, buffer, offset)
            .with_context(|| format!("{} at offset {offset}", self.path.display()))
    }
}

/// The records of one layer and the checksums that they must have.
struct Records {
    /// `layer 3`, `mtp layer 0`.
    label: String,
    file: Opened,
    layout: RecordLayout,
    stride: usize,
    sums: Vec<u64>, // [experts][parts]
}

impl Records {
    /// Opens a layer's records; `None` if their checksums themselves are damaged.
    fn open(
        dir: &Path,
        kind: &str,
        entry: &ExpertFile,
        container: &Container,
        problems: &Problems,
    ) -> Result<Option<std::sync::Arc<Self>>> {
        let layout = entry.layout(container.shape())?;
        let path = dir.join(&entry.sums_file);
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let expected = entry.experts * layout.parts().len() * 8;
        let found = format!("{:016x}", xxh3_64(&bytes));
        if bytes.len() != expected || found != entry.sums_checksum {
            problems.add(format!(
                "{}: {} bytes with checksum {found}, expected {expected} with {}",
                entry.sums_file,
                bytes.len(),
                entry.sums_checksum
            ));
            return Ok(None);
        }
        let sums = bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        Ok(Some(std::sync::Arc::new(Self {
            label: format!("{kind} {}", entry.layer),
            file: Opened::open(dir.join(&entry.file))?,
            layout,
            stride: entry.stride_bytes,
            sums,
        })))
    }

    fn check(&self, expert: usize, record: &mut [u8], problems: &Problems) -> Result<()> {
        self.file.read(record, (expert * self.stride) as u64)?;
        let parts = self.layout.parts();
        let expected = &self.sums[expert * parts.len()..][..parts.len()];
        for ((part, range), &expected) in parts.into_iter().zip(expected) {
            let found = xxh3_64(&record[range]);
            if found != expected {
                problems.add(format!(
                    "{} expert {expert} {part}: checksum {found:016x}, expected {expected:016x}",
                    self.label
                ));
            }
        }
        if record[self.layout.record_bytes()..].iter().any(|&byte| byte != 0) {
            problems.add(format!("{} expert {expert} padding: not zero", self.label));
        }
        Ok(())
    }
}

impl Job {
    fn bytes(&self) -> u64 {
        match self {
            Self::Tensor { bytes, .. } => *bytes,
            Self::Record(records, _) => records.stride as u64,
        }
    }

    fn buffer_bytes(&self) -> usize {
        match self {
            Self::Tensor { .. } => CHUNK_BYTES,
            Self::Record(records, _) => records.stride,
        }
    }

    fn check(&self, buffer: &mut [u8], problems: &Problems) -> Result<()> {
        match self {
            Self::Record(records, expert) => {
                records.check(*expert, &mut buffer[..records.stride], problems)
            }
            Self::Tensor { file, name, start, bytes, checksum } => {
                let mut hash = Xxh3::new();
                let mut done = 0;
                while done < *bytes {
                    let chunk = &mut buffer[..CHUNK_BYTES.min((bytes - done) as usize)];
                    file.read(chunk, start + done)?;
                    hash.update(chunk);
                    done += chunk.len() as u64;
                }
                let found = format!("{:016x}", hash.digest());
                if found != *checksum {
                    problems.add(format!("tensor {name}: checksum {found}, expected {checksum}"));
                }
                Ok(())
            }
        }
    }
}

fn dense_jobs(dir: &Path, manifest: &Manifest, problems: &Problems) -> Result<Vec<Job>> {
    let opened = std::sync::Arc::new(Opened::open(dir.join(&manifest.dense.file))?);
    let (header, data_start) = read_safetensors_header(&opened.path, &opened.file)?;
    let mut before = vec![0u8; data_start as usize];
    opened.read(&mut before, 0)?;
    let found = format!("{:016x}", xxh3_64(&before));
    if found != manifest.dense.header_checksum {
        let expected = &manifest.dense.header_checksum;
        problems
            .add(format!("{} header: checksum {found}, expected {expected}", manifest.dense.file));
    }
    let end = data_start + header.data_len() as u64;
    ensure!(end == manifest.dense.bytes, "{}: damaged header", opened.path.display());
    let mut jobs = Vec::new();
    let mut checked = 0;
    for name in header.offset_keys() {
        let Some(TensorInfo { data_offsets: (start, end), .. }) = header.info(&name) else {
            continue;
        };
        let Some(checksum) = manifest.dense.checksums.get(&name) else {
            problems.add(format!("tensor {name}: not in the manifest"));
            continue;
        };
        checked += 1;
        jobs.push(Job::Tensor {
            file: opened.clone(),
            start: data_start + *start as u64,
            bytes: (end - start) as u64,
            checksum: checksum.clone(),
            name,
        });
    }
    if checked != manifest.dense.checksums.len() {
        for name in manifest.dense.checksums.keys().filter(|n| header.info(n).is_none()) {
            problems.add(format!("tensor {name}: not in {}", manifest.dense.file));
        }
    }
    Ok(jobs)
}
