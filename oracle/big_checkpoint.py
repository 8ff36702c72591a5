#!/usr/bin/env python3
"""A hub checkpoint of Qwen3.5-35B-A3B's dimensions with a few layers, to measure conversion.

    python oracle/big_checkpoint.py OUT [--layers 4] [--tokenizer DIR]

BF16, fused experts, nested config, 5 GB shards with an index, as the published repository stores it.
The values are random and small; they mean nothing, but no two groups of them are alike. Needs nothing
but Python. DIR gives tokenizer.json; by default the one of the tiny models.
"""
import argparse
import json
import os
import random
import struct

H, HEADS, KV, HD = 2048, 16, 2, 256
KEY_HEADS, VALUE_HEADS, DK, DV = 16, 32, 128, 128
EXPERTS, TOP_K, WIDTH, VOCAB = 256, 8, 512, 248320
SHARD_BYTES = 5 << 30
HERE = os.path.dirname(os.path.abspath(__file__))
TOKENIZER = os.path.join(HERE, "../crates/flash-moe/tests/fixture/tokenizer")


def tensors(layers):
    """Names and shapes, in the order in which they are written."""
    prefix = "model.language_model."
    yield prefix + "embed_tokens.weight", [VOCAB, H]
    for i in range(layers):
        p = f"{prefix}layers.{i}."
        yield p + "input_layernorm.weight", [H]
        yield p + "post_attention_layernorm.weight", [H]
        if (i + 1) % 4 == 0:
            yield p + "self_attn.q_proj.weight", [2 * HEADS * HD, H]
            yield p + "self_attn.k_proj.weight", [KV * HD, H]
            yield p + "self_attn.v_proj.weight", [KV * HD, H]
            yield p + "self_attn.o_proj.weight", [H, HEADS * HD]
            yield p + "self_attn.q_norm.weight", [HD]
            yield p + "self_attn.k_norm.weight", [HD]
        else:
            channels = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
            yield p + "linear_attn.in_proj_qkv.weight", [channels, H]
            yield p + "linear_attn.in_proj_z.weight", [VALUE_HEADS * DV, H]
            yield p + "linear_attn.in_proj_b.weight", [VALUE_HEADS, H]
            yield p + "linear_attn.in_proj_a.weight", [VALUE_HEADS, H]
            yield p + "linear_attn.conv1d.weight", [channels, 1, 4]
            yield p + "linear_attn.A_log", [VALUE_HEADS]
            yield p + "linear_attn.dt_bias", [VALUE_HEADS]
            yield p + "linear_attn.norm.weight", [DV]
            yield p + "linear_attn.out_proj.weight", [H, VALUE_HEADS * DV]
        yield p + "mlp.gate.weight", [EXPERTS, H]
        yield p + "mlp.experts.gate_up_proj", [EXPERTS, 2 * WIDTH, H]
        yield p + "mlp.experts.down_proj", [EXPERTS, H, WIDTH]
        for name, shape in [("gate_proj", [WIDTH, H]), ("up_proj", [WIDTH, H]), ("down_proj", [H, WIDTH])]:
            yield p + f"mlp.shared_expert.{name}.weight", shape
        yield p + "mlp.shared_expert_gate.weight", [1, H]
    yield prefix + "norm.weight", [H]
    yield "lm_head.weight", [VOCAB, H]


def config(layers):
    text = {
        "model_type": "qwen3_5_moe_text", "hidden_size": H, "num_hidden_layers": layers, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HD,
        "full_attention_interval": 4, "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS, "linear_key_head_dim": DK, "linear_value_head_dim": DV,
        "linear_conv_kernel_dim": 4, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": WIDTH,
        "max_position_embeddings": 262144, "eos_token_id": 248044, "mtp_num_hidden_layers": 0,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "default"},
    }
    return {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "text_config": text, "tie_word_embeddings": False}


def noise(rng):
    """16 MiB of bf16 values with magnitudes of 2^-7 to 2^-5."""
    block = bytearray(rng.randbytes(16 << 20))
    block[1::2] = block[1::2].translate(bytes((b & 0x80) | 0x3C | (b & 1) for b in range(256)))
    return bytes(block)


def write_shard(path, part, block, rng):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, size in part:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, size in part:
            while size:
                # A new place in the block for every piece, so that experts differ.
                start = rng.randrange(0, len(block) // 2) & ~1
                piece = block[start:start + min(size, 4 << 20)]
                file.write(piece)
                size -= len(piece)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokenizer", default=TOKENIZER)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    rng = random.Random(1)
    block = noise(rng)
    shards, size_in_shard = [[]], 0
    for name, shape in tensors(args.layers):
        size = 2
        for n in shape:
            size *= n
        if shards[-1] and size_in_shard + size > SHARD_BYTES:
            shards.append([])
            size_in_shard = 0
        shards[-1].append((name, shape, size))
        size_in_shard += size
    weight_map, total = {}, 0
    for i, part in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(os.path.join(args.out, name), part, block, rng)
        weight_map.update({tensor: name for tensor, _, _ in part})
        total += sum(size for _, _, size in part)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files = {"model.safetensors.index.json": index, "config.json": config(args.layers)}
    for name, content in files.items():
        with open(os.path.join(args.out, name), "w") as file:
            json.dump(content, file, indent=1)
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        with open(os.path.join(args.tokenizer, name), "rb") as source:
            with open(os.path.join(args.out, name), "wb") as file:
                file.write(source.read())
    print(f"{total / 1e9:.2f} GB in {len(shards)} shards")


if __name__ == "__main__":
    main()
