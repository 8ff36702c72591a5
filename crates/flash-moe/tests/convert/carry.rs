//! What must arrive unchanged, or changed only in place.
//!
//! Quantised tensors are compared with the checkpoint byte for byte; interleaved and fused layouts
//! with the same rows read out of the checkpoint here.

use std::path::Path;

use flash_moe_engine::container::Container;
use flash_moe_kernels::bf16_to_f32;
use safetensors::Dtype;

use super::Case;
use super::tensors::{Tensor, edit, files, floats, read, record, row_bytes};

const EXPERTS: usize = 16;

#[test]
fn mlx_experts_are_carried_byte_for_byte() {
    for variant in ["q35-r4-q4", "q35-r4-q2"] {
        let case = Case::new(variant);
        let source = read(&case.source());
        let container = case.convert("container", &[]);
        for layer in 0..8 {
            for expert in [0, 7, EXPERTS - 1] {
                for (part, found) in record(&container, layer, expert) {
                    let (projection, leaf) = part.split_once('.').expect("projection.leaf");
                    let name = format!(
                        "language_model.model.layers.{layer}.mlp.switch_mlp.{projection}_proj.{leaf}"
                    );
                    let stack = &source[&name];
                    let bytes = stack.bytes.len() / EXPERTS;
                    let expected = &stack.bytes[expert * bytes..][..bytes];
                    assert_eq!(found, expected, "{variant} {name} expert {expert}");
                }
            }
        }
    }
}

#[test]
fn mlx_dense_matrices_are_carried_and_norms_taken_as_they_are() {
    let case = Case::new("q35-r4-q4");
    let source = read(&case.source());
    let dense = read(&case.convert("container", &[]));
    let mut matrices = 0;
    for (name, tensor) in &source {
        let name = name.strip_prefix("language_model.").expect("a text tensor");
        if name.contains("switch_mlp") {
            continue;
        }
        let found = &dense[name];
        if tensor.dtype == Dtype::U32 || name.ends_with(".scales") || name.ends_with(".biases") {
            assert_eq!(found, tensor, "{name}");
            matrices += 1;
        } else if !name.ends_with("conv1d.weight") {
            assert_eq!((found.dtype, floats(found)), (Dtype::F32, floats(tensor)), "{name}");
        }
    }
    assert!(matrices > 200, "{matrices} matrices compared");
}

#[test]
fn hub_norms_become_effective_weights_except_the_one_in_delta_net() {
    let case = Case::new("q35-r2");
    let source = read(&case.source());
    let dense = read(&case.convert("container", &[]));
    for (name, plus) in [
        ("model.norm.weight", 1.0),
        ("model.layers.0.input_layernorm.weight", 1.0),
        ("model.layers.3.post_attention_layernorm.weight", 1.0),
        ("model.layers.3.self_attn.q_norm.weight", 1.0),
        ("model.layers.3.self_attn.k_norm.weight", 1.0),
        ("model.layers.0.linear_attn.norm.weight", 0.0),
        ("model.layers.0.linear_attn.A_log", 0.0),
        ("model.layers.0.linear_attn.dt_bias", 0.0),
    ] {
        let stored = floats(&source[&name.replacen("model.", "model.language_model.", 1)]);
        let expected: Vec<f32> = stored.iter().map(|w| w + plus).collect();
        assert_eq!((dense[name].dtype, floats(&dense[name])), (Dtype::F32, expected), "{name}");
    }
    for name in ["mtp.norm.weight", "mtp.pre_fc_norm_hidden.weight"] {
        let expected: Vec<f32> = floats(&source[name]).iter().map(|w| w + 1.0).collect();
        assert_eq!(floats(&dense[name]), expected, "{name}");
    }
    let plain = Case::new("q3moe");
    let source = read(&plain.source());
    let dense = read(&plain.convert("container", &[]));
    assert_eq!(floats(&dense["model.norm.weight"]), floats(&source["model.norm.weight"]));
}

#[test]
fn the_convolution_is_stored_by_tap() {
    for (variant, prefix) in
        [("q35-r2", "model.language_model"), ("q35-r4-q4", "language_model.model")]
    {
        let case = Case::new(variant);
        let name = "layers.1.linear_attn.conv1d.weight";
        let stored = floats(&read(&case.source())[&format!("{prefix}.{name}")]);
        let found = read(&case.convert("container", &[]))[&format!("model.{name}")].clone();
        let channels = stored.len() / 4;
        assert_eq!((found.dtype, &found.shape), (Dtype::F32, &vec![4, channels]));
        let values = floats(&found);
        for (channel, taps) in stored.as_chunks::<4>().0.iter().enumerate() {
            let column = [0, 1, 2, 3].map(|tap| values[tap * channels + channel]);
            assert_eq!(column, *taps, "{variant} channel {channel}");
        }
    }
}

