//! The `--trace` file: what the forward pass computed, as safetensors.
//!
//! Array names, shapes and types are those of the reference's golden files, so that the two are
//! compared name by name. The file is made before the model runs: a path that cannot be written is
//! found at once.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::trace::{Array, Trace, Values};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A trace file that is open and empty.
pub struct TraceFile {
    path: PathBuf,
    file: File,
}

impl TraceFile {
    /// Makes the file, or empties one that is there.
    ///
    /// # Errors
    /// The path cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.into(), file })
    }

    /// Writes everything, with the prompt as `input_ids` and the output as `greedy_ids`.
    ///
    /// # Errors
    /// Writing failed.
    pub fn write(mut self, mut trace: Trace, prompt: &[TokenId], output: &[TokenId]) -> Result<()> {
        for (name, ids) in [("input_ids", prompt), ("greedy_ids", output)] {
            let ids: Vec<i32> = ids.iter().map(|token| token.0 as i32).collect();
            trace.put(name, &[ids.len()], Values::I32(ids));
        }
        let bytes: Vec<Vec<u8>> = trace.arrays.values().map(bytes).collect();
        let arrays = trace.arrays.iter().zip(&bytes);
        let views: Result<Vec<_>, _> = arrays
            .map(|((name, array), bytes)| {
                let view = TensorView::new(dtype(array), array.shape.clone(), bytes)?;
                Ok::<_, safetensors::SafeTensorError>((name, view))
            })
            .collect();
        let named = || self.path.display().to_string();
        let file = safetensors::serialize(views.with_context(named)?, None).with_context(named)?;
        self.file.write_all(&file).with_context(named)
    }
}

fn dtype(array: &Array) -> Dtype {
    match array.values {
        Values::F32(_) => Dtype::F32,
        Values::I32(_) => Dtype::I32,
    }
}

/// The values, little-endian.
fn bytes(array: &Array) -> Vec<u8> {
    match &array.values {
        Values::F32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Values::I32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn arrays_keep_their_names_shapes_and_types() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let mut trace = Trace::default();
        trace.put("prefill.logits", &[1, 2], Values::F32(vec![1.5, f32::NEG_INFINITY]));
        let ids = [TokenId(3), TokenId(4)];
        TraceFile::create(&path).unwrap().write(trace, &ids, &ids[1..]).unwrap();

        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("prefill.logits").unwrap();
        assert_eq!((logits.dtype(), logits.shape()), (Dtype::F32, &[1, 2][..]));
        assert_eq!(logits.data()[..4], 1.5f32.to_le_bytes());
        let input = file.tensor("input_ids").unwrap();
        assert_eq!((input.dtype(), input.data()), (Dtype::I32, &[3, 0, 0, 0, 4, 0, 0, 0][..]));
        assert_eq!(file.tensor("greedy_ids").unwrap().shape(), [1]);
    }

    #[test]
    fn a_path_that_cannot_be_written_is_named() {
        let Err(error) = TraceFile::create(Path::new("/nowhere/at/all")) else { panic!("written") };
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
