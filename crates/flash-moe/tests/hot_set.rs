//! `--hot-set` as a user meets it: kept at the end of a run, read at the start of the next.
//!
//! How many more hits it brings is tested on the engine, where the background can be waited for.
//! Here it counts that the numbers stay the same bit for bit, that the file is what it says, and that
//! nothing that is wrong with it stops a run.

use std::fs;

use crate::fixture::converted;
use crate::program::{Home, TraceFile, id_list, stderr, text};
use serde_json::Value;

/// The summary of a run with these flags, and the bits of its logits.
fn run(home: &Home, extra: &[&str]) -> (Value, Vec<u32>) {
    let ids: Vec<u32> = (0..20).map(|i| i * 37 % 470).collect();
    let prompt = home.write("prompt.ids", id_list(&ids));
    let (model, trace) = (text(&home.path("container")), text(&home.path("t.safetensors")));
    let mut args = vec!["--model", &model, "--prompt-tokens", &prompt, "--greedy", "--ignore-eos"];
    args.extend_from_slice(&["-n", "30", "--context", "64", "--trace", &trace]);
    args.extend_from_slice(extra);
    let summary = home.json(&args);
    let trace = TraceFile::open(&home.path("t.safetensors"));
    let logits = ["prefill.logits", "decode.logits"].map(|name| trace.floats(name).1).concat();
    (summary, logits.iter().map(|l| l.to_bits()).collect())
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

#[test]
fn a_kept_hot_set_changes_no_bit_and_is_read_by_the_next_run() {
    let home = converted();
    let kept = home.path("container/hot-set.json");
    let (off, expected) = run(&home, &[]);
    assert!(!kept.exists() && off["settings"]["hot_set"] == Value::Null);
    let (first, logits) = run(&home, &["--hot-set", "auto"]);
    assert_eq!(logits, expected);
    assert_eq!(first["counters"]["hot_set"]["reads"], 0);
    let (second, logits) = run(&home, &["--hot-set", "auto"]);
    assert_eq!(logits, expected);
    assert_eq!(second["settings"]["hot_set"], text(&kept));
    let counters = &second["counters"];
    assert!(count(&counters["hot_set"]["reads"]) > 0, "{counters}");
    let both = |counters: &Value| count(&counters["hits"]) + count(&counters["misses"]);
    assert_eq!(both(counters), both(&first["counters"]));
    let record = count(&off["counters"]["read_bytes"]) / count(&off["counters"]["misses"]);
    assert_eq!(count(&counters["demanded_bytes"]), count(&counters["misses"]) * record);

    let file: Value = serde_json::from_slice(&fs::read(&kept).expect("a file")).expect("JSON");
    assert_eq!((&file["format"], &file["version"]), (&"flash-moe hot set".into(), &1.into()));
    let uses: Vec<u64> =
        file["experts"].as_array().expect("a list").iter().map(|e| count(&e[2])).collect();
    assert!(uses.len() > 10 && uses.is_sorted_by(|a, b| a >= b) && uses.last() > Some(&0));
    let names = fs::read_dir(home.path("container")).expect("a directory").flatten();
    let partial = names.filter(|entry| text(&entry.path()).ends_with("partial"));
    assert_eq!(partial.count(), 0, "no half file is left");
    home.succeed(&["verify", &text(&home.path("container"))]);
}

#[test]
fn a_damaged_or_foreign_file_is_a_note_and_is_replaced() {
    let home = converted();
    let file = text(&home.path("kept"));
    let (_, expected) = run(&home, &["--hot-set", &file]);
    let good = fs::read_to_string(&file).expect("a file");
    let model = text(&home.path("container"));
    let tokens = home.write("ids", "1 2 3");
    let args = ["run", "-m", &model, "--prompt-tokens", &tokens, "-n", "2", "--hot-set", &file];
    for (damage, expected) in [
        (String::new(), "not a hot set"),
        (good[..good.len() / 2].to_string(), "not a hot set"),
        ("[1, 2]".into(), "not a hot set"),
        (good.replace("hot set", "cold set"), "not a hot set"),
        (good.replace("\"version\":1", "\"version\":2"), "version 2, this build reads 1"),
        (good.replace("\"model\":\"", "\"model\":\"0"), "of another model"),
    ] {
        fs::write(&file, damage).expect("written");
        let said = stderr(&home.succeed(&args));
        assert!(said.contains(&format!("note: hot set ignored: {file}: {expected}")), "{said}");
        let said = stderr(&home.succeed(&args));
        assert!(!said.contains("note: hot set"), "replaced by a whole one: {said}");
    }
    // Experts that no model has are passed over.
    let strange = good.replace("\"experts\":[", "\"experts\":[[9,9,9],[65535,65535,4294967295],");
    fs::write(&file, strange).expect("written");
    assert_eq!(run(&home, &["--hot-set", &file]).1, expected);
}

#[test]
fn a_hot_set_that_cannot_be_kept_is_a_note() {
    let home = converted();
    let model = text(&home.path("container"));
    let tokens = home.write("ids", "1 2 3");
    let nowhere = text(&home.path("no/such/directory/kept"));
    let args = ["run", "-m", &model, "--prompt-tokens", &tokens, "-n", "2", "--hot-set", &nowhere];
    let said = stderr(&home.succeed(&args));
    assert!(said.contains(&format!("note: hot set not saved: {nowhere}")), "{said}");
    assert!(said.contains("--hot-set off"), "{said}");
}

#[test]
fn a_text_that_is_measured_can_keep_its_hot_set_too() {
    let home = Home::new();
    let (novel, file) =
        (home.write("text.txt", "The dog ran to the gate. ".repeat(8)), text(&home.path("kept")));
    let eval = || home.succeed(&["eval", "--json", "--text", &novel, "--hot-set", &file]).stdout;
    let perplexity = |output: Vec<u8>| {
        let measured: Value = serde_json::from_slice(&output).expect("one JSON object");
        measured["perplexity"].as_f64().expect("a number").to_bits()
    };
    let first = perplexity(eval());
    assert!(home.path("kept").exists());
    assert_eq!(perplexity(eval()), first);
}
