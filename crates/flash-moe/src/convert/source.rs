//! A checkpoint as it lies on disk: which file holds which tensor, and where.
//!
//! Reads headers only; tensor bytes are read on demand, by position, into the caller's buffer.
//! Published files have unpadded headers, so a tensor may start at an odd offset: no view of a file
//! is ever taken. Refuses a missing or truncated shard before anything is written. Names are
//! brought to one spelling (`model.layers.N...`, `lm_head...`, `mtp...`), whatever the prefix.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::container::read_safetensors_header;
use flash_moe_engine::store::read::read_exact_at;
use safetensors::Dtype;
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";

/// A tensor of a [`Source`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TensorId(pub usize);

/// Where a tensor lies and what it is.
#[derive(Debug)]
pub struct Tensor {
    /// Name as the checkpoint spells it.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Size in bytes.
    pub bytes: u64,
    file: usize,
    offset: u64,
}

/// One file of the checkpoint, as the record of a conversion remembers it.
#[derive(Clone, PartialEq, Debug, serde::Serialize, serde::Deserialize)]
pub struct FileIdentity {
    /// File name.
    pub file: String,
    /// Size in bytes.
    pub bytes: u64,
    /// xxh3-64 of the header and of samples of the data, in hexadecimal.
    pub fingerprint: String,
}

struct OpenFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    data_start: u64,
}

/// An opened checkpoint.
pub struct Source {
    files: Vec<OpenFile>,
    tensors: Vec<Tensor>,
    by_name: BTreeMap<String, TensorId>,
    /// Tensors of the vision tower, which are left behind: how many and how large.
    pub vision: (usize, u64),
}

impl Source {
    /// Opens the safetensors files of a checkpoint directory and checks their sizes.
    ///
    /// # Errors
    /// No safetensors, a shard that is missing or truncated, a tensor that is not where the index
    /// says, two tensors of one name.
    pub fn open(dir: &Path) -> Result<Self> {
        let (names, weight_map) = shards(dir)?;
        let mut source = Self::empty();
        for name in &names {
            source.add_shard(&dir.join(name), |tensor| match &weight_map {
                Some(map) => map.get(tensor).is_some_and(|file| file == name),
                None => true,
            })?;
        }
        let found: HashSet<&str> = source.tensors.iter().map(|t| t.name.as_str()).collect();
        for (tensor, file) in weight_map.iter().flatten() {
            ensure!(
                found.contains(tensor.as_str()) || is_vision(tensor),
                "{INDEX_FILE} says that {tensor} is in {file}, but it is not"
            );
        }
        Ok(source)
    }

    /// Opens the dense weights of the original engine: one headerless file and a JSON beside it.
    ///
    /// # Errors
    /// A file that is missing or malformed, a tensor that ends beyond the end of the file.
    pub fn open_original(dir: &Path, tensors: &Value) -> Result<Self> {
        let path = dir.join("model_weights.bin");
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        let bytes = file.metadata()?.len();
        let mut source = Self::empty();
        source.files.push(OpenFile { path, file, bytes, data_start: 0 });
        let tensors = tensors.as_object().context("model_weights.json: `tensors` is no object")?;
        for (name, entry) in tensors {
            let malformed = || format!("model_weights.json: malformed entry of {name}");
            let dtype: Dtype =
                serde_json::from_value(entry["dtype"].clone()).with_context(malformed)?;
            let shape: Vec<usize> =
                serde_json::from_value(entry["shape"].clone()).with_context(malformed)?;
            let offset = entry["offset"].as_u64().with_context(malformed)?;
            let size = entry["size"].as_u64().with_context(malformed)?;
            let expected = shape
                .iter()
                .try_fold(dtype.bitsize(), |bits, &n| bits.checked_mul(n))
                .with_context(malformed)?;
            ensure!(expected as u64 == size * 8, "{}: size and shape disagree", malformed());
            ensure!(
                offset.checked_add(size).is_some_and(|end| end <= bytes),
                "model_weights.bin: {name} ends beyond the file's {bytes} bytes: truncated"
            );
            source.add(Tensor {
                name: name.clone(),
                dtype,
                shape,
                bytes: size,
                file: 0,
                offset,
            })?;
        }
        Ok(source)
    }

