//! `--hot-set`: what the cache of experts held when a run ended, kept for the next run.
//!
//! A small JSON file: the experts of the pool and how often they were used, most used first, bound
//! to the model by the hash of its manifest. It is a hint and never more: a file that is absent,
//! damaged or of another model leaves a run as it would be without, with a note, and a file that
//! cannot be written is a note too. A new file takes its name when it is whole.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flash_moe_engine::container::Container;
use flash_moe_engine::engine::Engine;
use flash_moe_engine::gpu::Gpu;
use flash_moe_engine::shape::{ExpertId, LayerId};
use serde::{Deserialize, Serialize};

/// Name of the file beside a model.
pub const FILE_NAME: &str = "hot-set.json";

const FORMAT: &str = "flash-moe hot set";
const VERSION: u32 = 1;
/// No file of ours is longer: 16 bytes for each of a million experts.
const BYTES_MAX: u64 = 16 << 20;

/// Where a hot set is kept.
#[derive(Clone, Debug)]
pub struct HotSetFile {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Contents {
    format: String,
    version: u32,
    /// xxh3-64 of the model's manifest, in hexadecimal.
    model: String,
    /// Layer, expert, uses; most used first.
    experts: Vec<(u16, u16, u32)>,
}

impl HotSetFile {
    /// A file that need not be there yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Begins to fill the engine's pool in the background. What is wrong with the file is a note.
    pub fn load(&self, engine: &Engine) {
        if has_no_pool(engine) {
            return note(
                "hot set neither read nor saved: the GPU's experts are read from the disk to where it reads them; \
                 --gpu-uploads staged takes the cache",
            );
        }
        match read(&self.path, engine.container()) {
            Ok(experts) => {
                let places = experts.into_iter();
                let places = places.map(|(layer, expert, n)| (LayerId(layer), ExpertId(expert), n));
                engine.store().preload(places);
            }
            Err(error) => note(&format!("hot set ignored: {}: {error:#}", self.path.display())),
        }
    }

    /// Keeps what the engine's pool holds. Failing to is a note.
    pub fn save(&self, engine: &Engine) {
        if has_no_pool(engine) {
            return;
        }
        let hot = engine.store().hot_set().into_iter().filter(|&(_, _, uses)| uses > 0);
        let contents = Contents {
            format: FORMAT.into(),
            version: VERSION,
            model: identity(engine.container()),
            experts: hot.map(|(layer, expert, uses)| (layer.0, expert.0, uses)).collect(),
        };
        if let Err(error) = write(&self.path, &contents) {
            let advice = "--hot-set FILE keeps it elsewhere, --hot-set off keeps none";
            note(&format!("hot set not saved: {}: {error:#}; {advice}", self.path.display()));
        }
    }
}

/// Whether experts pass by the pool, which would leave nothing of what was kept before.
fn has_no_pool(engine: &Engine) -> bool {
    engine.gpu().is_some_and(Gpu::is_in_place)
}

fn note(text: &str) {
    crate::serve::log::note(&format!("note: {text}"));
}

fn identity(container: &Container) -> String {
    format!("{:016x}", container.identity())
}

/// The experts of a file; none if there is no file.
fn read(path: &Path, container: &Container) -> Result<Vec<(u16, u16, u32)>> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= BYTES_MAX, "larger than any hot set");
    let contents: Contents = serde_json::from_slice(&bytes).context("not a hot set")?;
    ensure!(contents.format == FORMAT, "not a hot set");
    let version = contents.version;
    ensure!(version == VERSION, "version {version}, this build reads {VERSION}");
    ensure!(contents.model == identity(container), "of another model");
    Ok(contents.experts)
}

/// Writes beside the name, then renames: a reader sees the old file or the new one.
fn write(path: &Path, contents: &Contents) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(partial);
    let outcome = fs::write(&partial, serde_json::to_vec(contents)?)
        .and_then(|()| fs::rename(&partial, path));
    if outcome.is_err() {
        // What went wrong is in `outcome`; a leftover that cannot be removed adds nothing to it.
        fs::remove_file(&partial).unwrap_or(());
    }
    Ok(outcome?)
}
