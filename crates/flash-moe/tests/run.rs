//! `run` and `eval` as a user meets them, on the built-in model in a home of its own.
//!
//! What the text says is the model's business; here it counts that it is the same when it should be,
//! ends where it should, comes out where it should, and that every bad input is refused with a
//! message that names what is wrong.

use std::io::Write;
use std::process::{Output, Stdio};

use crate::fixture::converted;
use crate::program::{Home, TraceFile, id_list, stderr, text};
use serde_json::Value;

const PROMPT: &str = "Tell me a story about a robot and a lost kitten.";

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("the answer is UTF-8")
}

fn ids(summary: &Value, field: &str) -> Vec<u32> {
    let list = summary[field].as_array().unwrap_or_else(|| panic!("{field} is no list"));
    list.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// Runs the program with `input` on its standard input.
fn with_input(home: &Home, args: &[&str], input: &[u8]) -> Output {
    let mut command = home.command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    child.stdin.take().expect("a pipe").write_all(input).expect("the program reads its input");
    child.wait_with_output().expect("the program ends")
}

#[test]
fn a_story_comes_on_stdout_and_the_summary_on_stderr() {
    let home = Home::new();
    let output = home.succeed(&["run", "--seed", "1", PROMPT]);
    let (story, said) = (stdout(&output), stderr(&output));
    assert!(story.split_whitespace().count() > 60, "{story}");
    assert!(story.contains("robot") && story.ends_with('\n'), "{story}");
    assert!(!story.contains('\x1b') && !story.contains("<|"), "{story}");
    for part in ["prompt 23 tokens at", "first token after", "generated", "expert hits", "seed 1"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let quiet = home.succeed(&["run", "--seed", "1", "--quiet", PROMPT]);
    assert_eq!((stdout(&quiet), stderr(&quiet)), (story, String::new()));
}

#[test]
fn the_summary_object_is_whole() {
    let home = Home::new();
    let summary = home.json(&["--seed", "3", "--max-tokens", "20", PROMPT]);
    assert_eq!(ids(&summary, "prompt_tokens").len(), 23);
    assert_eq!(ids(&summary, "generated_tokens").len(), 20);
    assert_eq!(summary["finish_reason"], "length");
    assert!(!summary["text"].as_str().expect("text").is_empty());
    for part in ["load_ms", "prefill_ms", "ttft_ms", "decode_ms"] {
        assert!(summary["timings"][part].as_f64().is_some_and(|ms| ms > 0.0), "{part}");
    }
    for part in ["prefill_tokens_per_second", "decode_tokens_per_second"] {
        assert!(summary[part].as_f64().is_some_and(|rate| rate > 0.0), "{part}");
    }
    // 12 layers, 4 experts each: 19 steps, and at most as many as there are for the prompt.
    let (counters, prefill) = (&summary["counters"], &summary["counters"]["prefill"]);
    let count = |part: &Value, field: &str| part[field].as_u64().expect("a count");
    let decode = &counters["decode"];
    assert_eq!(count(decode, "hits") + count(decode, "misses"), 19 * 12 * 4);
    assert_eq!(count(counters, "misses"), count(prefill, "misses") + count(decode, "misses"));
    assert!(count(counters, "read_bytes") > 0);
    assert!(summary["stages"]["decode"]["experts"]["calls"].as_u64() >= Some(19 * 12));
    let settings = &summary["settings"];
    assert_eq!(settings["sampling"]["seed"], 3);
    assert_eq!(settings["sampling"]["top_k"], 20);
    assert_eq!(settings["sampling"]["greedy"], false);
    assert_eq!(settings["experts_per_token"], 4);
    assert_eq!(settings["context"], 2048);
    assert_eq!(summary["lossy"], Value::Array(Vec::new()));
}

#[test]
fn greedy_and_seeded_runs_repeat_and_other_seeds_differ() {
    let home = Home::new();
    let run = |args: &[&str]| {
        let mut all = args.to_vec();
        all.extend_from_slice(&["--max-tokens", "40", PROMPT]);
        ids(&home.json(&all), "generated_tokens")
    };
    let greedy = run(&["--greedy"]);
    assert_eq!(run(&["--greedy", "--seed", "5", "--threads", "1"]), greedy);
    assert_eq!(run(&["--temperature", "0"]), greedy);
    assert_eq!(run(&["--top-k", "1", "--seed", "9"]), greedy);
    let seeded = run(&["--seed", "5"]);
    assert_eq!(run(&["--seed", "5"]), seeded);
    assert_ne!(run(&["--seed", "6"]), seeded);
}

#[test]
fn text_stops_before_a_stop_text_and_after_the_most_tokens() {
    let home = Home::new();
    let whole = home.json(&["--greedy", PROMPT]);
    assert_eq!(whole["finish_reason"], "stop");
    let story = whole["text"].as_str().expect("text");
    let first_sentence = story.split('.').next().expect("a sentence");

    let cut = home.json(&["--greedy", "--stop", "never there", "--stop", ". ", PROMPT]);
    assert_eq!(
        (cut["text"].as_str(), &cut["finish_reason"]),
        (Some(first_sentence), &"stop".into())
    );
    let output = home.succeed(&["run", "-q", "--greedy", "--stop", ". ", PROMPT]);
    assert_eq!(stdout(&output), format!("{first_sentence}\n"));

    let few = home.json(&["--greedy", "--max-tokens", "3", PROMPT]);
    assert_eq!(ids(&few, "generated_tokens"), ids(&whole, "generated_tokens")[..3]);
    let full = home.json(&["--greedy", "--context", "30", PROMPT]);
    assert_eq!(full["finish_reason"], "length");
    // The last token needs no place in the context.
    assert_eq!(ids(&full, "generated_tokens").len(), 30 - 23 + 1);
}

#[test]
fn one_prompt_is_the_same_from_everywhere() {
    let home = Home::new();
    let file = home.write("prompt.txt", format!("{PROMPT}\n"));
    let args = ["run", "--json", "--greedy", "--max-tokens", "4"];
    let run = |extra: &[&str], input: &[u8]| {
        let all: Vec<&str> = args.iter().chain(extra).copied().collect();
        let output = with_input(&home, &all, input);
        assert!(output.status.success(), "{extra:?}: {}", stderr(&output));
        let summary: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        (ids(&summary, "prompt_tokens"), ids(&summary, "generated_tokens"))
    };
    let expected = run(&[PROMPT], b"");
    assert_eq!(run(&["-f", &file], b""), expected);
    assert_eq!(run(&["-"], PROMPT.as_bytes()), expected);
    assert_eq!(run(&[], PROMPT.as_bytes()), expected);
    assert_eq!(run(&["-f", "-"], format!("{PROMPT}\r\n").as_bytes()), expected);

    let list = home.write("ids", id_list(&expected.0));
    assert_eq!(run(&["--prompt-tokens", &list], b""), expected);
    let spaced = id_list(&expected.0).replace(',', "\n");
    assert_eq!(run(&["--prompt-tokens", "-"], spaced.as_bytes()), expected);
    let wrapped = format!("<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(run(&["--raw", &wrapped], b""), expected);
    assert_ne!(run(&["--system", "You are a pirate.", PROMPT], b"").0, expected.0);
}

#[test]
fn fewer_experts_are_lossy_and_more_than_there_are_refused() {
    let home = Home::new();
    let output = home.succeed(&["run", "-q", "--experts-per-token", "2", "-n", "2", "Hello"]);
    assert!(stderr(&output).contains("lossy: experts for each token: 2"), "{}", stderr(&output));
    let summary = home.json(&["--experts-per-token", "2", "-n", "2", "Hello"]);
    assert!(summary["lossy"][0].as_str().expect("a sentence").contains("trained with 4"));
    let more = home.json(&["--experts-per-token", "8", "-n", "2", "Hello"]);
    assert_eq!(more["lossy"], Value::Array(Vec::new()));
    for count in ["0", "49"] {
        let said = home.refuse(&["run", "--experts-per-token", count, "Hello"]);
        assert!(said.contains("48"), "{said}");
    }
}

#[test]
fn positions_beyond_the_trained_ones_need_yarn() {
    let home = Home::new();
    let said = home.refuse(&["run", "--context", "4096", "Hello"]);
    assert!(said.contains("takes 1 to 2048") && said.contains("--yarn"), "{said}");
    let args = ["--yarn", "2", "--context", "4096", "--raw", "--greedy", "-n", "1", "Hello"];
    let summary = home.json(&args);
    assert_eq!(summary["lossy"][0], "--yarn: positions stretched 2 times");
    for factor in ["0.5", "NaN", "inf"] {
        let said = home.refuse(&["run", "--yarn", factor, "Hello"]);
        assert!(said.contains("--yarn") && said.contains("factor"), "{said}");
    }
}

#[test]
fn activations_are_16_bit_unless_a_flag_says_otherwise() {
    let home = Home::new();
    let run = |flags: &[&str]| {
        let trace = text(&home.path("t.safetensors"));
        let mut args = vec!["--raw", "--greedy", "-n", "2", "--trace", &trace];
        args.extend_from_slice(flags);
        args.push("Once upon a time");
        let summary = home.json(&args);
        let logits = TraceFile::open(&home.path("t.safetensors")).floats("prefill.logits").1;
        (summary, logits)
    };
    let (exact, reference) = run(&["--exact"]);
    assert_eq!(exact["settings"]["activations"], "f32");
    assert_eq!(exact["lossy"], Value::Array(Vec::new()));
    let apart = |logits: &[f32]| {
        let pairs = logits.iter().zip(&reference).filter(|(_, r)| r.is_finite());
        pairs.map(|(l, r)| (l - r).abs()).fold(0.0, f32::max)
    };
    let (default, logits) = run(&[]);
    assert_eq!(default["settings"]["activations"], "fixed16");
    assert_eq!(default["lossy"], Value::Array(Vec::new()));
    let fine = apart(&logits);
    assert!(fine > 0.0 && fine < 0.05, "{fine}");
    let (fast, logits) = run(&["--fast"]);
    assert_eq!(fast["settings"]["activations"], "int8");
    assert!(fast["lossy"][0].as_str().is_some_and(|l| l.contains("8-bit")), "{}", fast["lossy"]);
    assert!(apart(&logits) > 10.0 * fine, "{}", apart(&logits));
    let both = home.run(&["run", "--exact", "--fast", "Hello"]);
    assert_eq!(both.status.code(), Some(2), "{}", stderr(&both));
}

#[test]
fn thinking_is_told_apart_and_ended_by_its_budget() {
    let home = Home::new();
    let prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\nWell, the boy";
    let args = ["--raw", "--greedy", "--ignore-eos", "-n", "12", "--think-budget", "5"];
    let summary = home.json(&[&args[..], &[prompt]].concat());
    let tokens = ids(&summary, "generated_tokens");
    let closing = 4095;
    assert_eq!(tokens.iter().position(|&id| id == closing), Some(5), "{tokens:?}");
    assert!(!summary["thinking"].as_str().expect("thinking").is_empty());
    assert!(!summary["text"].as_str().expect("text").contains("</think>"));
    let shown = stdout(&home.succeed(&[&["run"], &args[..], &[prompt]].concat()));
    assert!(shown.starts_with("<think>\n") && shown.contains("</think>\n\n"), "{shown}");
    let quiet = stdout(&home.succeed(&[&["run", "-q"], &args[..], &[prompt]].concat()));
    assert!(!quiet.contains("think"), "{quiet}");
}

#[test]
fn a_trace_has_the_arrays_of_the_goldens() {
    let home = Home::new();
    let path = text(&home.path("t.safetensors"));
    home.json(&[
        "--raw",
        "--greedy",
        "--ignore-eos",
        "-n",
        "4",
        "--trace",
        &path,
        "Once upon a time",
    ]);
    let trace = TraceFile::open(&home.path("t.safetensors"));
    let (shape, prompt) = trace.ids("input_ids");
    let tokens = shape[0];
    assert_eq!(prompt.len(), tokens);
    assert_eq!(trace.ids("greedy_ids").0, [4]);
    for (name, shape) in [
        ("prefill.embed", vec![tokens, 256]),
        ("prefill.mixer", vec![12, tokens, 256]),
        ("prefill.moe", vec![12, tokens, 256]),
        ("prefill.layer", vec![12, tokens, 256]),
        ("prefill.final_norm", vec![tokens, 256]),
        ("prefill.logits", vec![tokens, 4096]),
        ("prefill.router_logits", vec![12, tokens, 48]),
        ("prefill.router_weights", vec![12, tokens, 4]),
        ("decode.layer", vec![12, 3, 256]),
        ("decode.logits", vec![3, 4096]),
        ("after_prefill.conv_state.0", vec![512, 4]),
        ("after_prefill.delta_state.0", vec![4, 64, 64]),
        ("after_prefill.k_cache.3", vec![2, tokens, 64]),
        ("after_decode.v_cache.3", vec![2, tokens + 3, 64]),
    ] {
        assert_eq!(trace.floats(name).0, shape, "{name}");
    }
    assert_eq!(trace.ids("prefill.router_indices").0, [12, tokens, 4]);
    let said = home.refuse(&["run", "--trace", &path, "Hello"]);
    assert!(said.contains("--raw or --prompt-tokens"), "{said}");
    let said = home.refuse(&["run", "--raw", "--trace", "/nowhere/t", "Hello"]);
    assert!(said.contains("/nowhere/t"), "{said}");
}

#[test]
fn timing_names_the_stages_and_the_plan() {
    let home = Home::new();
    let said = stderr(&home.succeed(&["run", "--timing", "-n", "3", "Hello"]));
    for part in
        ["memory plan", "expert pool", "prefill", "decode", "delta_net", "attention", "GB/s"]
    {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
}

#[test]
fn bad_prompts_are_refused_by_name() {
    let home = Home::new();
    let latin = home.write("latin.txt", b"caf\xe9");
    let empty = home.write("empty.txt", "\n");
    let words = home.write("words", "1, two");
    let large = home.write("large", "1, 9999999");
    let long = home.write("long.txt", "word ".repeat(3000));
    for (args, expected) in [
        (&["-f", "/nowhere.txt"][..], "/nowhere.txt"),
        (&["-f", &latin], "latin.txt: not UTF-8 text, from byte 3 on"),
        (&["-f", &empty], "the prompt is empty"),
        (&[""], "the prompt is empty"),
        (&["--raw", ""], "the prompt is empty"),
        (&[], "the prompt is empty"),
        (&["--prompt-tokens", &words], "token 1 is \"two\""),
        (&["--prompt-tokens", &empty], "no token ids"),
        (&["--prompt-tokens", &large], "9999999 is outside the vocabulary of 4096"),
        (&["-f", &long], "the context holds 2048"),
        (&["--context", "10", PROMPT], "the prompt has 23 tokens, the context holds 10"),
        (&["--context", "4096", PROMPT], "takes 1 to 2048"),
    ] {
        let said = home.refuse(&[&["run"], args].concat());
        assert!(said.contains(expected), "{args:?}: {said}");
        assert_eq!(said.matches("flash-moe: ").count(), 1, "told once: {said}");
    }
}

#[test]
fn bad_settings_are_refused_by_name() {
    let home = Home::new();
    for (args, expected) in [
        (&["--temperature=-1"][..], "temperature is -1"),
        (&["--top-p", "0"], "top_p is 0"),
        (&["--min-p", "2"], "min_p is 2"),
        (&["--repetition-penalty", "0"], "repetition_penalty is 0"),
        (&["--memory", "1MiB"], "smallest that runs is"),
        (&["--model", "/nowhere"], "/nowhere: no such directory"),
    ] {
        let said = home.refuse(&[&["run"], args, &["Hello"]].concat());
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    let missing = ["avx512", "avx2", "neon"]
        .into_iter()
        .find(|isa| flash_moe_kernels::Isa::parse(isa).is_none());
    if let Some(isa) = missing {
        let said = home.refuse(&["run", "--isa", isa, "Hello"]);
        assert!(said.contains("this CPU has scalar"), "{said}");
    }
    for args in [&["--memory", "much"][..], &["--threads", "0"], &["--greedy", "--top-k", "3"]] {
        let output = home.run(&[&["run"], args, &["Hello"]].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
}

/// A container of the built-in model that may be broken.
fn copied_model(home: &Home) -> String {
    home.succeed(&["run", "-q", "-n", "1", "Hello"]);
    let cache = home.path(".cache/flash-moe");
    let unpacked = std::fs::read_dir(&cache).expect("the cache").next().expect("an entry");
    let (from, to) = (unpacked.expect("an entry").path(), home.path("model"));
    for dir in ["experts", "checksums"] {
        std::fs::create_dir_all(to.join(dir)).expect("a directory");
    }
    for dir in ["", "experts", "checksums"] {
        for entry in std::fs::read_dir(from.join(dir)).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_file() {
                let name = path.file_name().expect("a name");
                std::fs::copy(&path, to.join(dir).join(name)).expect("a copy");
            }
        }
    }
    text(&to)
}

#[test]
#[cfg(target_os = "linux")]
fn a_broken_model_is_refused_by_name() {
    let home = Home::new();
    let model = copied_model(&home);
    let refuse = |args: &[&str]| home.refuse(&[&["run", "-m", &model], args].concat());

    std::fs::remove_file(home.path("model/tokenizer.json")).expect("removed");
    assert!(refuse(&["Hello"]).contains("has no tokenizer.json"));
    assert!(refuse(&["--stop", "x", "Hello"]).contains("--stop needs"));
    let list = home.write("ids", "1 2 3");
    let args = ["run", "-q", "-m", &model, "--prompt-tokens", &list, "--greedy", "-n", "3"];
    let shown = stdout(&home.succeed(&args));
    assert_eq!(shown.split_whitespace().filter_map(|id| id.parse::<u32>().ok()).count(), 3);

    let model = copied_model(&home);
    std::fs::remove_file(home.path("model/tokenizer_config.json")).expect("removed");
    let said = home.refuse(&["run", "-m", &model, "Hello"]);
    assert!(said.contains("chat_template") && said.contains("--raw"), "{said}");
    home.succeed(&["run", "-q", "-m", &model, "--raw", "-n", "1", "Hello"]);

    let layer = home.path("model/experts/layer_05.bin");
    let bytes = std::fs::read(&layer).expect("a layer");
    std::fs::write(&layer, &bytes[..bytes.len() - 1]).expect("written");
    let said = home.refuse(&["run", "-m", &model, "--raw", "Hello"]);
    assert!(said.contains("layer_05.bin") && said.contains("expected"), "{said}");
}

#[test]
#[cfg(target_os = "linux")]
fn the_built_in_model_is_unpacked_once_and_repaired() {
    let home = Home::new();
    let run = || home.command(&["run", "-q", "--greedy", "-n", "3", "Hello"]);
    let started: Vec<_> =
        (0..3).map(|_| run().stdout(Stdio::piped()).spawn().expect("the program starts")).collect();
    let answers: Vec<String> = started
        .into_iter()
        .map(|child| stdout(&child.wait_with_output().expect("the program ends")))
        .collect();
    assert!(!answers[0].is_empty() && answers.iter().all(|a| *a == answers[0]), "{answers:?}");

    let cache = home.path(".cache/flash-moe");
    let entries: Vec<_> = std::fs::read_dir(&cache).expect("the cache").flatten().collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
    let unpacked = entries[0].path();
    home.succeed(&["verify", &text(&unpacked)]);
    let damaged = unpacked.join("experts/layer_03.bin");
    let mut bytes = std::fs::read(&damaged).expect("a layer");
    bytes[1000] ^= 1;
    std::fs::write(&damaged, &bytes).expect("written");
    let repaired = run().output().expect("the program runs");
    assert_eq!(stdout(&repaired), answers[0]);
    bytes[1000] ^= 1;
    assert!(std::fs::read(&damaged).expect("a layer") == bytes, "not repaired");
}

#[test]
#[cfg(target_os = "linux")]
fn a_cache_that_cannot_be_written_is_named() {
    let home = Home::new();
    let file = home.write("file", "");
    for (variable, dir) in [("FLASH_MOE_CACHE", file.clone()), ("XDG_CACHE_HOME", file.clone())] {
        let output = home.command(&["run", "Hello"]).env(variable, &dir).output().expect("runs");
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&file) && said.contains("set FLASH_MOE_CACHE"), "{said}");
    }
    let elsewhere = text(&home.path("elsewhere"));
    let mut command = home.command(&["run", "-q", "-n", "1", "Hello"]);
    assert!(command.env("FLASH_MOE_CACHE", &elsewhere).status().expect("runs").success());
    assert!(!home.path(".cache").exists() && home.path("elsewhere").exists());
}

#[test]
#[cfg(unix)]
fn a_closed_pipe_ends_the_program_quietly() {
    let home = Home::new();
    let mut command = home.command(&["run", "--ignore-eos", "-n", "400", PROMPT]);
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_the_text_and_still_sums_up() {
    let home = Home::new();
    let mut command = home.command(&["run", "--ignore-eos", "-n", "2000", PROMPT]);
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    // The first byte of the answer says that Ctrl-C is being listened for.
    let mut first = [0];
    let mut answer = child.stdout.take().expect("a pipe");
    std::io::Read::read_exact(&mut answer, &mut first).expect("an answer");
    let id = child.id().to_string();
    let kill = std::process::Command::new("kill").args(["-INT", &id]).status();
    assert!(kill.expect("kill runs").success());
    let reader = std::thread::spawn(move || std::io::read_to_string(answer));
    let output = child.wait_with_output().expect("the program ends");
    let rest = reader.join().expect("the reader ends").expect("the answer is UTF-8");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("interrupted"), "{}", stderr(&output));
    assert!(rest.ends_with('\n'));
}

#[test]
fn eval_measures_a_text_and_compares_two_models() {
    let home = Home::new();
    let model = copied_model(&home);
    let novel =
        "The little dog ran to the gate. \"Where are you going?\" asked the boy.\n".repeat(12);
    let file = home.write("text.txt", &novel);
    let eval = |extra: &[&str]| {
        let output = home.succeed(&[&["eval", "--json", "--text", &file], extra].concat());
        serde_json::from_slice::<Value>(&output.stdout).expect("one JSON object")
    };
    let number = |value: &Value, field: &str| value[field].as_f64().expect("a number");
    let alone = eval(&["--context", "32"]);
    let tokens = alone["tokens"].as_u64().expect("a count");
    // The first token of each window is not scored.
    assert_eq!(alone["scored"].as_u64(), Some(tokens - tokens.div_ceil(32)));
    assert!((1.5..500.0).contains(&number(&alone, "perplexity")), "{alone}");
    assert!(number(&eval(&[]), "perplexity") < number(&alone, "perplexity"), "longer windows help");
    assert_eq!(eval(&["--limit", "40"])["tokens"], 40);

    let same = eval(&["--context", "32", "--against", &model]);
    assert_eq!((number(&same, "kl_mean_nats"), number(&same, "top1_agreement")), (0.0, 1.0));
    let close = (number(&same, "perplexity") / number(&alone, "perplexity") - 1.0).abs();
    assert!(close < 1e-4, "{close}");
    let lossy = eval(&["--context", "32", "--experts-per-token", "1"]);
    assert!(lossy["lossy"][0].as_str().is_some_and(|l| l.contains("token: 1, ")), "{lossy}");

    let latin = home.write("latin.txt", b"\xff");
    assert!(home.refuse(&["eval", "--text", &latin]).contains("latin.txt: not UTF-8"));
    assert!(home.refuse(&["eval", "--text", &home.write("one", "a")]).contains("at least 2"));
}

#[test]
fn help_and_version_are_there() {
    let home = Home::new();
    let help = stdout(&home.succeed(&["help", "run"]));
    for part in ["Sampling", "Machine", "Output", "Examples", "--think-budget", "--prompt-tokens"] {
        assert!(help.contains(part), "no {part} in the help");
    }
    let version = stdout(&home.succeed(&["--version"]));
    assert_eq!(version, format!("flash-moe {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_saved_state_goes_on_as_if_it_had_never_stopped() {
    let home = Home::new();
    let (state, then) = (text(&home.path("story.state")), text(&home.path("then.state")));
    let raw = ["--raw", "--greedy", "--ignore-eos", "Once upon a time"];
    let whole = home.json(&[&raw[..], &["-n", "30"]].concat());
    let before = ids(&whole, "prompt_tokens").len() as u64;
    let whole = ids(&whole, "generated_tokens");
    let first = home.json(&[&raw[..], &["-n", "12", "--save-state", &state]].concat());
    let first = ids(&first, "generated_tokens");
    let go_on = ["--load-state", &state, "--raw", "--greedy", "--ignore-eos", "-n", "18", ""];
    let summary = home.json(&[&go_on[..], &["--save-state", &then]].concat());
    assert_eq!([first, ids(&summary, "generated_tokens")].concat(), whole);
    assert_eq!(summary["state_tokens"].as_u64(), Some(before + 12));
    assert!(ids(&summary, "prompt_tokens").is_empty());
    // A state of a state, and the state itself as often as one likes.
    assert_eq!(home.json(&go_on)["generated_tokens"], summary["generated_tokens"]);
    let longer = home.json(&["--load-state", &then, "--raw", "-n", "1", ""]);
    assert_eq!(longer["state_tokens"].as_u64(), Some(before + 30));
    assert!(!home.path("story.state.partial").exists());
}

#[test]
fn a_prompt_after_a_state_is_the_next_turn() {
    let home = Home::new();
    let state = text(&home.path("chat.state"));
    let first = home.json(&["--greedy", "--save-state", &state, PROMPT]);
    let before = ids(&first, "prompt_tokens").len() + ids(&first, "generated_tokens").len();
    let next = home.json(&["--greedy", "-n", "5", "--load-state", &state, "And then?"]);
    assert_eq!(next["state_tokens"].as_u64(), Some(before as u64));
    let turn = ids(&next, "prompt_tokens");
    let plain = ids(&home.json(&["--greedy", "-n", "5", "And then?"]), "prompt_tokens");
    assert!(turn.len() > plain.len() && turn.ends_with(&plain), "{turn:?} {plain:?}");
    assert_ne!(next["generated_tokens"], first["generated_tokens"]);
}

#[test]
fn a_state_that_cannot_be_used_is_refused_before_the_weights_are_read() {
    let home = Home::new();
    let state = text(&home.path("a.state"));
    home.succeed(&["run", "-q", "-n", "3", "--save-state", &state, PROMPT]);
    let refused = |flags: &[&str], says: &str| {
        let said = home.refuse(&[&["run", "--load-state"], flags].concat());
        assert!(said.contains(says), "{flags:?}: {said}");
    };
    refused(&["nowhere.state", "p"], "nowhere.state: No such file");
    refused(&[&home.write("text", "not a state at all"), "p"], "no file of --save-state");
    refused(&[&state, "--exact", "p"], "activations");
    refused(&[&state, "--experts-per-token", "2", "p"], "--experts-per-token 4");
    refused(&[&state, "--context", "20", "p"], "the state has 26 tokens");
    let other = converted();
    let model = text(&other.path("container"));
    refused(&[&state, "-m", &model, "p"], "give the model that it was made with");
    let place = text(&home.path("no/such/place"));
    let said = home.refuse(&["run", "--save-state", &place, PROMPT]);
    assert!(said.contains("no/such/place"), "{said}");
}

#[test]
fn a_kv_cache_with_less_than_f32_is_named_as_lossy_and_takes_less_memory() {
    let home = Home::new();
    let run = |flags: &[&str]| home.json(&[&["--greedy", "-n", "3"], flags, &[PROMPT]].concat());
    let plain = run(&[]);
    assert_eq!(
        (&plain["settings"]["kv_cache"], &plain["lossy"]),
        (&"f32".into(), &Value::Array(Vec::new()))
    );
    for format in ["f16", "bf16", "int8", "tq2", "k4v2"] {
        let found = run(&["--kv-cache", format]);
        assert_eq!(found["settings"]["kv_cache"], format);
        assert!(found["lossy"][0].as_str().expect("a loss").contains(format), "{}", found["lossy"]);
    }
    let args = ["run", "--json", "-q", "-n", "1", PROMPT];
    let output = home.command(&args).env("TQ_KV", "1").output().expect("the program starts");
    let found: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(found["settings"]["kv_cache"], "tq2");
    let scratch = text(&home.path(""));
    let kv_bytes = |flags: &[&str]| {
        let args = [
            &["plan", "--like", "qwen3.5-35b-a3b", "--memory", "64GiB", "--quick", "--json"],
            flags,
        ];
        let plan: Value = serde_json::from_slice(
            &home
                .succeed(
                    &[&args.concat()[..], &["--context", "131072", "--scratch", &scratch]].concat(),
                )
                .stdout,
        )
        .expect("one JSON object");
        let lines = plan["memory"]["lines"].as_array().expect("lines").clone();
        let line = lines.iter().find(|line| line["name"] == "KV cache").expect("the KV cache");
        line["bytes"].as_u64().expect("bytes")
    };
    // Ten layers of two heads of 256: 68 bytes a vector in two bits, 512 in halves.
    let (halves, codes) = (kv_bytes(&["--kv-cache", "f16"]), kv_bytes(&["--kv-cache", "tq2"]));
    let vectors = 131_072 * 10 * 2 * 2;
    assert!(halves >= vectors * 512 && halves < vectors * 512 * 21 / 20, "{halves}");
    assert!(codes >= vectors * 68 && codes < vectors * 68 * 21 / 20, "{codes}");
    let said = home.refuse(&["run", "--kv-sink", "64", PROMPT]);
    assert!(said.contains("--kv-cache tq2"), "{said}");
    let unknown = home.run(&["run", "--kv-cache", "int4", PROMPT]);
    assert!(stderr(&unknown).contains("k4v2") && unknown.status.code() == Some(2));
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_takes_no_more_is_an_error_and_a_reader_that_left_is_none() {
    let home = converted();
    let model = text(&home.path("container"));
    for args in [&["inspect", &model][..], &["inspect", "--json", &model], &["verify", &model]] {
        let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let output = home.command(args).stdout(full()).output().expect("it starts");
        let said = stderr(&output);
        assert!(!output.status.success() && said.contains("standard output"), "{args:?}: {said}");
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = home.command(args).stdout(writer).stderr(full()).output().expect("it starts");
        assert!(output.status.success(), "{args:?}: {:?}", output.status);
    }
}
