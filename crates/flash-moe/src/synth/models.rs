//! Dimensions of the published models, and the small files that go with them.
//!
//! The configurations are written as their publishers write them, so the rest of the program reads
//! them in the usual way. The tokenizer knows single bytes and the special tokens at their true ids:
//! enough to run and to read what a prompt becomes, far too little to be a language.

use serde_json::{Map, Value, json};

/// Id of `<|endoftext|>`; the other special tokens follow it.
const FIRST_SPECIAL: u32 = 248_044;

/// Special tokens in the order of their ids, with whether they are hidden in decoded text.
const SPECIAL: [(&str, bool); 33] = [
    ("<|endoftext|>", true),
    ("<|im_start|>", true),
    ("<|im_end|>", true),
    ("<|object_ref_start|>", true),
    ("<|object_ref_end|>", true),
    ("<|box_start|>", true),
    ("<|box_end|>", true),
    ("<|quad_start|>", true),
    ("<|quad_end|>", true),
    ("<|vision_start|>", true),
    ("<|vision_end|>", true),
    ("<|vision_pad|>", true),
    ("<|image_pad|>", true),
    ("<|video_pad|>", true),
    ("<tool_call>", false),
    ("</tool_call>", false),
    ("<|fim_prefix|>", false),
    ("<|fim_middle|>", false),
    ("<|fim_suffix|>", false),
    ("<|fim_pad|>", false),
    ("<|repo_name|>", false),
    ("<|file_sep|>", false),
    ("<tool_response>", false),
    ("</tool_response>", false),
    ("<think>", false),
    ("</think>", false),
    ("<|audio_start|>", true),
    ("<|audio_end|>", true),
    ("<tts_pad>", true),
    ("<tts_text_bos>", true),
    ("<tts_text_eod>", true),
    ("<tts_text_bos_single>", true),
    ("<|audio_pad|>", true),
];

/// A turn-by-turn template in the special tokens of the family, without tools or images.
const CHAT_TEMPLATE: &str = "\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- else %}
{{- '<think>\\n' }}
{%- endif %}
{%- endif %}";

struct Dimensions {
    hidden: u32,
    layers: usize,
    heads: u32,
    value_heads: u32,
    experts: u32,
    top_k: u32,
    width: u32,
}

/// `config.json` of a model, with the first `layers` of its layers.
pub fn config(model: &str, layers: Option<usize>) -> Value {
    let d = match model {
        "qwen3.5-35b-a3b" => Dimensions {
            hidden: 2048,
            layers: 40,
            heads: 16,
            value_heads: 32,
            experts: 256,
            top_k: 8,
            width: 512,
        },
        "qwen3.5-122b-a10b" => Dimensions {
            hidden: 3072,
            layers: 48,
            heads: 32,
            value_heads: 64,
            experts: 256,
            top_k: 8,
            width: 1024,
        },
        "qwen3.5-397b-a17b" => Dimensions {
            hidden: 4096,
            layers: 60,
            heads: 32,
            value_heads: 64,
            experts: 512,
            top_k: 10,
            width: 1024,
        },
        other => unreachable!("the command line knows no {other}"),
    };
    json!({
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "hidden_size": d.hidden,
        "num_hidden_layers": layers.unwrap_or(d.layers).min(d.layers),
        "vocab_size": 248_320,
        "rms_norm_eps": 1e-6,
        "num_attention_heads": d.heads,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": d.value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": d.experts,
        "num_experts_per_tok": d.top_k,
        "moe_intermediate_size": d.width,
        "shared_expert_intermediate_size": d.width,
        "rope_parameters": {
            "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25, "rope_type": "default"
        },
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": false,
        "eos_token_id": FIRST_SPECIAL,
    })
}

/// The files beside the weights, by name.
pub fn small_files(config: &Value) -> Vec<(&'static str, Vec<u8>)> {
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    let generation = json!({
        "bos_token_id": FIRST_SPECIAL,
        "eos_token_id": [FIRST_SPECIAL + 2, FIRST_SPECIAL],
        "pad_token_id": FIRST_SPECIAL,
        "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
    });
    let tokenizer_config = json!({
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": null,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    });
    vec![
        ("config.json", text(config)),
        ("generation_config.json", text(&generation)),
        ("tokenizer.json", text(&tokenizer())),
        ("tokenizer_config.json", text(&tokenizer_config)),
        ("chat_template.jinja", CHAT_TEMPLATE.into()),
    ]
}

/// A byte-level BPE without merges: one token a byte, and the special tokens.
fn tokenizer() -> Value {
    let mut vocab = Map::new();
    for (id, spelling) in byte_spellings().into_iter().enumerate() {
        vocab.insert(spelling.to_string(), json!(id));
    }
    let mut added = Vec::new();
    for (id, (content, special)) in (FIRST_SPECIAL..).zip(SPECIAL) {
        // In the vocabulary as well: an added token that is in it keeps its id, others are numbered
        // from the vocabulary's size on.
        vocab.insert(content.to_string(), json!(id));
        added.push(json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        }));
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": { "type": "NFC" },
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
        },
        "post_processor": null,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    })
}

/// How byte-level tokenizers spell the 256 bytes: printable ones as themselves, the rest from U+0100 on.
fn byte_spellings() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("codes below U+0200 are characters")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flash_moe_engine::shape::{Mix, Shape};

    #[test]
    fn the_published_parameter_counts_come_out() {
        // Experts alone: layers * experts * 3 * hidden * width.
        for (model, layers, attention, billions) in [
            ("qwen3.5-35b-a3b", 40, 10, 32.2),
            ("qwen3.5-122b-a10b", 48, 12, 116.0),
            ("qwen3.5-397b-a17b", 60, 15, 386.5),
        ] {
            let shape = Shape::from_config(&config(model, None)).unwrap();
            assert_eq!(shape.layers.len(), layers);
            assert_eq!(shape.count(Mix::Attention), attention);
            let each = 3 * shape.hidden * shape.moe.width;
            let experts = (layers * shape.moe.experts * each) as f64 / 1e9;
            assert!((experts - billions).abs() < 0.1, "{model}: {experts}");
        }
    }

    #[test]
    fn special_tokens_have_their_true_ids() {
        let tokenizer = tokenizer();
        let id = |name: &str| tokenizer["model"]["vocab"][name].as_u64();
        assert_eq!(id("<|im_start|>"), Some(248_045));
        assert_eq!(id("</think>"), Some(248_069));
        assert_eq!(id("a"), Some(97));
        assert_eq!(tokenizer["model"]["vocab"].as_object().unwrap().len(), 256 + 33);
    }
}
