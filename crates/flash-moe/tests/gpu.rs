//! The reference implementation's numbers on the first GPU of the machine, for every tiny variant.
//!
//! Mesa's lavapipe is a GPU like any other here. Without one these tests print SKIP; where
//! `FLASH_MOE_GPU_TESTS` is set, as in CI, they fail instead.

use std::env;

use flash_moe_engine::gpu::adapters;

use crate::fixture::converted;
use crate::parity::{Model, Numbers, PLAIN, long_prompt_agrees};
use crate::program::{Home, text};
use serde_json::Value;

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
fn a_hot_set_is_left_alone_where_experts_pass_by_the_pool() {
    if !there_is_one() {
        return;
    }
    let home = Home::new();
    let file = text(&home.path("hot.json"));
    let on = |device, more: &[&str]| {
        let args = ["run", "--greedy", "--max-tokens", "4", "--hot-set", &file, "--device", device];
        home.succeed(&[&args[..], more, &["A robot"]].concat())
    };
    on("cpu", &[]);
    let kept = std::fs::read(&file).expect("a hot set");
    // Vulkan's first adapter may be a card with memory of its own, whose experts go through the pool.
    let run = on("gpu:0", &["--json"]);
    let object: Value = serde_json::from_slice(&run.stdout).expect("one JSON object");
    let video = &object["video_memory"];
    let in_place = video["read_in_place"] == video["uploads"];
    let said = String::from_utf8(run.stderr).expect("text");
    assert_eq!(said.contains("hot set neither read nor saved"), in_place, "{said}");
    assert_eq!(std::fs::read(&file).expect("a hot set") == kept, in_place);
    let said = on("gpu:0", &["--gpu-uploads", "staged"]).stderr;
    assert!(!String::from_utf8(said).expect("text").contains("hot set"));
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

/// Bytes of video memory that hold so many experts of each layer of a model beside everything else.
fn memory_for(plan: &Value, slots: u64) -> String {
    let lines = plan["video_memory"]["lines"].as_array().expect("lines");
    let fixed: u64 = lines.iter().map(|l| l["bytes"].as_u64().expect("bytes")).sum();
    let all = plan["video_memory"]["slots_bytes"].as_u64().expect("bytes");
    let slot = all / plan["video_memory"]["slots"].as_u64().expect("slots");
    (fixed + slots * slot).to_string()
}

#[test]
fn a_plan_for_a_gpu_adds_up_and_a_bench_holds_its_stages_against_it() {
    if !there_is_one() {
        return;
    }
    let home = converted();
    let model = text(&home.path("container"));
    let object = |args: &[&str]| -> Value {
        let all = [args, &["--model", &model, "--quick", "--json", "--device", "gpu:0"]].concat();
        serde_json::from_slice(&home.succeed(&all).stdout).expect("one JSON object on stdout")
    };
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} is no number"));
    // The context that the bench will need.
    let asked = ["plan", "--context", "64"];
    let whole = object(&[&asked[..], &["--gpu-memory", "900MiB"]].concat());
    let video = &whole["video_memory"];
    assert_eq!((&video["slots"], &video["hit_rate"]["low"]), (&video["experts"], &1.0.into()));
    let memory = memory_for(&whole, 8);
    let few = ["--gpu-memory", &memory, "--gpu-misses", "cpu"];
    let plan = object(&[&asked[..], &few].concat());
    let video = &plan["video_memory"];
    assert_eq!((&video["slots"], &video["computed_eighths"]), (&8.into(), &8.into()), "{video}");
    let [low, high] = ["low", "high"].map(|end| number(&video["decode"][end]));
    assert!(low > 0.0 && low <= high && high.is_finite(), "{video}");
    let [low, high] = ["low", "high"].map(|end| number(&video["prefill"][end]));
    assert!(low > 0.0 && low <= high && high.is_finite(), "{video}");
    assert_eq!(video["chunk"]["tokens"], 64, "the context");
    for what in ["dense", "experts", "attention"] {
        assert!(number(&video["chunk"][format!("{what}_flops_per_second")]) > 0.0, "{video}");
    }
    let asked = ["bench", "--context-at", "24,48", "--decode", "8", "--prefill", "24"];
    let found = object(&[&asked[..], &few, &["--context", "64"]].concat());
    assert!(number(&found["limits"]["gpu"]["read_bytes_per_second"]) > 0.0);
    assert!(number(&found["limits"]["gpu"]["upload_bytes_per_second"]) > 0.0);
    // Headers and vectors are not in the plan.
    let slots = found["model"]["video_memory"]["slots"].as_u64();
    assert!(slots == Some(7) || slots == Some(8), "{}", found["model"]);
    for run in found["runs"].as_array().expect("runs") {
        let stages = run["stages"].as_array().expect("stages");
        let sum: f64 = stages.iter().map(|s| number(&s["seconds"])).sum();
        assert!((sum - number(&run["seconds"])).abs() < 1e-6, "{run}");
        assert!(stages.iter().any(|s| s["stage"] == "experts" && s["limit"] == "video"), "{run}");
        let stage = |name| stages.iter().find(|s| s["stage"] == name);
        let [uploads, computed] = ["uploads", "computed"].map(|name| run["fed"][name].as_u64());
        assert_eq!(
            stage("uploads").map(|s| s["calls"].as_u64()),
            uploads.filter(|n| *n > 0).map(Some)
        );
        assert_eq!(stage("cpu_experts").is_some(), computed > Some(0), "{run}");
        let is_cold = run["pool"] == "cold";
        // Nothing of a prompt is the processor's, and after a cold start something is missing.
        assert!(run["phase"] == "decode" || computed == Some(0), "{run}");
        assert!(!is_cold || uploads.max(computed) > Some(0), "{run}");
    }
    let resident = object(&[&asked[..], &["--gpu-memory", "900MiB", "--context", "64"]].concat());
    for note in ["runs are warm", "timed by the device"] {
        assert!(resident["notes"].to_string().contains(note), "{}", resident["notes"]);
    }
    assert!(found["kernels"].as_array().is_some_and(Vec::is_empty), "{}", found["kernels"]);
    let kernels = resident["kernels"].as_array().expect("kernels");
    assert_eq!(kernels.last().map(|k| &k["kernel"]), Some(&"logits".into()));
    assert!(kernels.iter().all(|k| k["position"] == 48 && number(&k["seconds"]) > 0.0));
    let mut runs = resident["runs"].as_array().expect("runs").iter();
    assert!(runs.all(|run| run["pool"] == "warm" && run["fed"]["uploads"] == 0));
}

