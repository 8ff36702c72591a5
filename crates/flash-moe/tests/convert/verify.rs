//! `verify` and `inspect` on sound and on damaged containers.
//!
//! Damage is one flipped bit in each kind of file; the message must name layer, expert and part.

use std::path::Path;

use flash_moe_engine::container::Container;
use serde_json::Value;

use super::Case;
use crate::program::text;

#[test]
fn every_kind_of_damage_is_found_and_named() {
    let case = Case::new("q35-r4");
    let container = case.convert("container", &[]);
    let path = text(&container);
    case.home.succeed(&["verify", &path]);
    let manifest = Container::open(&container).expect("a container").manifest().clone();
    let entry = &manifest.experts[3];
    let layout = entry.layout(&manifest.shape).expect("a layout");
    let mut damages: Vec<(String, usize, String)> = layout
        .parts()
        .into_iter()
        .map(|(part, range)| {
            let place = 9 * entry.stride_bytes + range.end - 1;
            (entry.file.clone(), place, format!("layer 3 expert 9 {part}"))
        })
        .collect();
    assert_eq!(damages.len(), 9);
    let padding = 9 * entry.stride_bytes + entry.record_bytes;
    damages.push((entry.file.clone(), padding, "layer 3 expert 9 padding".into()));
    damages.push((
        manifest.mtp_experts[0].file.clone(),
        0,
        "mtp layer 0 expert 0 gate.weight".into(),
    ));
    damages.push((entry.sums_file.clone(), 80, entry.sums_file.clone()));
    let last = manifest.dense.bytes as usize - 1;
    damages.push((manifest.dense.file.clone(), last, "tensor mtp.".into()));
    damages.push((manifest.dense.file.clone(), 40, "dense.safetensors".into()));
    for (file, place, expected) in damages {
        flip(&container.join(&file), place);
        let said = case.home.refuse(&["verify", &path]);
        assert!(said.contains(&expected), "{file} at {place}: {said}");
        flip(&container.join(&file), place);
    }
    case.home.succeed(&["verify", &path]);
}

#[test]
fn a_file_one_byte_short_is_found_by_its_size() {
    let case = Case::new("q3moe");
    let container = case.convert("container", &[]);
    for file in ["experts/layer_04.bin", "dense.safetensors"] {
        let bytes = std::fs::read(container.join(file)).expect("a file");
        std::fs::write(container.join(file), &bytes[..bytes.len() - 1]).expect("a shorter file");
        let said = case.home.refuse(&["verify", &text(&container)]);
        let expected = format!("{file}: {} bytes, expected {}", bytes.len() - 1, bytes.len());
        assert!(said.contains(&expected), "{said}");
        std::fs::write(container.join(file), &bytes).expect("the whole file");
    }
    std::fs::remove_file(container.join("tokenizer.json")).expect("the tokenizer");
    assert!(case.home.refuse(&["verify", &text(&container)]).contains("tokenizer.json: missing"));
}

#[test]
fn many_mismatches_are_counted_and_twenty_shown() {
    let case = Case::new("q3moe");
    let container = case.convert("container", &[]);
    let layer = container.join("experts/layer_01.bin");
    let mut bytes = std::fs::read(&layer).expect("a layer");
    bytes.iter_mut().for_each(|b| *b ^= 1);
    std::fs::write(&layer, bytes).expect("a damaged layer");
    let said = case.home.refuse(&["verify", &text(&container)]);
    assert_eq!(said.matches("layer 1 expert").count(), 20, "{said}");
    // Nine parts and the padding of sixteen experts.
    assert!(said.contains("... and 140 more") && said.contains("160 mismatches"), "{said}");
}

#[test]
fn a_directory_that_is_no_container_is_refused() {
    let case = Case::new("q3moe");
    let said = case.home.refuse(&["verify", &text(&case.source())]);
    assert!(said.contains("flash-moe convert"), "{said}");
    assert!(case.home.refuse(&["inspect", &text(&case.source())]).contains("flash-moe convert"));
}

#[test]
fn inspect_accounts_for_every_byte() {
    let case = Case::new("q35-r4");
    let container = case.convert("container", &[]);
    let output = case.home.succeed(&["inspect", "--json", &text(&container)]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let size = |file: &str| std::fs::metadata(container.join(file)).expect("a file").len();
    let experts: u64 = (0..8).map(|i| size(&format!("experts/layer_{i:02}.bin"))).sum();
    let disk = size("dense.safetensors") + experts + size("experts/mtp_00.bin");
    assert_eq!(report["disk_bytes"], disk);
    // 128 x 64 weights three times, at 4.5 bits.
    assert_eq!(report["expert_bytes"], 13_824);
    assert_eq!(report["expert_bytes_per_token"], 13_824 * 4 * 8);
    // Whole pages.
    assert_eq!(report["pool_bytes_min"], 16_384 * 4 * 8);
    let groups = report["groups"].as_array().expect("groups");
    let header = {
        let bytes = std::fs::read(container.join("dense.safetensors")).expect("dense");
        8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
    };
    let grouped: u64 = groups.iter().map(|g| g["bytes"].as_u64().expect("bytes")).sum();
    assert_eq!(grouped + header, disk);
    let page = case.home.succeed(&["inspect", &text(&container)]);
    let page = String::from_utf8(page.stdout).expect("text");
    for part in ["delta-net", "4-bit g64", "8-bit g64", "top 4 of 16", "smallest memory to run"] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
}

fn flip(path: &Path, place: usize) {
    let mut bytes = std::fs::read(path).expect("a file");
    bytes[place] ^= 0x10;
    std::fs::write(path, bytes).expect("a file");
}
