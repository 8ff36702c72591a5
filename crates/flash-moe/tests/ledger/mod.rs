//! The counts that the program is held to, `tests/counts.json`, and the run that is counted.
//!
//! Counts say what timings on a shared machine cannot: whether a step does more than it did. A count
//! that has grown by more than a twentieth fails; the message says how to record it on purpose.

#![allow(dead_code, reason = "two test programs share it, and neither needs all of it")]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use flash_moe_engine::budget::Budget;
use flash_moe_engine::container::Container;
use flash_moe_engine::engine::Options;
use flash_moe_engine::store::IoMode;
use flash_moe_kernels::Isa;
use serde_json::Value;

/// Slots of the pool: a quarter of the records, so that every step reads some.
pub const SLOTS: usize = 144;
/// Tokens of context.
pub const CONTEXT: usize = 256;
/// Records the counts instead of comparing them.
const UPDATE: &str = "UPDATE_COUNTS";
/// A count may grow by one in so many.
const TOLERANCE: u64 = 20;

/// The directory of the built-in model.
pub fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")
}

/// Token ids of the prompt, all different.
pub fn prompt() -> Vec<u32> {
    (1..=16).map(|i| i * 100).collect()
}

/// Options of one thread and a pool of [`SLOTS`], whatever the rest of the plan comes to.
pub fn options(container: &Container, isa: Isa) -> Options {
    let mut options = Options {
        isa,
        memory_bytes: Some(1 << 30),
        context: Some(CONTEXT),
        io: IoMode::Buffered,
        readers: 1,
        ..Options::default()
    };
    let plan = Budget::plan(container, &options).expect("a gigabyte is enough");
    options.memory_bytes = Some(plan.fixed_bytes() + SLOTS as u64 * plan.slot_bytes);
    options
}

/// Holds a count to the recorded one, or records it if that was asked for.
pub fn hold(name: &str, found: u64) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/counts.json");
    let text = fs::read_to_string(&path).expect("tests/counts.json");
    let mut file: Value = serde_json::from_str(&text).expect("tests/counts.json is JSON");
    if env::var_os(UPDATE).is_some() {
        file["counts"][name] = found.into();
        let text = serde_json::to_string_pretty(&file).expect("JSON") + "\n";
        fs::write(&path, text).expect("tests/counts.json can be written");
        println!("{name}: {found} recorded");
        return;
    }
    let recorded = file["counts"][name].as_u64().unwrap_or_else(|| panic!("{name} in counts.json"));
    let update = "UPDATE_COUNTS=1 cargo test -p flash-moe counts";
    println!("{name}: {found}, recorded {recorded}");
    assert!(
        found <= recorded + recorded / TOLERANCE,
        "{name} is {found}, recorded is {recorded}: a step of the built-in model does more than it \
         did. If that is meant, record it with `{update}` and say why in the commit"
    );
    if found + recorded / TOLERANCE < recorded {
        println!("{name} has fallen: keep it with `{update}`");
    }
}
