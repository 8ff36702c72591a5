//! The whole program against the reference implementation's numbers.
//!
//! Each tiny model is written, converted and run on the golden's prompt with `--trace`; logits, layer
//! outputs, states, chosen experts and greedy tokens must be the reference's: for the prompt in one
//! chunk, in two, and token by token, on every instruction set this CPU has.

use crate::fixture::{Golden, golden, write_checkpoint};
use crate::program::{Home, TraceFile, id_list, text};
use serde_json::Value;

/// In what numbers activations meet the weights, and how far from the reference that may lead.
#[derive(Clone, Copy)]
pub struct Numbers {
    pub flags: &'static [&'static str],
    /// Largest difference of a logit or a state; the logits' spread is 3.
    pub tolerance: f32,
}

const EXACT: Numbers = Numbers { flags: &["--exact"], tolerance: 2e-4 };
/// The default: 16-bit integers with a scale for every 64.
const FIXED: Numbers = Numbers { flags: &[], tolerance: 1e-2 };
/// Greedy tokens that the goldens hold.
const GREEDY: &str = "17";

/// What the goldens hold where a dense layer has no experts.
const NO_EXPERTS: u32 = 255;

pub struct Model {
    home: Home,
    golden: Golden,
    layers: usize,
    numbers: Numbers,
}

impl Model {
    pub fn convert(variant: &str, bits: &[&str], numbers: Numbers) -> Self {
        let home = Home::new();
        let source = home.path("source");
        write_checkpoint(variant, &source);
        let (source, container) = (text(&source), text(&home.path("container")));
        let mut args = vec!["convert"];
        args.extend_from_slice(bits);
        args.extend_from_slice(&[&source, &container]);
        home.succeed(&args);
        let golden = golden(variant);
        let layers = golden.floats("prefill.layer_last").shape[0];
        Self { home, golden, layers, numbers }
    }

    fn trace(&self, ids: &[u32], max_tokens: &str, extra: &[&str]) -> (Vec<u32>, TraceFile) {
        let trace = self.home.path("t.safetensors");
        let trace_path = text(&trace);
        let summary = self.run(ids, max_tokens, &[&["--trace", &trace_path], extra].concat());
        (generated(&summary), TraceFile::open(&trace))
    }

    fn run(&self, ids: &[u32], max_tokens: &str, extra: &[&str]) -> Value {
        let model = text(&self.home.path("container"));
        let prompt = self.home.write("prompt.ids", id_list(ids));
        let mut args = vec!["--model", &model, "--prompt-tokens", &prompt, "--greedy"];
        args.extend_from_slice(&["--ignore-eos", "--max-tokens", max_tokens]);
        args.extend_from_slice(&["--memory", "2GiB", "--context", "512"]);
        args.extend_from_slice(self.numbers.flags);
        args.extend_from_slice(extra);
        self.home.json(&args)
    }

    /// Runs the golden's prompt without a trace and compares the greedy tokens; gives the summary.
    pub fn answers(&self, extra: &[&str]) -> Value {
        let prompt = self.golden.integers("input_ids").values;
        let summary = self.run(&prompt, GREEDY, extra);
        let expected = self.golden.integers("greedy_ids").values;
        assert_eq!(generated(&summary), expected, "{extra:?}: greedy tokens");
        summary
    }

    /// Runs the golden's prompt and compares everything the golden holds.
    pub fn agrees(&self, extra: &[&str]) {
        let prompt = self.golden.integers("input_ids").values;
        let (generated, trace) = self.trace(&prompt, GREEDY, extra);
        assert_eq!(
            generated,
            self.golden.integers("greedy_ids").values,
            "{extra:?}: greedy tokens"
        );
        for phase in ["prefill", "decode"] {
            self.experts_agree(&trace, phase, phase);
            self.close(&trace.floats(&format!("{phase}.logits")).1, &format!("{phase}.logits"), 1);
            for stage in ["layer", "mixer", "moe"] {
                let (shape, values) = trace.floats(&format!("{phase}.{stage}"));
                self.close(&last_rows(&shape, &values), &format!("{phase}.{stage}_last"), 1);
            }
            self.states_agree(&trace, &format!("after_{phase}"));
        }
    }

    fn states_agree(&self, trace: &TraceFile, prefix: &str) {
        let mut compared = 0;
        for name in trace.names().iter().filter(|n| n.starts_with(prefix)) {
            let kind = name.split('.').nth(1).expect("after_phase.kind.layer");
            let stride = self.golden.about(&format!("stride.{kind}"));
            let (shape, mut values) = trace.floats(name);
            if kind == "conv_state" {
                // The golden keeps the three columns that an engine needs; a trace shows four.
                values = values.chunks_exact(shape[1]).flat_map(|row| row[1..].to_vec()).collect();
            }
            self.close(&values, name, stride.parse().expect("a stride"));
            compared += 1;
        }
        assert_eq!(compared, 2 * self.layers, "{prefix}: two states a layer");
    }