#[test]
fn bf16_passes_through_bit_for_bit() {
    let case = Case::new("q35-r4");
    let source = read(&case.source());
    let container = case.convert("container", &["--bits", "bf16", "--dense-bits", "bf16"]);
    let dense = read(&container);
    for name in [
        "embed_tokens.weight",
        "layers.0.linear_attn.in_proj_qkv.weight",
        "layers.3.self_attn.q_proj.weight",
        "layers.5.mlp.gate.weight",
        "layers.5.mlp.shared_expert_gate.weight",
        "layers.5.mlp.shared_expert.down_proj.weight",
    ] {
        assert_eq!(
            dense[&format!("model.{name}")],
            source[&format!("model.language_model.{name}")],
            "{name}"
        );
    }
    assert_eq!(dense["lm_head.weight"], source["lm_head.weight"]);
    let fused = &source["model.language_model.layers.2.mlp.experts.gate_up_proj"];
    let expected: Vec<u8> =
        (0..64).flat_map(|r| row_bytes(fused, 9 * 128 + 64 + r)).copied().collect();
    assert_eq!(record(&container, 2, 9)["up.weight"], expected);
}

#[test]
fn wider_floats_are_never_rounded_when_kept() {
    let case = Case::new("q3moe");
    edit(&case.source(), |tensors| {
        for (name, tensor) in tensors.iter_mut() {
            if name.ends_with("q_proj.weight") || name.contains("experts.") {
                *tensor = as_f32(tensor);
            }
        }
    });
    let source = read(&case.source());
    let container = case.convert("container", &["--bits", "bf16", "--dense-bits", "bf16"]);
    let name = "model.layers.1.self_attn.q_proj.weight";
    assert_eq!(read(&container)[name], source[name]);
    let expert = &source["model.layers.1.mlp.experts.3.up_proj.weight"];
    assert_eq!(record(&container, 1, 3)["up.weight"], expert.bytes);
}

#[test]
fn fused_and_single_experts_give_one_container() {
    let fused = Case::new("q35-r4");
    let single = Case::new("q35-r4");
    edit(&single.source(), |tensors| {
        for prefix in (0..8).map(|i| format!("model.language_model.layers.{i}.mlp.experts")) {
            let gate_up = tensors.remove(&format!("{prefix}.gate_up_proj")).expect("fused");
            let down = tensors.remove(&format!("{prefix}.down_proj")).expect("fused");
            for expert in 0..EXPERTS {
                for (part, stack, first, rows) in [
                    ("gate_proj", &gate_up, expert * 128, 64),
                    ("up_proj", &gate_up, expert * 128 + 64, 64),
                    ("down_proj", &down, expert * 128, 128),
                ] {
                    let name = format!("{prefix}.{expert}.{part}.weight");
                    tensors.insert(name, rows_of(stack, first, rows));
                }
            }
        }
    });
    let (one, two) = (fused.convert("container", &[]), single.convert("container", &[]));
    let (mut one, mut two) = (files(&one), files(&two));
    // It fingerprints the checkpoint, and the two checkpoints are different files.
    let record = Path::new("convert.json");
    assert!(one.remove(record) != two.remove(record));
    assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
    for (path, bytes) in &one {
        assert!(*bytes == two[path], "{} differs", path.display());
    }
}

