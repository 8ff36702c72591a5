//! Bad input: each is refused with a message that names it, and no container appears.
//!
//! Every case edits one thing of a sound checkpoint, so that nothing else can be what is refused.

use serde_json::{Value, json};

use super::Case;
use super::tensors::{Tensor, edit};
use crate::program::text;

const NAN: [u8; 2] = [0xc0, 0x7f];

#[test]
fn a_value_that_is_not_finite_is_named() {
    let dense = Case::new("q3moe");
    edit(&dense.source(), |tensors| {
        let tensor = tensors.get_mut("model.layers.1.self_attn.k_proj.weight").expect("k_proj");
        tensor.bytes[2 * (5 * 128 + 7)..][..2].copy_from_slice(&NAN);
    });
    for flags in [&[][..], &["--dense-bits", "bf16"]] {
        let said = dense.refuse(flags);
        assert!(
            said.contains("model.layers.1.self_attn.k_proj") && said.contains("row 5"),
            "{said}"
        );
        std::fs::remove_dir_all(dense.home.path("refused")).expect("the unfinished conversion");
    }
    let expert = Case::new("q35-r2");
    edit(&expert.source(), |tensors| {
        let stack = tensors.get_mut("model.language_model.layers.6.mlp.experts.down_proj");
        let start = 2 * 64 * (13 * 128 + 2);
        stack.expect("a stack").bytes[start..start + 2].copy_from_slice(&0x7f80u16.to_le_bytes());
    });
    let said = expert.refuse(&[]);
    assert!(said.contains("layer 6 expert 13 down") && said.contains("inf"), "{said}");
    let norm = Case::new("q3moe");
    edit(&norm.source(), |tensors| {
        tensors.get_mut("model.norm.weight").expect("a norm").bytes[..2].copy_from_slice(&NAN);
    });
    let said = norm.refuse(&[]);
    assert!(said.contains("model.norm.weight") && said.contains("NaN"), "{said}");
    let scale = Case::new("q35-r4-q4");
    edit(&scale.source(), |tensors| {
        let name = "language_model.model.layers.3.mlp.switch_mlp.up_proj.scales";
        tensors.get_mut(name).expect("scales").bytes[..2].copy_from_slice(&NAN);
    });
    let said = scale.refuse(&[]);
    assert!(said.contains("layer 3 expert 0 up") && said.contains("up_proj.scales"), "{said}");
}

#[test]
fn a_truncated_or_missing_shard_is_named_with_its_sizes() {
    let case = Case::new("q35-r2");
    let shard = case.source().join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&shard).expect("the second shard");
    std::fs::write(&shard, &bytes[..bytes.len() - 1]).expect("a shorter shard");
    let said = case.refuse(&[]);
    let sizes = format!("{} bytes, its header promises {}", bytes.len() - 1, bytes.len());
    assert!(said.contains("model-00002-of-00002.safetensors") && said.contains(&sizes), "{said}");
    std::fs::write(&shard, &bytes[..100]).expect("hardly a shard");
    let said = case.refuse(&[]);
    assert!(said.contains("model-00002-of-00002") && said.contains("truncated"), "{said}");
    std::fs::remove_file(&shard).expect("the second shard");
    let said = case.refuse(&[]);
    assert!(
        said.contains("model-00002-of-00002.safetensors") && said.contains("missing"),
        "{said}"
    );
    std::fs::remove_file(case.source().join("model.safetensors.index.json")).expect("the index");
    let said = case.refuse(&[]);
    assert!(said.contains("1 shards present, their names promise 2"), "{said}");
}