    fn experts_agree(&self, trace: &TraceFile, from: &str, name: &str) {
        let (shape, ours) = trace.ids(&format!("{from}.router_indices"));
        let theirs = self.golden.integers(&format!("{name}.router_indices"));
        assert_eq!(shape, theirs.shape);
        let top_k = shape[2];
        for (i, (ours, theirs)) in ours.chunks(top_k).zip(theirs.values.chunks(top_k)).enumerate() {
            let sorted = |ids: &[u32]| {
                let mut ids = ids.to_vec();
                ids.sort_unstable();
                ids
            };
            let (layer, token) = (i / shape[1], i % shape[1]);
            if theirs[0] == NO_EXPERTS {
                continue;
            }
            assert_eq!(
                sorted(ours),
                sorted(theirs),
                "{name}: experts, layer {layer} token {token}"
            );
        }
    }

    /// Every `stride`-th of our values against the golden's array.
    fn close(&self, ours: &[f32], name: &str, stride: usize) {
        let theirs = self.golden.floats(name).values;
        let ours: Vec<f32> = ours.iter().copied().step_by(stride).collect();
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= self.numbers.tolerance, "{name}: differs by {worst}");
    }
}

fn generated(summary: &Value) -> Vec<u32> {
    let generated = summary["generated_tokens"].as_array().expect("generated_tokens");
    generated.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// The last token's row of each layer, `[layers][tokens][width]` to `[layers][width]`.
fn last_rows(shape: &[usize], values: &[f32]) -> Vec<f32> {
    let rows = values.chunks_exact(shape[1] * shape[2]);
    rows.flat_map(|layer| layer[(shape[1] - 1) * shape[2]..].to_vec()).collect()
}

/// 150 tokens cross the 64-token chunks of the delta rule twice.
pub fn long_prompt_agrees(model: &Model) {
    let long = model.golden.integers("long_ids").values;
    let (_, trace) = model.trace(&long, "1", &[]);
    model.experts_agree(&trace, "prefill", "long");
    let (shape, logits) = trace.floats("prefill.logits");
    model.close(&logits[(shape[0] - 1) * shape[1]..], "long.logits_last", 1);
    let (shape, layers) = trace.floats("prefill.layer");
    model.close(&last_rows(&shape, &layers), "long.layer_last", 1);
}

fn agrees_in_every_way(variant: &str, bits: &[&str], numbers: Numbers) {
    let model = Model::convert(variant, bits, numbers);
    model.agrees(&[]);
    model.agrees(&["--prefill-chunk", "20"]);
    model.agrees(&["--prefill-chunk", "1"]);
    for isa in ["scalar", "avx2", "avx512", "avx512vnni", "neon", "neondot"] {
        let known = flash_moe_kernels::Isa::parse(isa).is_some();
        match known {
            true => model.agrees(&["--isa", isa, "--threads", "1"]),
            false => println!("SKIP {variant} on {isa}: this CPU has none"),
        }
    }
    long_prompt_agrees(&model);
}

pub const PLAIN: [&str; 4] = ["--bits", "bf16", "--dense-bits", "bf16"];

#[test]
fn qwen35_with_four_value_heads_a_key_head() {
    agrees_in_every_way("q35-r4", &PLAIN, EXACT);
}

#[test]
fn qwen35_with_two_value_heads_a_key_head_in_shards() {
    agrees_in_every_way("q35-r2", &PLAIN, EXACT);
}

#[test]
fn qwen3_next_interleaved_by_key_head() {
    agrees_in_every_way("q3next", &PLAIN, EXACT);
}

#[test]
fn qwen3_next_with_dense_layers() {
    agrees_in_every_way("q3next-dense", &PLAIN, EXACT);
}

#[test]
fn qwen3_moe() {
    agrees_in_every_way("q3moe", &PLAIN, EXACT);
}

#[test]
fn qwen3_moe_with_positions_stretched_by_yarn() {
    agrees_in_every_way("q3moe-yarn", &PLAIN, EXACT);
}

#[test]
fn qwen3_moe_with_dense_layers_and_tied_head() {
    agrees_in_every_way("q3moe-dense", &PLAIN, EXACT);
}

#[test]
fn mlx_four_bits_carried_over() {
    agrees_in_every_way("q35-r4-q4", &[], EXACT);
}

#[test]
fn mlx_four_bits_in_fixed_point() {
    agrees_in_every_way("q35-r4-q4", &[], FIXED);
}

#[test]
fn mlx_two_bit_experts_carried_over() {
    agrees_in_every_way("q35-r4-q2", &[], EXACT);
}

#[test]
fn mlx_two_bit_experts_in_fixed_point() {
    agrees_in_every_way("q35-r4-q2", &[], FIXED);
}
