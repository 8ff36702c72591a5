//! The reference implementation's numbers on the first GPU of the machine, for every tiny variant.
//!
//! Mesa's lavapipe is a GPU like any other here. Without one these tests print SKIP; where
//! `FLASH_MOE_GPU_TESTS` is set, as in CI, they fail instead.

use std::env;

use flash_moe_engine::gpu::adapters;

use crate::fixture::converted;
use crate::parity::{Model, Numbers, PLAIN, long_prompt_agrees};
use crate::program::{Home, text};

const GPU: Numbers = Numbers { flags: &["--device", "gpu:0"], tolerance: 1e-3 };

/// Whether there is a GPU to test on.
fn there_is_one() -> bool {
    let is_one = !adapters().is_empty();
    if !is_one {
        assert!(env::var_os("FLASH_MOE_GPU_TESTS").is_none(), "a GPU test needs an adapter");
        println!("SKIP: no adapter");
    }
    is_one
}

fn agrees(variants: &[&str], bits: &[&str]) {
    if !there_is_one() {
        return;
    }
    for variant in variants {
        let model = Model::convert(variant, bits, GPU);
        model.agrees(&[]);
        long_prompt_agrees(&model);
    }
}

/// With one slot more than a token needs, and the processor computing what is missing.
fn agrees_with_few_slots(variants: &[&str], bits: &[&str]) {
    if !there_is_one() {
        return;
    }
    for variant in variants {
        let model = Model::convert(variant, bits, GPU);
        let whole = model.answers(&[]);
        let number = |name: &str| whole["video_memory"][name].as_u64().expect("a number");
        let top_k = whole["settings"]["experts_per_token"].as_u64().expect("a number");
        let bytes = number("fixed_bytes") + (top_k + 1) * number("slot_bytes");
        let few = ["--gpu-memory", &bytes.to_string(), "--gpu-misses", "cpu"];
        let summary = model.answers(&few);
        let video = &summary["video_memory"];
        assert_eq!(video["slots"], top_k + 1, "{video}");
        assert!(video["decode"]["computed"].as_u64() > Some(0), "{video}");
        model.agrees(&few);
        let video = &model.answers(&["--gpu-memory", &bytes.to_string(), "--gpu-misses", "upload"])
            ["video_memory"];
        assert!(video["decode"]["uploads"].as_u64() > Some(0), "{video}");
        assert_eq!(video["computed"], 0, "{video}");
    }
}

#[test]
fn every_variant_with_few_slots_on_a_gpu() {
    let plain =
        ["q35-r4", "q35-r2", "q3next", "q3next-dense", "q3moe", "q3moe-yarn", "q3moe-dense"];
    agrees_with_few_slots(&plain, &PLAIN);
    agrees_with_few_slots(&["q35-r4-q4", "q35-r4-q2"], &[]);
}

#[test]
fn qwen35_on_a_gpu() {
    agrees(&["q35-r4", "q35-r2"], &PLAIN);
}

#[test]
fn qwen3_next_on_a_gpu() {
    agrees(&["q3next", "q3next-dense"], &PLAIN);
}

#[test]
fn qwen3_moe_on_a_gpu() {
    agrees(&["q3moe", "q3moe-yarn", "q3moe-dense"], &PLAIN);
}

#[test]
fn mlx_four_and_two_bits_on_a_gpu() {
    agrees(&["q35-r4-q4", "q35-r4-q2"], &[]);
}

#[test]
fn the_greedy_tokens_and_the_state_are_those_of_the_processor() {
    if !there_is_one() {
        return;
    }
    let home = Home::new();
    let state = text(&home.path("state"));
    let run = |more: &[&str]| {
        let args = ["--greedy", "--max-tokens", "24", "--exact", "--kv-cache", "f16"];
        home.json(&[&args[..], more].concat())["generated_tokens"].clone()
    };
    let story = ["Once upon a time there was a robot"];
    let on_cpu = run(&[&["--device", "cpu"][..], &story].concat());
    let kept = ["--device", "gpu:0", "--save-state", &state];
    assert_eq!(run(&[&kept[..], &story].concat()), on_cpu);
    let more = |device| run(&["--device", device, "--load-state", &state, "And then?"]);
    assert_eq!(more("gpu:0"), more("cpu"));
}

#[test]
fn devices_and_refusals_say_what_to_do() {
    let home = converted();
    let said = String::from_utf8(home.succeed(&["devices"]).stdout).expect("text");
    assert!(said.starts_with("gpu:0  ") || said.contains("libvulkan1"), "{said}");
    let model = text(&home.path("container"));
    let prompt = home.write("p.ids", "1,2,3");
    let refused = |flags: &[&str]| {
        home.refuse(&[&["run", "--model", &model, "--prompt-tokens", &prompt], flags].concat())
    };
    let said = refused(&["--device", "cpu", "--gpu-memory", "1GiB"]);
    assert!(said.contains("--gpu-memory needs a GPU"), "{said}");
    let said = refused(&["--device", "cpu", "--gpu-misses", "cpu"]);
    assert!(said.contains("--gpu-misses needs a GPU"), "{said}");
    let said = refused(&["--device", "gpu:7"]);
    assert!(said.contains("flash-moe: gpu: "), "{said}");
}
