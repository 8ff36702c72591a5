"""Writes quantise.txt: what the reference quantiser makes of rows that block.rs can make again.

    python quantise.py DIRECTORY_OF_MLX_QUANT > quantise.txt

One line a case: kind, bits, group, and the FNV-1a hash of weight bytes, scales and biases (bf16,
little-endian). Rows have 512 elements and come from integers, so every value is exact in f32.
The last lines are one case in full, to see by eye what is hashed.
"""
import sys

import numpy as np
import torch

sys.path.insert(0, sys.argv[1])
from mlx_quant import quantize  # noqa: E402

COLS = 512
KINDS = ["normal", "small", "positive", "negative", "zero", "constant", "tiny", "outlier", "symmetric"]
MASK = (1 << 64) - 1


def splitmix(seed):
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def row(kind):
    random = splitmix(KINDS.index(kind))
    out = []
    for k in range(COLS):
        r = next(random)
        fields = [(r >> s) & 0xFFFF for s in (0, 16, 32, 48)]
        normal = (sum(fields) - 131070) / 65536
        out.append({
            "normal": normal,
            "small": normal / 1024,
            "positive": (fields[0] + 32768) / 65536,
            "negative": -(fields[0] + 32768) / 65536,
            "zero": 0.0,
            "constant": 0.3125,
            "tiny": normal / (1 << 27),
            "outlier": normal * 32 if fields[3] < 1024 else normal / 64,
            "symmetric": (k - 256) / 256,
        }[kind])
    return torch.from_numpy(np.array(out, dtype=np.float64).astype(np.float32))[None]


def raw(kind, bits, group):
    weight, scales, biases = quantize(row(kind), group, bits)
    half = [t.view(torch.int16).numpy().astype("<i2").tobytes() for t in (scales, biases)]
    return weight.numpy().astype("<u4").tobytes(), *half


def fnv(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


for kind in KINDS:
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            print(kind, bits, group, f"{fnv(b''.join(raw(kind, bits, group))):016x}")
for part, data in zip(("weight", "scales", "biases"), raw("normal", 3, 128)):
    print(part, "normal 3 128", data.hex())
