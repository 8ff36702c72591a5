//! Proves the fixtures: the checkpoints made here are those that the goldens were computed from.
//!
//! The other tests trust this one. If it fails, `oracle/README.md` says how to write the reference's
//! own files beside ours and compare them tensor by tensor.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use flash_moe_kernels::quantise_row;
use safetensors::SafeTensors;
use xxhash_rust::xxh3::Xxh3Default;

use crate::fixture::{Golden, VARIANTS, golden, write_checkpoint};

const NO_EXPERT: u32 = 255; // stands in the router arrays of a dense layer

#[test]
fn every_checkpoint_holds_the_bytes_its_golden_was_made_from() {
    for variant in VARIANTS {
        let dir = tempfile::tempdir().expect("temporary directory");
        write_checkpoint(variant, dir.path());
        let expected = golden(variant).about("checkpoint_xxh3_64");
        let found = fingerprint(dir.path());
        if found != expected {
            let kept = dir.keep();
            panic!("{variant}: {found}, expected {expected}; see {}", kept.display());
        }
    }
}

#[test]
fn greedy_ids_are_the_largest_logits() {
    for variant in VARIANTS {
        let golden = golden(variant);
        let ids = golden.integers("greedy_ids").values;
        let prefill = rows(&golden, "prefill.logits");
        let decode = rows(&golden, "decode.logits");
        let chosen: Vec<u32> =
            prefill.last().into_iter().chain(&decode).map(|row| argmax(row)).collect();
        assert_eq!(chosen, ids, "{variant}");
    }
}

#[test]
fn every_token_has_four_different_experts_or_a_dense_layer() {
    for variant in VARIANTS {
        let golden = golden(variant);
        for phase in ["prefill", "decode", "long"] {
            let experts = golden.integers(&format!("{phase}.router_indices"));
            let &[8, _, 4] = &experts.shape[..] else { panic!("{variant}: {:?}", experts.shape) };
            for chosen in experts.values.chunks_exact(4) {
                let dense = chosen.iter().all(|&expert| expert == NO_EXPERT);
                let distinct = (1..4).all(|i| chosen[i] < 16 && !chosen[..i].contains(&chosen[i]));
                assert!(dense || (chosen[0] < 16 && distinct), "{variant} {phase}: {chosen:?}");
            }
        }
    }
}

#[test]
fn tensors_of_mlx_files_start_at_odd_offsets() {
    let dir = tempfile::tempdir().expect("temporary directory");
    write_checkpoint("q35-r4-q4", dir.path());
    let bytes = fs::read(dir.path().join("model.safetensors")).expect("checkpoint file");
    let (header_bytes, _) = SafeTensors::read_metadata(&bytes).expect("header");
    assert_eq!(header_bytes % 2, 1);
}

#[test]
fn quantise_row_writes_the_bits_that_mlx_writes() {
    let golden = golden("quantise");
    let x = golden.floats("x");
    let cols = x.shape[1];
    for bits in [2_u8, 3, 4, 5, 6, 8] {
        for group in [32_u16, 64, 128] {
            let array = |leaf: &str| golden.integers(&format!("b{bits}.g{group}.{leaf}")).values;
            let (mut weight, mut scales, mut biases) = (Vec::new(), Vec::new(), Vec::new());
            for row in x.values.chunks_exact(cols) {
                let mut packed = vec![0; cols * usize::from(bits) / 8];
                let mut scale = vec![0; cols / usize::from(group)];
                let mut bias = scale.clone();
                quantise_row(row, bits, group, &mut packed, &mut scale, &mut bias);
                weight.extend(packed.into_iter().map(u32::from));
                scales.extend(scale.into_iter().map(u32::from));
                biases.extend(bias.into_iter().map(u32::from));
            }
            assert_eq!(weight, array("weight"), "{bits} bits, group {group}");
            assert_eq!(scales, array("scales"), "{bits} bits, group {group}");
            assert_eq!(biases, array("biases"), "{bits} bits, group {group}");
        }
    }
}

/// xxh3_64 over name, dtype, shape and bytes of every tensor, in the order of the names.
fn fingerprint(dir: &Path) -> String {
    let files: Vec<Vec<u8>> = fs::read_dir(dir)
        .expect("model directory")
        .map(|entry| entry.expect("entry of the model directory").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .map(|path| fs::read(path).expect("checkpoint file"))
        .collect();
    let mut tensors = BTreeMap::new();
    for bytes in &files {
        tensors.extend(SafeTensors::deserialize(bytes).expect("checkpoint file").tensors());
    }
    let mut hash = Xxh3Default::new();
    for (name, tensor) in tensors {
        let shape: Vec<String> = tensor.shape().iter().map(usize::to_string).collect();
        let line = format!("{name}\n{}\n{}\n", tensor.dtype(), shape.join(","));
        hash.update(line.as_bytes());
        hash.update(tensor.data());
    }
    format!("{:016x}", hash.digest())
}

fn rows(golden: &Golden, name: &str) -> Vec<Vec<f32>> {
    let array = golden.floats(name);
    array.values.chunks_exact(array.shape[1]).map(<[f32]>::to_vec).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.expect("a row of logits").0 as u32
}
