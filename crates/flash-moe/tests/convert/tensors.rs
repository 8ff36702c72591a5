//! Reading and changing checkpoints and containers, whole tensors in memory.
//!
//! Stands apart from the code under test: it reads the files by their formats' own rules.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flash_moe_engine::container::Container;
use flash_moe_engine::shape::LayerId;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// One tensor.
#[derive(Clone, PartialEq, Debug)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// All tensors of a directory's safetensors files, by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Reads the files of a checkpoint, or the dense file of a container.
pub fn read(dir: &Path) -> Tensors {
    let mut all = Tensors::new();
    for path in safetensors_files(dir) {
        let bytes = std::fs::read(&path).expect("a safetensors file");
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        for (name, view) in file.tensors() {
            let tensor = Tensor {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            };
            all.insert(name, tensor);
        }
    }
    all
}

/// Replaces the weights of a checkpoint by one file.
pub fn write(dir: &Path, tensors: &Tensors) {
    for path in safetensors_files(dir) {
        std::fs::remove_file(path).expect("a file of ours");
    }
    let index = dir.join("model.safetensors.index.json");
    if index.exists() {
        std::fs::remove_file(index).expect("a file of ours");
    }
    let views = tensors.iter().map(|(name, t)| {
        (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("a consistent tensor"))
    });
    let bytes = safetensors::serialize(views, None).expect("tensors of known types");
    std::fs::write(dir.join("model.safetensors"), bytes).expect("a scratch file");
}

/// Changes the weights of a checkpoint.
pub fn edit(dir: &Path, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = read(dir);
    change(&mut tensors);
    write(dir, &tensors);
}

fn safetensors_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let paths = entries.map(|e| e.expect("an entry").path());
    paths.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect()
}

/// The parts of an expert's record by name, `gate.weight` to `down.biases`.
pub fn record(container: &Path, layer: usize, expert: usize) -> BTreeMap<String, Vec<u8>> {
    let opened = Container::open(container).expect("a container");
    let files = &opened.manifest().experts;
    let place =
        files.iter().position(|f| f.layer == LayerId(layer as u16)).expect("an expert layer");
    let (entry, layout) = (&files[place], &opened.layouts()[place]);
    let bytes = std::fs::read(container.join(&entry.file)).expect("a layer file");
    let record = &bytes[expert * entry.stride_bytes..][..entry.record_bytes];
    layout.parts().into_iter().map(|(name, range)| (name, record[range].to_vec())).collect()
}

/// All files below a directory with their contents, by relative path.
pub fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(folder).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                pending.push(path);
            } else {
                let bytes = std::fs::read(&path).expect("a file");
                found.insert(path.strip_prefix(dir).expect("below").to_path_buf(), bytes);
            }
        }
    }
    found
}

/// Widens BF16 or F32 values.
pub fn floats(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype {
        Dtype::BF16 => {
            let words = tensor.bytes.as_chunks::<2>().0.iter();
            words.map(|w| f32::from_bits(u32::from(u16::from_le_bytes(*w)) << 16)).collect()
        }
        Dtype::F32 => {
            tensor.bytes.as_chunks::<4>().0.iter().map(|w| f32::from_le_bytes(*w)).collect()
        }
        other => panic!("{other} is no float of these checkpoints"),
    }
}

/// One row of a matrix or stack as stored bytes.
pub fn row_bytes(tensor: &Tensor, row: usize) -> &[u8] {
    let cols: usize = *tensor.shape.last().expect("a matrix");
    let bytes = cols * tensor.dtype.bitsize() / 8;
    &tensor.bytes[row * bytes..][..bytes]
}
