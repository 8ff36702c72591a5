"""Seeded weights, and the checkpoint layouts they are stored in.

A tensor depends on its name, its shape and the seed alone, through integer arithmetic and correctly rounded float64
operations, so that the Rust tests (crates/flash-moe/tests/fixture) make the same bytes and no checkpoint is committed.
"""

import json
import os

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

from quantise import dequantise_affine, dequantise_fp8, quantise_affine, quantise_fp8

GAMMA = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint32: "U32",
}


def fnv1a64(name):
    """FNV-1a of a tensor's name."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def mix(z):
    """The finaliser of splitmix64, over an array."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def words(name, seed, count):
    """The first `count` outputs of splitmix64 started from the name and the seed."""
    start = mix(np.array([fnv1a64(name) ^ (seed * GAMMA & MASK)], np.uint64))
    return mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA))


def normal(name, seed, count):
    """Sums of twelve 16-bit uniforms, centred: mean 0, deviation 1, exact in float64."""
    lanes = words(name, seed, 3 * count).astype("<u8").view("<u2").reshape(count, 12)
    return (lanes.sum(1, dtype=np.int64) - 393210).astype(np.float64) / 65536.0


def uniform(name, seed, count, low, high):
    """Uniform float64 values from the top 53 bits of a word."""
    return (words(name, seed, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53 * (high - low) + low


def token_ids(name, seed, count, below):
    """Uniform token ids."""
    return (words(name, seed, count) % np.uint64(below)).astype(np.int64).tolist()


def draw(name, shape, seed, zero_centred, tied):
    """One tensor by its name in the torch text model: useful activations, spread decays, decisive routers."""
    count, fan_in = int(np.prod(shape)), shape[-1]
    gaussian = lambda deviation: normal(name, seed, count) * deviation
    module = name.split(".")[-2] if name.endswith(".weight") else ""
    if name.endswith("linear_attn.norm.weight"):
        values = gaussian(0.2) + 1.0
    elif "norm" in module:
        values = gaussian(0.2) + (0.0 if zero_centred else 1.0)
    elif name.endswith("A_log"):
        values = uniform(name, seed, count, -4.0, 1.5)
    elif name.endswith("dt_bias"):
        values = uniform(name, seed, count, -3.0, 1.0)
    elif module == "conv1d":
        values = uniform(name, seed, count, -0.6, 0.6)
    elif module == "embed_tokens" and not tied:
        values = gaussian(1.0)
    elif module in ("embed_tokens", "lm_head"):
        values = gaussian(3.0 / np.sqrt(np.float64(fan_in)))
    elif name.endswith("mlp.gate.weight"):
        values = gaussian(2.0 / np.sqrt(np.float64(fan_in)))
    else:
        values = gaussian(1.0 / np.sqrt(np.float64(fan_in)))
    return torch.from_numpy(values.astype(np.float32).reshape(shape)).to(torch.bfloat16)


def hub_names(tensors, nested, a_log):
    """Names and dtypes of a hub repository: fused experts under `nested`, otherwise one by one."""
    out = {}
    for name, value in tensors.items():
        if name.endswith("A_log"):
            value = value.to(a_log)
        if nested and name.startswith("model."):
            name = "model.language_model." + name.removeprefix("model.")
        out[name] = value
    return out


def split_experts(tensors):
    """Fused expert stacks as one matrix for each expert and projection."""
    out = {}
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition("experts.")
        if not stem or leaf not in ("gate_up_proj", "down_proj"):
            out[name] = value
            continue
        for expert, matrix in enumerate(value):
            key = f"{stem}experts.{expert}."
            if leaf == "down_proj":
                out[key + "down_proj.weight"] = matrix
            else:
                half = matrix.shape[0] // 2
                out[key + "gate_proj.weight"] = matrix[:half]
                out[key + "up_proj.weight"] = matrix[half:]
    return out


FP8_PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


def fp8_layout(tensors):
    """Projections of the trunk as F8_E4M3 with a scale for each 128x128 block; the MTP head stays BF16."""
    out, used = {}, {}
    for name, value in hub_names(split_experts(tensors), True, torch.bfloat16).items():
        torch_name = name.replace("model.language_model.", "model.", 1)
        if name.startswith("mtp.") or name.split(".")[-2] not in FP8_PROJECTIONS:
            out[name], used[torch_name] = value, value.float()
        else:
            weight, scale = quantise_fp8(value.float().numpy())
            out[name] = torch.from_numpy(weight).view(torch.float8_e4m3fn)
            out[name + "_scale_inv"] = torch.from_numpy(scale).to(torch.bfloat16)
            used[torch_name] = torch.from_numpy(dequantise_fp8(weight, scale))
    return out, fuse_experts(used)


def fuse_experts(tensors):
    """The inverse of `split_experts`, for the torch model."""
    out, stacks = {}, {}
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition(".experts.")
        if stem:
            expert, projection, _ = leaf.split(".")
            stacks.setdefault(stem, {})[int(expert), projection] = value
        else:
            out[name] = value
    for stem, parts in stacks.items():
        experts = range(1 + max(expert for expert, _ in parts))
        both = [torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in experts]
        out[stem + ".experts.gate_up_proj"] = torch.stack(both)
        out[stem + ".experts.down_proj"] = torch.stack([parts[e, "down_proj"] for e in experts])
    return out


def mlx_names(tensors):
    """MLX module names: gate and up are stacks of their own, norms hold bf16(1 + w), the MTP head is dropped."""
    out = {}
    for name, value in tensors.items():
        path = "language_model." + name
        if name.startswith("mtp."):
            continue
        if name.endswith("experts.gate_up_proj"):
            stem, half = path.removesuffix("experts.gate_up_proj"), value.shape[1] // 2
            out[stem + "switch_mlp.gate_proj.weight"] = value[:, :half]
            out[stem + "switch_mlp.up_proj.weight"] = value[:, half:]
        elif name.endswith("experts.down_proj"):
            out[path.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = value
        elif "norm" in name.split(".")[-2] and not name.endswith("linear_attn.norm.weight"):
            out[path] = value + 1.0  # a bf16 sum, rounded as MLX rounds it
        elif name.endswith("conv1d.weight"):
            out[path] = value.movedim(2, 1)
        else:
            out[path] = value.float() if name.endswith("A_log") else value
    return out


def mlx_layout(tensors, block):
    """MLX affine layout. Returns the stored tensors and what the torch model must hold to equal them."""
    out, used = {}, {}
    for path, value in mlx_names(tensors).items():
        module = path.removesuffix(".weight")
        name = path.removeprefix("language_model.")
        if value.dim() < 2 or "conv1d" in path:
            out[path] = value
            plus_one = "norm" in name and not name.endswith("linear_attn.norm.weight")
            used[name] = value.float() - 1.0 if plus_one else value.float()
            if "conv1d" in path:
                used[name] = used[name].movedim(1, 2)
            continue
        rule = block.get(module, block)
        weight, scales, biases = quantise_affine(value.float().numpy(), rule["bits"], rule["group_size"])
        out[path] = torch.from_numpy(weight)
        out[module + ".scales"] = torch.from_numpy(scales).to(torch.bfloat16)
        out[module + ".biases"] = torch.from_numpy(biases).to(torch.bfloat16)
        used[name] = torch.from_numpy(dequantise_affine(weight, scales, biases, rule["bits"], rule["group_size"]))
    for name in [n for n in used if n.endswith("switch_mlp.gate_proj.weight")]:
        stem = name.removesuffix("switch_mlp.gate_proj.weight")
        gate, up = used.pop(name), used.pop(stem + "switch_mlp.up_proj.weight")
        used[stem + "experts.gate_up_proj"] = torch.cat([gate, up], 1)
        used[stem + "experts.down_proj"] = used.pop(stem + "switch_mlp.down_proj.weight")
    return out, used


def layout(config, tensors):
    """What a checkpoint of this config stores, and the float32 weights of the model it describes."""
    if "quantization" in config:
        out, used = mlx_layout(tensors, config["quantization"])
    elif "quantization_config" in config:
        out, used = fp8_layout(tensors)
    else:
        nested = "text_config" in config
        out = hub_names(tensors if nested else split_experts(tensors), nested, torch.float32)
        used = {name: value.float() for name, value in tensors.items()}
    return {name: value.contiguous().clone() for name, value in out.items()}, used


def fingerprint(tensors):
    """xxh3_64 over name, dtype, shape and bytes of every tensor, in the order of the names."""
    h = xxhash.xxh3_64()
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"{name}\n{DTYPES[t.dtype]}\n{','.join(map(str, t.shape))}\n".encode())
        h.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def write_checkpoint(folder, config, tensors):
    """One safetensors file, its index and config.json."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    kind = "mlx" if "quantization" in config else "pt"
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": kind})
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {name: "model.safetensors" for name in sorted(tensors)},
    }
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump(index, f, indent=1)
