//! What kind of checkpoint it is: hub or MLX, plain or quantised, and how.
//!
//! Looks at config.json and at the tensors; where they disagree about precision the tensors are
//! believed, later, one by one. Refuses by name every quantisation that is not read here.

use anyhow::{Result, bail, ensure};
use safetensors::Dtype;
use serde_json::Value;

use super::source::Source;

/// Conventions of a checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scheme {
    /// Whether MLX wrote it: norms hold their effective weight.
    pub mlx: bool,
    /// Whether it is quantised in the MLX way: what is not quantised in it is so on purpose.
    pub quantised: bool,
    /// For people: `hub BF16`, `MLX 4-bit`.
    pub description: String,
}

/// Finds out the conventions.
///
/// # Errors
/// A quantisation that is not supported, by name.
pub fn scheme_of(config: &Value, source: &Source) -> Result<Scheme> {
    let fp8 = check_quantisation(config)?;
    check_tensor_names(source)?;
    let quantised = source.names().any(|(name, _)| {
        name.strip_suffix(".scales")
            .is_some_and(|base| source.find(&format!("{base}.biases")).is_some())
    });
    let mlx = match convolution_is_mlx(source) {
        // It decides: MLX itself tells by it whether norms have been shifted.
        Some(mlx) => mlx,
        None => {
            quantised
                || config.get("quantization").is_some()
                || source.names().any(|(name, id)| {
                    name.contains(".switch_mlp.")
                        || source.tensor(id).name.starts_with("language_model.model.")
                })
        }
    };
    let maker = if mlx { "MLX" } else { "hub" };
    let precision = if fp8 {
        "FP8".into()
    } else if quantised {
        let bits = config.get("quantization").or_else(|| config.get("quantization_config"));
        match bits.and_then(|q| q.get("bits")).and_then(Value::as_u64) {
            Some(bits) => format!("{bits}-bit"),
            None => "quantised".into(),
        }
    } else {
        let embedding = source.find("model.embed_tokens.weight");
        embedding.map_or(Dtype::BF16, |id| source.tensor(id).dtype).to_string()
    };
    Ok(Scheme { mlx, quantised, description: format!("{maker} {precision}") })
}

/// Whether convolutions are stored channels last; `None` if there are none.
fn convolution_is_mlx(source: &Source) -> Option<bool> {
    let (_, id) = source.names().find(|(name, _)| name.ends_with(".conv1d.weight"))?;
    Some(source.tensor(id).shape.last() == Some(&1))
}

/// Whether the configuration says FP8; an error for whatever else we cannot read.
fn check_quantisation(config: &Value) -> Result<bool> {
    let text = config.get("text_config");
    let block = |key: &str| config.get(key).or_else(|| text.and_then(|t| t.get(key)));
    if let Some(mlx) = block("quantization") {
        check_mlx_modes(mlx)?;
    }
    let Some(quantisation) = block("quantization_config").filter(|q| !q.is_null()) else {
        return Ok(false);
    };
    match quantisation.get("quant_method").and_then(Value::as_str) {
        None => {
            check_mlx_modes(quantisation)?;
            Ok(false)
        }
        Some("fp8") => {
            let format = quantisation.get("fmt").and_then(Value::as_str).unwrap_or("e4m3");
            ensure!(format == "e4m3", "FP8 format {format:?} is not supported, only e4m3");
            let blocks = &quantisation["weight_block_size"];
            ensure!(
                *blocks == serde_json::json!([128, 128]),
                "FP8 with weight_block_size {blocks} is not supported, only [128, 128]"
            );
            Ok(true)
        }
        Some(method) => bail!(
            "quantisation {method:?} is not supported; convert the BF16 or FP8 checkpoint or its MLX conversion"
        ),
    }
}

/// Modes stand in the block and may stand in the overrides of single modules.
fn check_mlx_modes(block: &Value) -> Result<()> {
    let overrides = block.as_object().into_iter().flat_map(|fields| fields.values());
    for part in std::iter::once(block).chain(overrides) {
        if let Some(mode) = part.get("mode").and_then(Value::as_str) {
            ensure!(
                mode == "affine",
                "MLX quantisation mode {mode:?} is not supported, only affine"
            );
        }
    }
    Ok(())
}

fn check_tensor_names(source: &Source) -> Result<()> {
    for (name, _) in source.names() {
        let kind = match name.rsplit('.').next() {
            Some("qweight" | "qzeros") => "GPTQ or AWQ",
            Some("weight_packed") => "compressed-tensors",
            Some("weight_scale_2") => "NVFP4",
            _ => continue,
        };
        bail!(
            "tensor {name}: {kind} weights are not supported; convert the BF16 or FP8 checkpoint or its MLX conversion"
        );
    }
    Ok(())
}