#[test]
fn pages_about_a_gpu_are_at_most_100_columns_wide() {
    if !there_is_one() {
        return;
    }
    let home = converted();
    let model = text(&home.path("container"));
    let bench = ["bench", "--quiet", "--decode", "4", "--context-at", "24", "--prefill", "16"];
    for args in [&bench[..], &["plan"]] {
        let machine = ["--model", &model, "--quick", "--device", "gpu:0", "--gpu-memory", "900MiB"];
        let output = home.succeed(&[args, &machine].concat());
        let page = String::from_utf8(output.stdout).expect("text");
        let widest = page.lines().map(|l| l.chars().count()).max();
        assert!(widest.is_some_and(|w| w <= 100), "{widest:?} columns:\n{page}");
        assert!(page.contains("an answer after") && page.contains("experts"), "{page}");
        let has_prefill = page.contains("prefill tok/s of") && page.contains("answers checked");
        assert_eq!(has_prefill, args[0] == "plan", "{page}");
    }
    let plan = ["plan", "--like", "qwen3.5-35b-a3b", "--quick", "--device", "gpu:0"];
    let scratch = text(&home.path(""));
    let with = |memory| [&plan[..], &["--gpu-memory", memory, "--scratch", &scratch]].concat();
    let page = String::from_utf8(home.succeed(&with("8GiB")).stdout).expect("text");
    assert!(page.contains("of 256 a layer") && page.contains("on the GPU"), "{page}");
    assert!(page.lines().all(|line| line.chars().count() <= 100), "{page}");
    let said = home.refuse(&with("1GiB"));
    // Of memory that is the processor's as well, what is missing is told first.
    let ways = ["smallest that runs is --gpu-memory 2", "MiB more, or --gpu-memory 2"];
    assert!(ways.iter().any(|way| said.contains(way)), "{said}");
}