    /// The tensor of a name in the common spelling.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        self.by_name.get(name).copied()
    }

    /// All tensors in the common spelling, by name.
    pub fn names(&self) -> impl Iterator<Item = (&str, TensorId)> {
        self.by_name.iter().map(|(name, &id)| (name.as_str(), id))
    }

    /// What a tensor is.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.0]
    }

    /// Reads a tensor's bytes from `start` on until the buffer is full.
    ///
    /// # Errors
    /// The system's error with file and tensor; the range ends beyond the tensor.
    pub fn read(&self, id: TensorId, start: u64, buffer: &mut [u8]) -> Result<()> {
        let tensor = self.tensor(id);
        assert!(start + buffer.len() as u64 <= tensor.bytes, "read beyond {}", tensor.name);
        let file = &self.files[tensor.file];
        read_exact_at(&file.file, buffer, tensor.offset + start)
            .with_context(|| format!("{}: reading {} at {start}", file.path.display(), tensor.name))
    }

    /// Size and fingerprint of every file.
    ///
    /// Checkpoints of one architecture have equal headers and sizes, so the fingerprint also covers
    /// samples of the data: a resumed conversion must not mix two of them.
    ///
    /// # Errors
    /// A sample cannot be read.
    pub fn identity(&self) -> Result<Vec<FileIdentity>> {
        self.files
            .iter()
            .map(|f| f.identity().with_context(|| f.path.display().to_string()))
            .collect()
    }

    fn empty() -> Self {
        Self { files: Vec::new(), tensors: Vec::new(), by_name: BTreeMap::new(), vision: (0, 0) }
    }

    fn add_shard(&mut self, path: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let file = File::open(path).with_context(|| format!("shard {}", path.display()))?;
        let bytes = file.metadata()?.len();
        let (header, data_start) = read_safetensors_header(path, &file)?;
        let expected = data_start + header.data_len() as u64;
        ensure!(
            bytes == expected,
            "{}: {bytes} bytes, its header promises {expected}: {}",
            path.display(),
            if bytes < expected { "the shard is truncated" } else { "the shard is damaged" }
        );
        let index = self.files.len();
        self.files.push(OpenFile { path: path.into(), file, bytes, data_start });
        for name in header.offset_keys() {
            let Some(info) = header.info(&name).filter(|_| wanted(&name)) else { continue };
            self.add(Tensor {
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
                file: index,
                offset: data_start + info.data_offsets.0 as u64,
                name,
            })?;
        }
        Ok(())
    }

    fn add(&mut self, tensor: Tensor) -> Result<()> {
        if is_vision(&tensor.name) {
            self.vision.0 += 1;
            self.vision.1 += tensor.bytes;
            return Ok(());
        }
        let id = TensorId(self.tensors.len());
        let name = common_name(&tensor.name);
        if self.by_name.insert(name, id).is_some() {
            bail!("tensor {} occurs twice in the checkpoint", tensor.name);
        }
        self.tensors.push(tensor);
        Ok(())
    }
}

impl OpenFile {
    fn identity(&self) -> Result<FileIdentity> {
        const SAMPLES: u64 = 16;
        let mut hash = Xxh3::new();
        let mut buffer = vec![0u8; self.data_start as usize];
        read_exact_at(&self.file, &mut buffer, 0)?;
        hash.update(&buffer);
        let data_bytes = self.bytes - self.data_start;
        buffer.resize(4096.min(data_bytes) as usize, 0);
        for sample in 0..SAMPLES {
            let last_start = data_bytes - buffer.len() as u64;
            read_exact_at(
                &self.file,
                &mut buffer,
                self.data_start + last_start * sample / (SAMPLES - 1),
            )?;
            hash.update(&buffer);
        }
        let file = self.path.file_name().unwrap_or(self.path.as_os_str());
        Ok(FileIdentity {
            file: file.to_string_lossy().into_owned(),
            bytes: self.bytes,
            fingerprint: format!("{:016x}", hash.digest()),
        })
    }
}

type WeightMap = BTreeMap<String, String>;

/// Names of the checkpoint's files and, where there is an index, which tensor is in which.
fn shards(dir: &Path) -> Result<(Vec<String>, Option<WeightMap>)> {
    let index_path = dir.join(INDEX_FILE);
    if index_path.exists() {
        let text = std::fs::read_to_string(&index_path)
            .with_context(|| index_path.display().to_string())?;
        let mut index: Value = serde_json::from_str(&text)
            .with_context(|| format!("{} is not JSON", index_path.display()))?;
        let map: WeightMap = serde_json::from_value(index["weight_map"].take())
            .with_context(|| format!("{}: weight_map", index_path.display()))?;
        let mut names: Vec<String> = map.values().cloned().collect();
        names.sort();
        names.dedup();
        ensure!(!names.is_empty(), "{}: weight_map is empty", index_path.display());
        for name in &names {
            ensure!(!name.contains(['/', '\\']), "{INDEX_FILE}: {name:?} is not a plain file name");
            ensure!(dir.join(name).exists(), "shard {name}, named by {INDEX_FILE}, is missing");
        }
        return Ok((names, Some(map)));
    }
    if dir.join(SINGLE_FILE).exists() {
        return Ok((vec![SINGLE_FILE.into()], None));
    }
    Ok((unindexed_shards(dir)?, None))
}

fn unindexed_shards(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            names.push(name);
        }
    }
    names.sort();
    let Some(first) = names.first() else {
        bail!("{}: no {INDEX_FILE} and no model*.safetensors", dir.display());
    };
    // `model-00001-of-00046.safetensors` says how many there must be.
    let stem = first.trim_end_matches(".safetensors");
    if let Some((_, count)) = stem.rsplit_once("-of-")
        && let Ok(expected) = count.parse::<usize>()
    {
        ensure!(
            names.len() == expected,
            "{}: {} shards present, their names promise {expected}",
            dir.display(),
            names.len()
        );
    }
    Ok(names)
}

fn is_vision(name: &str) -> bool {
    ["model.visual.", "visual.", "vision_tower.", "model.vision_tower."]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// The spelling used everywhere after this file: hub multimodal checkpoints nest `language_model`
/// inside `model`, MLX ones the other way round.
fn common_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("model.language_model.") {
        return format!("model.{rest}");
    }
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    match name.strip_prefix("model.mtp.") {
        Some(rest) => format!("mtp.{rest}"),
        None => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_becomes_one_spelling() {
        for (name, expected) in [
            ("model.language_model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
            ("language_model.model.norm.weight", "model.norm.weight"),
            ("language_model.lm_head.scales", "lm_head.scales"),
            ("model.norm.weight", "model.norm.weight"),
            ("mtp.fc.weight", "mtp.fc.weight"),
            ("language_model.mtp.fc.weight", "mtp.fc.weight"),
        ] {
            assert_eq!(common_name(name), expected);
        }
        assert!(is_vision("model.visual.blocks.0.norm1.weight"));
        assert!(is_vision("vision_tower.pos_embed.weight"));
        assert!(!is_vision("model.language_model.norm.weight"));
    }
}
