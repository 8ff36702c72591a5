//! `generation_config.json`: how a model's makers meant it to be sampled, and where it stops.
//!
//! The file is optional. What it says wins over `config.json`; what it leaves out takes the hub's
//! defaults, so that the same directory behaves as it does in the reference library.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::sampler::Sampling;
use crate::shape::{Shape, TokenId, eos_ids};

/// Name of the file in a model directory.
pub const GENERATION_FILE: &str = "generation_config.json";

/// What the file says; empty where there is none.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerationConfig {
    fields: Value,
}

impl GenerationConfig {
    /// Reads the file of a model directory; a directory without it is not an error.
    ///
    /// # Errors
    /// The file is unreadable, not JSON, or holds something that is not an object.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(GENERATION_FILE);
        if !path.exists() {
            return Ok(Self { fields: Value::Null });
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let malformed = |what: String| Error::Container(format!("{}: {what}", path.display()));
        let fields: Value =
            serde_json::from_str(&text).map_err(|e| malformed(format!("not JSON: {e}")))?;
        if !fields.is_object() {
            return Err(malformed("not a JSON object".into()));
        }
        Ok(Self { fields })
    }

    /// The tokens that end a text: the file's, or those of `config.json` where it names none.
    pub fn eos(&self, shape: &Shape) -> Vec<TokenId> {
        let stated = eos_ids(self.fields.get("eos_token_id"));
        let ids = if stated.is_empty() { &shape.eos } else { &stated };
        ids.iter().copied().map(TokenId).collect()
    }

    /// The sampling that the file asks for; greedy unless it says `do_sample`. The seed is 0.
    ///
    /// # Errors
    /// A setting that is not a number or is outside its range.
    pub fn sampling(&self) -> Result<Sampling> {
        let mut sampling = self.when_sampled()?;
        if self.fields.get("do_sample").and_then(Value::as_bool) != Some(true) {
            sampling.temperature = 0.0;
        }
        Ok(sampling)
    }

    /// As [`GenerationConfig::sampling`], but taking the file's settings whatever `do_sample` says.
    ///
    /// # Errors
    /// A setting that is not a number or is outside its range.
    pub fn when_sampled(&self) -> Result<Sampling> {
        let number = |name: &str, default: f64| match self.fields.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| {
                Error::Sampling(format!("{GENERATION_FILE}: {name} is {value}, expected a number"))
            }),
        };
        let sampling = Sampling {
            temperature: number("temperature", 1.0)? as f32,
            // The reference keeps 50 where a file is silent; without a file nothing is cut.
            top_k: number("top_k", if self.fields.is_null() { 0.0 } else { 50.0 })? as usize,
            top_p: number("top_p", 1.0)? as f32,
            min_p: number("min_p", 0.0)? as f32,
            repetition_penalty: number("repetition_penalty", 1.0)? as f32,
            presence_penalty: number("presence_penalty", 0.0)? as f32,
            frequency_penalty: number("frequency_penalty", 0.0)? as f32,
            logit_bias: Vec::new(),
            seed: 0,
        };
        sampling.check()?;
        Ok(sampling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(fields: Value) -> GenerationConfig {
        GenerationConfig { fields }
    }

    fn shape() -> Shape {
        Shape::from_config(&json!({
            "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "rope_theta": 1e4,
            "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64,
            "max_position_embeddings": 16, "eos_token_id": 3
        }))
        .unwrap()
    }

    #[test]
    fn the_file_s_end_tokens_win_over_the_model_s() {
        let ids = |fields| config(fields).eos(&shape()).iter().map(|t| t.0).collect::<Vec<_>>();
        assert_eq!(ids(json!({ "eos_token_id": [5, 4] })), [5, 4]);
        assert_eq!(ids(json!({ "eos_token_id": 5 })), [5]);
        assert_eq!(ids(json!({})), [3]);
        assert_eq!(ids(Value::Null), [3]);
    }

    #[test]
    fn settings_are_the_file_s_and_greedy_unless_it_samples() {
        let fields = json!({ "do_sample": true, "temperature": 0.7, "top_p": 0.9, "top_k": 20 });
        let expected = Sampling { temperature: 0.7, top_p: 0.9, top_k: 20, ..Sampling::greedy() };
        assert_eq!(config(fields.clone()).sampling().unwrap(), expected);
        let mut silent = fields;
        silent["do_sample"] = json!(false);
        assert!(config(silent.clone()).sampling().unwrap().is_greedy());
        assert_eq!(config(silent).when_sampled().unwrap(), expected);
        assert_eq!(config(json!({ "do_sample": true })).sampling().unwrap().top_k, 50);
        assert_eq!(config(Value::Null).sampling().unwrap(), Sampling::greedy());
    }

    #[test]
    fn bad_settings_are_named() {
        for (fields, expected) in [
            (json!({ "temperature": "hot" }), "temperature is \"hot\""),
            (json!({ "top_p": 7 }), "top_p is 7"),
        ] {
            let error = config(fields).sampling().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_empty_and_a_malformed_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::open(dir.path()).unwrap(), config(Value::Null));
        for text in ["{", "[]"] {
            std::fs::write(dir.path().join(GENERATION_FILE), text).unwrap();
            let error = GenerationConfig::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("generation_config.json: not"), "{error}");
        }
    }
}
