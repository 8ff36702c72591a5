"""The tiny models of the oracle: one config.json each, and the seed that was chosen for it.

Every member has hidden size 128, 8 layers, 16 experts of which 4 are used, and 512 tokens. What differs is what an
engine can get wrong: the ratio of value to key heads, the tensor layout, the precision, dense layers, a tied head.
"""

PROMPT, STEPS, LONG = 37, 16, 150  # tokens of the prompt, greedy steps after it, tokens of the long prompt
END_OF_TEXT = 479  # first special token of the 512-entry tokenizer; prompts draw below it
LAYERS = 8

# Seeds found with `golden.py --search`: the widest gaps at the routers and in the greedy choice.
SEEDS = {
    "q35-r4": 7,
    "q35-r2": 10,
    "q3next": 22,
    "q3moe": 64,
    "q35-r4-q4": 11,
    "q35-r4-q2": 11,
    "q3moe-dense": 5,
    "q3next-dense": 10,
    "q35-r2-fp8": 24,
    "q3moe-yarn": 36,
}


def qwen35_text(value_heads):
    """The text_config of a qwen3_5_moe: three Gated DeltaNet layers, then one of full attention."""
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(LAYERS)]
    return {
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": LAYERS,
        "layer_types": kinds,
        "full_attention_interval": 4,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
        "linear_num_key_heads": 2,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "mamba_ssm_dtype": "float32",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "router_aux_loss_coef": 0.001,
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "eos_token_id": END_OF_TEXT,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def qwen35(value_heads):
    """The nested config of a multimodal repository, without its vision half."""
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": END_OF_TEXT + 12,
        "video_token_id": END_OF_TEXT + 13,
        "vision_start_token_id": END_OF_TEXT + 9,
        "vision_end_token_id": END_OF_TEXT + 10,
        "tie_word_embeddings": False,
        "text_config": qwen35_text(value_heads),
    }


def qwen3_next(**changes):
    """The flat config of qwen3_next, with the older top-level rope fields and no layer_types."""
    dropped = ("dtype", "layer_types", "attn_output_gate", "rope_parameters", "mamba_ssm_dtype")
    dropped += ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    config = {k: v for k, v in qwen35_text(4).items() if k not in dropped}
    return config | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "torch_dtype": "bfloat16",
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0,
        "rope_scaling": None,
        "intermediate_size": 256,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    } | changes


def qwen3_moe(**changes):
    """The flat config of qwen3_moe: full attention in every layer, full rotary, no shared expert."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": LAYERS,
        "max_window_layers": LAYERS,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "intermediate_size": 256,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "eos_token_id": END_OF_TEXT + 2,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    } | changes


def mlx_quantization(expert_bits):
    """The quantization block that mlx-lm writes: 4 bits, and a row for each module that differs."""
    block = {"group_size": 64, "bits": 4, "mode": "affine"}
    for layer in range(LAYERS):
        mlp = f"language_model.model.layers.{layer}.mlp."
        block[mlp + "gate"] = {"group_size": 64, "bits": 8}
        block[mlp + "shared_expert_gate"] = {"group_size": 64, "bits": 8}
        if expert_bits != 4:
            for projection in ("gate_proj", "up_proj", "down_proj"):
                block[mlp + "switch_mlp." + projection] = {"group_size": 64, "bits": expert_bits}
    return {"quantization": block, "quantization_config": block}


def fp8_quantization():
    """The quantization_config of a block-scaled FP8 repository."""
    return {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    }


def config(variant):
    """The config.json of a variant."""
    return {
        "q35-r4": lambda: qwen35(8),
        "q35-r2": lambda: qwen35(4),
        "q3next": qwen3_next,
        "q3moe": qwen3_moe,
        "q35-r4-q4": lambda: qwen35(8) | mlx_quantization(4),
        "q35-r4-q2": lambda: qwen35(8) | mlx_quantization(2),
        # Dense: layers 0, 2, 4, 6 by the step and 1 by the list; experts only in 3, 5 and 7.
        "q3moe-dense": lambda: qwen3_moe(
            decoder_sparse_step=2, mlp_only_layers=[1], norm_topk_prob=False, tie_word_embeddings=True
        ),
        "q3next-dense": lambda: qwen3_next(
            mlp_only_layers=[0, 3, 6], norm_topk_prob=False, tie_word_embeddings=True
        ),
        "q35-r2-fp8": lambda: qwen35(4) | fp8_quantization(),
        # 1,024 positions of which 256 were trained: 9 of the 32 frequencies lie on the ramp.
        "q3moe-yarn": lambda: qwen3_moe(
            max_position_embeddings=1024,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
    }[variant]()
