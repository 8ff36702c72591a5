//! What is quantised, against the quantiser applied here to the checkpoint's own values.
//!
//! The quantiser itself is held to the reference's bits in the kernels' tests; here it must have been
//! given the right rows, groups and bits.

use flash_moe_engine::container::{Container, Precision, ScaleKind};
use flash_moe_kernels::{bf16_to_f32, e4m3_to_f32, f32_to_bf16, quantise_row};

use super::Case;
use super::tensors::{Tensor, floats, read, record};

#[test]
fn experts_are_the_quantiser_applied_to_the_checkpoint() {
    let case = Case::new("q35-r2");
    let source = read(&case.source());
    for (flags, bits, group) in [
        (&["--bits", "4"][..], 4, 64),
        (&["--bits", "2", "--group", "32"], 2, 32),
        (&["--bits", "8"], 8, 64),
        (&["--bits", "3"], 3, 64),
    ] {
        let container = case.convert(&format!("container-{bits}"), flags);
        let fused = floats(&source["model.language_model.layers.4.mlp.experts.gate_up_proj"]);
        let down = floats(&source["model.language_model.layers.4.mlp.experts.down_proj"]);
        let found = record(&container, 4, 11);
        for (part, values, cols) in [
            ("gate", &fused[11 * 128 * 128..][..64 * 128], 128),
            ("up", &fused[(11 * 128 + 64) * 128..][..64 * 128], 128),
            ("down", &down[11 * 128 * 64..][..128 * 64], 64),
        ] {
            let expected = quantised(values, cols, bits, group);
            for (leaf, bytes) in ["weight", "scales", "biases"].into_iter().zip(expected) {
                assert_eq!(found[&format!("{part}.{leaf}")], bytes, "{bits} bits {part}.{leaf}");
            }
        }
    }
}

#[test]
fn dense_matrices_get_their_bits_and_routers_get_eight() {
    let case = Case::new("q35-r2");
    let source = read(&case.source());
    let container = case.convert("container", &["--dense-bits", "2"]);
    let dense = read(&container);
    for (name, bits) in [
        ("model.embed_tokens", 2),
        ("model.layers.0.linear_attn.out_proj", 2),
        ("model.layers.3.self_attn.o_proj", 2),
        ("model.layers.6.mlp.gate", 8),
        ("model.layers.6.mlp.shared_expert_gate", 8),
    ] {
        let stored = name.replacen("model.", "model.language_model.", 1);
        let tensor = &source[&format!("{stored}.weight")];
        let expected = quantised(&floats(tensor), tensor.shape[1], bits, 64);
        for (leaf, bytes) in ["weight", "scales", "biases"].into_iter().zip(expected) {
            assert_eq!(dense[&format!("{name}.{leaf}")].bytes, bytes, "{name}.{leaf}");
        }
    }
    let opened = Container::open(&container).expect("a container");
    let router = opened.precision("model.layers.6.mlp.gate", 16, 128).expect("a router");
    assert_eq!(router, Precision::Affine { bits: 8, group: 64, scales: ScaleKind::Bf16 });
}

#[test]
fn routers_stay_bf16_when_the_rest_does() {
    let case = Case::new("q3moe");
    let container = case.convert("container", &["--dense-bits", "bf16"]);
    let opened = Container::open(&container).expect("a container");
    let router = opened.precision("model.layers.6.mlp.gate", 16, 128).expect("a router");
    assert_eq!(router, Precision::Bf16);
    assert_eq!(opened.manifest().experts[0].precisions[0].name(), "4-bit g64");
}

#[test]
fn fp8_is_scaled_by_block_before_it_is_quantised_or_rounded() {
    let case = Case::new("q35-r2-fp8");
    let source = read(&case.source());
    let prefix = "model.language_model.layers.2";
    let values = scaled(&source, &format!("{prefix}.mlp.experts.6.gate_proj.weight"));
    let four = case.convert("four", &[]);
    assert_eq!(record(&four, 2, 6)["gate.weight"], quantised(&values, 128, 4, 64)[0]);

    let plain = case.convert("plain", &["--bits", "bf16", "--dense-bits", "bf16"]);
    let expected: Vec<u8> = values.iter().flat_map(|&v| f32_to_bf16(v).to_le_bytes()).collect();
    assert_eq!(record(&plain, 2, 6)["gate.weight"], expected);
    let values = scaled(&source, &format!("{prefix}.linear_attn.in_proj_qkv.weight"));
    let expected: Vec<u8> = values.iter().flat_map(|&v| f32_to_bf16(v).to_le_bytes()).collect();
    assert_eq!(read(&plain)["model.layers.2.linear_attn.in_proj_qkv.weight"].bytes, expected);
    let notes = Container::open(&plain).expect("a container").manifest().notes.clone();
    assert!(notes.iter().any(|n| n.contains("rounded to bf16") && n.contains("FP8")), "{notes:?}");
}

#[test]
fn a_width_outside_the_group_stays_as_it_is_and_is_noted() {
    let case = Case::new("q3moe");
    let container = case.convert("container", &["--group", "128"]);
    let manifest = Container::open(&container).expect("a container").manifest().clone();
    // Gate and up have 128 columns, down has 64.
    let names = manifest.experts[0].precisions.map(Precision::name);
    assert_eq!(names, ["4-bit g128", "4-bit g128", "bf16"]);
    assert!(manifest.notes[0].starts_with("not quantised, width is no multiple of 128: "));
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let case = Case::new("q35-r4");
    let one = super::tensors::files(&case.convert("one", &["--threads", "1"]));
    let five = super::tensors::files(&case.convert("five", &["--threads", "5"]));
    assert_eq!(one.keys().collect::<Vec<_>>(), five.keys().collect::<Vec<_>>());
    for (path, bytes) in &one {
        assert!(*bytes == five[path], "{} differs", path.display());
    }
}

/// Weight, scales and biases of a matrix.
fn quantised(values: &[f32], cols: usize, bits: u8, group: u16) -> [Vec<u8>; 3] {
    let mut out = [Vec::new(), Vec::new(), Vec::new()];
    let groups = cols / usize::from(group);
    for row in values.chunks_exact(cols) {
        let mut weight = vec![0; cols * usize::from(bits) / 8];
        let (mut scales, mut biases) = (vec![0; groups], vec![0; groups]);
        quantise_row(row, bits, group, &mut weight, &mut scales, &mut biases);
        out[0].extend(weight);
        out[1].extend(scales.iter().flat_map(|w| w.to_le_bytes()));
        out[2].extend(biases.iter().flat_map(|w| w.to_le_bytes()));
    }
    out
}

/// Values of an FP8 matrix: code times the scale of its block.
fn scaled(source: &super::tensors::Tensors, name: &str) -> Vec<f32> {
    let Tensor { shape, bytes, .. } = &source[name];
    let scales = &source[&format!("{name}_scale_inv")];
    let words = scales.bytes.as_chunks::<2>().0;
    let scale = |i: usize| {
        let block = i / shape[1] / 128 * scales.shape[1] + i % shape[1] / 128;
        bf16_to_f32(u16::from_le_bytes(words[block]))
    };
    bytes.iter().enumerate().map(|(i, &code)| e4m3_to_f32(code) * scale(i)).collect()
}