#[test]
fn a_missing_tensor_or_wrong_shape_is_named() {
    let missing = Case::new("q3moe");
    edit(&missing.source(), |tensors| {
        tensors.remove("model.layers.3.mlp.experts.4.up_proj.weight").expect("an expert");
    });
    let said = missing.refuse(&[]);
    assert!(said.contains("model.layers.3.mlp.experts.4.up_proj.weight is missing"), "{said}");
    for (name, shape, expected) in [
        ("model.layers.2.self_attn.o_proj.weight", vec![256, 128], "expected [128, 256]"),
        ("model.layers.2.mlp.experts.0.down_proj.weight", vec![64, 128], "expected [128, 64]"),
        ("model.layers.2.input_layernorm.weight", vec![2, 64], "expected [128]"),
    ] {
        let case = Case::new("q3moe");
        edit(&case.source(), |tensors| tensors.get_mut(name).expect("a tensor").shape = shape);
        let said = case.refuse(&[]);
        assert!(said.contains(name) && said.contains(expected), "{said}");
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let case = Case::new("q35-r2");
    let path = case.source().join("model.safetensors.index.json");
    let mut index: Value =
        serde_json::from_slice(&std::fs::read(&path).expect("the index")).expect("JSON");
    let shard = |n: u32| json!(format!("model-{n:05}-of-00002.safetensors"));
    let other = if index["weight_map"]["lm_head.weight"] == shard(1) { shard(2) } else { shard(1) };
    index["weight_map"]["lm_head.weight"] = other;
    std::fs::write(&path, index.to_string()).expect("the index");
    let said = case.refuse(&[]);
    assert!(said.contains("but it is not"), "{said}");
    index["weight_map"]["lm_head.weight"] = json!("../../elsewhere.safetensors");
    std::fs::write(&path, index.to_string()).expect("the index");
    assert!(case.refuse(&[]).contains("not a plain file name"));
}

#[test]
fn what_the_configuration_asks_and_we_cannot_is_named() {
    for (field, value, expected) in [
        ("model_type", json!("llama"), "llama"),
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "gptq"),
        ("quantization_config", json!({"quant_method": "awq"}), "awq"),
        (
            "quantization_config",
            json!({"quant_method": "compressed-tensors"}),
            "compressed-tensors",
        ),
        (
            "quantization_config",
            json!({"quant_method": "fp8", "weight_block_size": [64, 64]}),
            "[64,64]",
        ),
        ("quantization", json!({"bits": 4, "group_size": 32, "mode": "mxfp4"}), "mxfp4"),
    ] {
        let case = Case::new("q3moe");
        let path = case.source().join("config.json");
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(&path).expect("config")).expect("JSON");
        config[field] = value;
        std::fs::write(&path, config.to_string()).expect("config");
        let said = case.refuse(&[]);
        assert!(said.contains(expected), "{field}: {said}");
    }
    let case = Case::new("q3moe");
    edit(&case.source(), |tensors| {
        let packed = Tensor { dtype: safetensors::Dtype::I32, shape: vec![1], bytes: vec![0; 4] };
        tensors.insert("model.layers.0.mlp.experts.0.up_proj.qweight".into(), packed);
    });
    assert!(case.refuse(&[]).contains("GPTQ or AWQ"));
}

#[test]
fn quantised_weights_are_never_requantised() {
    let case = Case::new("q35-r4-q2");
    let said = case.refuse(&["--bits", "4"]);
    assert!(said.contains("layer 0 expert 0 gate has 2 bits") && said.contains("--bits"), "{said}");
    let said = case.refuse(&["--dense-bits", "8"]);
    assert!(
        said.contains("model.embed_tokens has 4 bits") && said.contains("--dense-bits"),
        "{said}"
    );
    let said = case.refuse(&["--group", "32"]);
    assert!(said.contains("groups of 64"), "{said}");
    case.convert("container", &["--bits", "2", "--dense-bits", "4", "--group", "64"]);
}

#[test]
fn files_that_must_be_there_are_asked_for_by_name() {
    for name in ["tokenizer.json", "config.json"] {
        let case = Case::new("q3moe");
        std::fs::write(case.source().join(name), "not { JSON").expect("a scratch file");
        assert!(case.refuse(&[]).contains(name));
        std::fs::remove_file(case.source().join(name)).expect("a file");
        assert!(case.refuse(&[]).contains(name));
    }
    let case = Case::new("q3moe");
    std::fs::remove_file(case.source().join("model.safetensors")).expect("the weights");
    assert!(case.refuse(&[]).contains("no model.safetensors.index.json and no model*.safetensors"));
    let nowhere = text(&case.home.path("nowhere"));
    let said = case.home.refuse(&["convert", &nowhere, &text(&case.home.path("refused"))]);
    assert!(said.contains("no such directory"), "{said}");
}

#[test]
fn a_destination_that_is_not_ours_is_not_touched() {
    let case = Case::new("q3moe");
    let source = text(&case.source());
    let before = super::tensors::files(&case.source());
    let said = case.home.refuse(&["convert", &source, &source]);
    assert!(said.contains("one directory"), "{said}");
    let around = format!("{source}/../source");
    assert!(case.home.refuse(&["convert", &source, &around]).contains("one directory"));
    assert_eq!(super::tensors::files(&case.source()), before);
    case.home.write("a-file", "x");
    let below = text(&case.home.path("a-file").join("container"));
    let said = case.home.refuse(&["convert", &source, &below]);
    assert!(said.contains("a-file"), "{said}");
    std::fs::create_dir(case.home.path("full")).expect("a directory");
    case.home.write("full/notes.txt", "mine");
    let said = case.home.refuse(&["convert", &source, &text(&case.home.path("full"))]);
    assert!(said.contains("not empty"), "{said}");
}

#[test]
fn a_container_inside_its_source_is_made_and_does_not_disturb_it() {
    let case = Case::new("q3moe");
    let before = super::tensors::files(&case.source());
    let container = case.convert("source/container", &[]);
    case.home.succeed(&["verify", &text(&container)]);
    let mut after = super::tensors::files(&case.source());
    after.retain(|path, _| !path.starts_with("container"));
    assert_eq!(after, before);
}