#[test]
fn interleaved_projections_come_out_in_order() {
    let case = Case::new("q3next");
    let source = read(&case.source());
    let dense = read(&case.convert("container", &["--bits", "bf16", "--dense-bits", "bf16"]));
    let (stored, prefix) = (|n: &str| &source[n], "model.layers.0.linear_attn");
    let qkvz = stored(&format!("{prefix}.in_proj_qkvz.weight"));
    // Two key heads of 64, each with two value heads of 64: blocks of 64 q, 64 k, 128 v, 128 z.
    let block = |head: usize, from: usize, count: usize| {
        (0..count).flat_map(move |r| row_bytes(qkvz, head * 384 + from + r)).copied()
    };
    let heads = |from: usize, count: usize| (0..2).flat_map(move |h| block(h, from, count));
    let qkv: Vec<u8> = heads(0, 64).chain(heads(64, 64)).chain(heads(128, 128)).collect();
    assert_eq!(dense[&format!("{prefix}.in_proj_qkv.weight")].bytes, qkv);
    let z: Vec<u8> = heads(256, 128).collect();
    assert_eq!(dense[&format!("{prefix}.in_proj_z.weight")].bytes, z);
    let ba = stored(&format!("{prefix}.in_proj_ba.weight"));
    let rows = |list: [usize; 4]| -> Vec<u8> {
        list.iter().flat_map(|&r| row_bytes(ba, r)).copied().collect()
    };
    assert_eq!(dense[&format!("{prefix}.in_proj_b.weight")].bytes, rows([0, 1, 4, 5]));
    assert_eq!(dense[&format!("{prefix}.in_proj_a.weight")].bytes, rows([2, 3, 6, 7]));
}

#[test]
fn dense_layers_and_a_tied_head_are_followed() {
    for variant in ["q3moe-dense", "q3next-dense"] {
        let case = Case::new(variant);
        let container = case.convert("container", &[]);
        let dense = read(&container);
        assert!(
            !dense.keys().any(|name| name.starts_with("lm_head")),
            "{variant}: tied head stored"
        );
        let manifest = Container::open(&container).expect("a container").manifest().clone();
        let listed: Vec<u16> = manifest.experts.iter().map(|e| e.layer.0).collect();
        let expected: &[u16] = if variant == "q3moe-dense" { &[3, 5, 7] } else { &[1, 2, 4, 5, 7] };
        assert_eq!(listed, expected);
        let names = ["gate_proj", "up_proj", "down_proj"];
        assert!(
            names.iter().all(|n| dense.contains_key(&format!("model.layers.0.mlp.{n}.scales")))
        );
    }
}

#[test]
fn vision_and_unknown_tensors_are_left_out_and_said() {
    let case = Case::new("q3moe");
    edit(&case.source(), |tensors| {
        let extra = Tensor { dtype: Dtype::BF16, shape: vec![2], bytes: vec![0; 4] };
        tensors.insert("model.visual.pos_embed.weight".into(), extra.clone());
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), extra);
    });
    let container = case.convert("container", &[]);
    let manifest = Container::open(&container).expect("a container").manifest().clone();
    assert_eq!(
        manifest.notes,
        [
            "vision tower skipped: 1 tensors, 4 bytes",
            "not needed and left out: 1 tensors (model.layers.0.self_attn.rotary_emb.inv_freq)"
        ]
    );
}

#[test]
fn draft_layers_are_kept_with_their_experts() {
    let case = Case::new("q35-r4");
    let source = read(&case.source());
    let container = case.convert("container", &["--bits", "bf16", "--dense-bits", "bf16"]);
    let manifest = Container::open(&container).expect("a container").manifest().clone();
    assert_eq!((manifest.shape.mtp_layers, manifest.mtp_experts.len()), (1, 1));
    assert_eq!(read(&container)["mtp.fc.weight"], source["mtp.fc.weight"]);
    let entry = &manifest.mtp_experts[0];
    let bytes = std::fs::read(container.join(&entry.file)).expect("mtp experts");
    let down = &source["mtp.layers.0.mlp.experts.down_proj"];
    let layout = entry.layout(&manifest.shape).expect("a layout");
    let (_, range) = layout.parts().pop().expect("down.weight");
    let found = &bytes[5 * entry.stride_bytes..][range];
    assert_eq!(found, rows_of(down, 5 * 128, 128).bytes);
}

fn rows_of(stack: &Tensor, first: usize, rows: usize) -> Tensor {
    let cols = *stack.shape.last().expect("a stack");
    let bytes = (first..first + rows).flat_map(|r| row_bytes(stack, r)).copied().collect();
    Tensor { dtype: stack.dtype, shape: vec![rows, cols], bytes }
}

/// The same values as F32, moved off the bf16 grid by their last bits.
fn as_f32(tensor: &Tensor) -> Tensor {
    let words = tensor.bytes.as_chunks::<2>().0.iter().map(|w| bf16_to_f32(u16::from_le_bytes(*w)));
    let bytes = words.flat_map(|v| f32::from_bits(v.to_bits() | 0x0123).to_le_bytes()).collect();
    Tensor { dtype: Dtype::F32, shape: tensor.shape.clone(), bytes }
}
