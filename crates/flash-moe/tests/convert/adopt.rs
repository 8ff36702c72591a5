//! Adopting a directory in the original engine's layout, made here from an MLX checkpoint.
//!
//! The expert files must stay as they are, byte for byte, and the container must compute what the
//! checkpoint's own conversion computes.

use std::path::Path;

use flash_moe_engine::container::Container;
use serde_json::{Map, Value, json};

use super::Case;
use super::tensors::{files, read};
use crate::program::text;

/// A directory as the original's two scripts leave it, beside the container of the same checkpoint.
struct Original {
    case: Case,
}

impl Original {
    fn new(variant: &str, folder: &str) -> Self {
        let case = Case::new(variant);
        let container = case.convert("container", &[]);
        let dir = case.home.path("original");
        std::fs::create_dir_all(dir.join(folder)).expect("a directory");
        write_packed(&container, &dir.join(folder));
        write_weights(&case.source(), &dir);
        for name in
            ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
        {
            std::fs::copy(case.source().join(name), dir.join(name)).expect("a small file");
        }
        Self { case }
    }

    fn path(&self) -> String {
        text(&self.case.home.path("original"))
    }

    fn adopt(&self, flags: &[&str]) -> Value {
        let mut arguments = vec!["convert", "--adopt"];
        let path = self.path();
        arguments.push(&path);
        arguments.extend_from_slice(flags);
        self.case.home.succeed(&arguments);
        self.case.home.succeed(&["verify", &path]);
        let manifest = std::fs::read(self.case.home.path("original/flash-moe.json"));
        serde_json::from_slice(&manifest.expect("a manifest")).expect("JSON")
    }

    fn refuse(&self, flags: &[&str]) -> String {
        let path = self.path();
        let mut arguments = vec!["convert", "--adopt", &path];
        arguments.extend_from_slice(flags);
        self.case.home.refuse(&arguments)
    }
}

#[test]
fn an_adopted_directory_equals_the_converted_checkpoint() {
    let original = Original::new("q35-r4-q4", "packed_experts");
    let dir = original.case.home.path("original");
    let before = files(&dir);
    let manifest = original.adopt(&[]);
    let converted = original.case.home.path("container");
    assert!(
        std::fs::read(dir.join("dense.safetensors")).expect("dense")
            == std::fs::read(converted.join("dense.safetensors")).expect("dense")
    );
    let after = files(&dir);
    assert!(
        before.iter().all(|(path, bytes)| after[path] == *bytes),
        "a file of the original changed"
    );
    assert!(!dir.join("experts").exists());
    // Without padding: 13,824 bytes are no whole number of pages.
    assert_eq!(manifest["experts"][7]["file"], "packed_experts/layer_07.bin");
    assert_eq!(manifest["experts"][7]["stride_bytes"], 13_824);
    let (ours, theirs) =
        (super::tensors::record(&dir, 5, 3), super::tensors::record(&converted, 5, 3));
    assert_eq!(ours, theirs);
    for layer in 0..8 {
        let sums = format!("checksums/layer_{layer:02}.xxh3");
        assert_eq!(
            std::fs::read(dir.join(&sums)).expect("sums"),
            std::fs::read(converted.join(&sums)).expect("sums")
        );
    }
    // Again, and again after a stop.
    original.adopt(&[]);
    for lost in ["flash-moe.json", "checksums/layer_03.xxh3"] {
        std::fs::remove_file(dir.join(lost)).expect("a file");
    }
    assert_eq!(original.adopt(&[]), manifest);
}

#[test]
fn two_bit_records_are_taken_when_they_are_there_or_asked_for() {
    let original = Original::new("q35-r4-q2", "packed_experts_2bit");
    let said = original.refuse(&["--bits", "4"]);
    assert!(said.contains("no packed_experts"), "{said}");
    let manifest = original.adopt(&["--bits", "2"]);
    assert_eq!(manifest["experts"][0]["file"], "packed_experts_2bit/layer_00.bin");
    assert_eq!(manifest["experts"][0]["precisions"][0]["bits"], 2);
}

