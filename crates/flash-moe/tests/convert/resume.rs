//! Stopping and continuing: what is finished stays untouched, what is not is made again.
//!
//! A finished file is recognised by its inode and time of change: the same after the second run.

use std::path::Path;
use std::time::SystemTime;

use super::Case;
use super::tensors::files;
use crate::program::{stderr, text};

#[test]
fn a_stopped_conversion_is_finished_without_rewriting_anything() {
    let case = Case::new("q35-r4");
    let container = case.convert("container", &[]);
    let whole = files(&container);
    for lost in ["flash-moe.json", "experts/layer_05.bin", "checksums/layer_05.xxh3"] {
        std::fs::remove_file(container.join(lost)).expect("a finished file");
    }
    std::fs::write(container.join("experts/layer_05.bin.partial"), "half").expect("a scratch file");
    let before = stamps(&container);
    case.convert("container", &[]);
    assert_eq!(files(&container), whole);
    let after = stamps(&container);
    for (path, stamp) in before.iter().filter(|(path, _)| is_weights(path)) {
        assert_eq!(after.iter().find(|(p, _)| p == path).map(|(_, s)| s), Some(stamp), "{path}");
    }
    assert!(before.iter().filter(|(path, _)| is_weights(path)).count() > 15);
}

#[test]
fn the_dense_file_is_made_again_only_when_it_is_missing() {
    let case = Case::new("q3moe");
    let container = case.convert("container", &[]);
    let whole = files(&container);
    for lost in ["flash-moe.json", "dense.safetensors"] {
        std::fs::remove_file(container.join(lost)).expect("a finished file");
    }
    case.convert("container", &[]);
    assert_eq!(files(&container), whole);
}

#[test]
fn a_complete_container_is_left_alone() {
    let case = Case::new("q3moe");
    let container = case.convert("container", &[]);
    let before = stamps(&container);
    let destination = text(&container);
    let output = case.home.succeed(&["convert", &text(&case.source()), &destination]);
    assert!(stderr(&output).contains("already complete"), "{}", stderr(&output));
    assert_eq!(stamps(&container), before);
}

#[test]
fn other_settings_or_another_source_are_refused_by_name() {
    let case = Case::new("q3moe");
    let container = case.convert("container", &[]);
    let (source, destination) = (text(&case.source()), text(&container));
    let said = case.home.refuse(&["convert", &source, &destination, "--bits", "8"]);
    assert!(said.contains("--bits is 4 there and 8 here"), "{said}");
    std::fs::remove_file(container.join("flash-moe.json")).expect("the manifest");
    let said = case.home.refuse(&["convert", &source, &destination, "--group", "32"]);
    assert!(
        said.contains("unfinished") && said.contains("--group is 64 there and 32 here"),
        "{said}"
    );
    super::tensors::edit(&case.source(), |tensors| {
        let norm = tensors.get_mut("model.norm.weight").expect("the last norm");
        norm.bytes[1] ^= 1;
    });
    let said = case.home.refuse(&["convert", &source, &destination]);
    assert!(said.contains("the source's model.safetensors is another"), "{said}");
}

#[test]
fn a_finished_file_of_another_size_is_not_overwritten() {
    let case = Case::new("q3moe");
    let container = case.convert("container", &[]);
    std::fs::remove_file(container.join("flash-moe.json")).expect("the manifest");
    let layer = container.join("experts/layer_02.bin");
    let bytes = std::fs::read(&layer).expect("a layer");
    std::fs::write(&layer, &bytes[1..]).expect("a shorter layer");
    let said = case.home.refuse(&["convert", &text(&case.source()), &text(&container)]);
    assert!(said.contains("layer_02.bin") && said.contains("delete it"), "{said}");
}

/// Paths below a directory with what changes when a file is written anew.
fn stamps(dir: &Path) -> Vec<(String, (SystemTime, u64))> {
    let mut found = Vec::new();
    for path in files(dir).into_keys() {
        let metadata = std::fs::metadata(dir.join(&path)).expect("a file");
        found.push((text(&path), (metadata.modified().expect("a time"), inode(&metadata))));
    }
    found
}

#[cfg(unix)]
fn inode(metadata: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn inode(_metadata: &std::fs::Metadata) -> u64 {
    0
}

fn is_weights(path: &str) -> bool {
    path.ends_with(".bin") || path.ends_with(".xxh3") || path.ends_with(".safetensors")
}