#[test]
fn the_extractors_own_config_stands_in_for_a_missing_one() {
    let original = Original::new("q35-r4-q4", "packed_experts");
    let with_config = original.adopt(&[])["shape"].clone();
    let again = Original::new("q35-r4-q4", "packed_experts");
    std::fs::remove_file(again.case.home.path("original/config.json")).expect("config.json");
    let manifest = again.adopt(&[]);
    let mut shape = manifest["shape"].clone();
    // Not among what the extractor writes: positions, and what only the end of a text needs.
    shape["max_positions"] = with_config["max_positions"].clone();
    shape["eos"] = with_config["eos"].clone();
    assert_eq!(shape, with_config);
    assert!(manifest["notes"][0].as_str().expect("a note").starts_with("no config.json"));
}

#[test]
fn what_is_missing_or_short_is_named() {
    let original = Original::new("q35-r4-q4", "packed_experts");
    let dir = original.case.home.path("original");
    let layer = dir.join("packed_experts/layer_06.bin");
    let bytes = std::fs::read(&layer).expect("a layer");
    std::fs::write(&layer, &bytes[1..]).expect("a shorter layer");
    let said = original.refuse(&[]);
    assert!(said.contains("layer_06.bin: 221183 bytes, expected 221184"), "{said}");
    std::fs::remove_file(&layer).expect("a layer");
    assert!(original.refuse(&[]).contains("layer_06.bin"));
    std::fs::write(&layer, &bytes).expect("the whole layer");
    std::fs::remove_file(dir.join("tokenizer.json")).expect("the tokenizer");
    std::fs::write(dir.join("tokenizer.bin"), "BPET").expect("a scratch file");
    let said = original.refuse(&[]);
    assert!(said.contains("tokenizer.json is missing; tokenizer.bin"), "{said}");
    std::fs::copy(original.case.source().join("tokenizer.json"), dir.join("tokenizer.json"))
        .expect("the tokenizer");
    let weights = std::fs::read(dir.join("model_weights.bin")).expect("weights");
    std::fs::write(dir.join("model_weights.bin"), &weights[..weights.len() - 1]).expect("shorter");
    assert!(original.refuse(&[]).contains("truncated"));
    std::fs::remove_file(dir.join("model_weights.json")).expect("the JSON");
    assert!(original.refuse(&[]).contains("model_weights.json"));
}

/// Records one after the other, without padding.
fn write_packed(container: &Path, folder: &Path) {
    let manifest = Container::open(container).expect("a container").manifest().clone();
    for entry in &manifest.experts {
        let bytes = std::fs::read(container.join(&entry.file)).expect("a layer");
        let records = bytes.chunks_exact(entry.stride_bytes).map(|r| &r[..entry.record_bytes]);
        let packed: Vec<u8> = records.flatten().copied().collect();
        let name = Path::new(&entry.file).file_name().expect("a file name");
        std::fs::write(folder.join(name), packed).expect("a packed layer");
    }
}

/// Every tensor but the experts, by name, each at a multiple of 64 bytes.
fn write_weights(source: &Path, dir: &Path) {
    let (mut blob, mut entries) = (Vec::new(), Map::new());
    for (name, tensor) in read(source) {
        if name.contains(".switch_mlp.") {
            continue;
        }
        blob.resize(usize::next_multiple_of(blob.len(), 64), 0);
        let entry = json!({
            "offset": blob.len(), "size": tensor.bytes.len(), "shape": tensor.shape, "dtype": tensor.dtype,
        });
        blob.extend_from_slice(&tensor.bytes);
        entries.insert(name.trim_start_matches("language_model.").into(), entry);
    }
    let config: Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).expect("config"))
            .expect("JSON");
    let text = &config["text_config"];
    let mut fields = Map::new();
    for key in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "full_attention_interval",
        "linear_num_value_heads",
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
        "layer_types",
    ] {
        fields.insert(key.into(), text[key].clone());
    }
    fields.insert("partial_rotary_factor".into(), json!(0.25));
    fields.insert("rope_theta".into(), json!(10_000_000.0));
    let count = entries.len();
    let weights = json!({
        "model": "source", "num_tensors": count, "tensors": entries, "config": fields,
    });
    std::fs::write(dir.join("model_weights.bin"), blob).expect("weights");
    std::fs::write(dir.join("model_weights.json"), weights.to_string()).expect("their JSON");
}
