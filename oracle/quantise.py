"""Block quantisation as the checkpoints store it: MLX affine and block-scaled FP8, in numpy.

    quantise.py OUT     checks the affine quantiser against mlx bit for bit and writes OUT, the golden of the Rust one

MLX affine: a row of K numbers is K*bits/32 little-endian words, one bit stream, number k at bit k*bits; each group of
`group` numbers has a scale and a bias, and w = scale * q + bias. The scale is negative where the largest number of the
group is positive, so that the end of larger magnitude is code 0 and exact.
"""

import json
import sys

import numpy as np

FP8_BLOCK = 128
FP8_MAX = np.float32(448.0)


def bf16(x):
    """float32 rounded to the nearest bfloat16, ties to even, kept as float32."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    u = u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
    return (u & np.uint32(0xFFFF0000)).view(np.float32)


def pack(codes, bits):
    """Codes [..., K] as little-endian words [..., K*bits/32]."""
    shifts = np.arange(bits, dtype=np.uint8)
    stream = (codes[..., None] >> shifts & 1).reshape(*codes.shape[:-1], -1)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4")


def unpack(packed, bits):
    """The inverse of `pack`."""
    stream = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=-1, bitorder="little")
    stream = stream.reshape(*packed.shape[:-1], -1, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def quantise_affine(x, bits, group):
    """bf16-valued float32 [..., K] to (words, scales, biases); scales and biases are bf16-valued float32."""
    levels = np.float32((1 << bits) - 1)
    g = x.reshape(*x.shape[:-1], -1, group)
    low, high = g.min(-1), g.max(-1)
    from_low = np.abs(low) > np.abs(high)
    edge = np.where(from_low, low, high)
    step = np.maximum((high - low) / levels, np.float32(1e-7))
    scale = np.where(from_low, step, -step)
    # The edge becomes a whole number of steps away from zero, so that zero is a code as well.
    steps = np.rint(edge / scale)
    whole = steps != 0
    scale = np.where(whole, edge / np.where(whole, steps, 1), scale).astype(np.float32)
    bias = np.where(whole, edge, np.float32(0))
    # The codes follow from the unrounded scale and bias, although the rounded ones are stored.
    codes = np.clip(np.rint((g - bias[..., None]) / scale[..., None]), 0, levels).astype(np.uint8)
    return pack(codes.reshape(x.shape), bits), bf16(scale), bf16(bias)


def dequantise_affine(packed, scales, biases, bits, group):
    """scale * q + bias in float32, one product and one sum."""
    codes = unpack(packed, bits).astype(np.float32)
    g = codes.reshape(*codes.shape[:-1], -1, group)
    return (g * scales[..., None] + biases[..., None]).reshape(codes.shape)


def encode_e4m3(x):
    """float32 of magnitude below 464 to E4M3 bytes, nearest, ties to even."""
    magnitude = np.abs(x)
    # Below 2^-6 the spacing stays that of the smallest normal numbers. frexp gives zero the exponent of 1/2.
    exponent = np.where(magnitude < 2.0**-6, -6, np.frexp(magnitude)[1] - 1)
    mantissa = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int64)
    # A mantissa of 16 carries into the exponent by itself, and one below 8 is a subnormal.
    code = (exponent + 6) * 8 + mantissa
    return (code + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def decode_e4m3(code):
    """E4M3 bytes to float32."""
    exponent, mantissa = (code >> 3 & 15).astype(np.int64), (code & 7).astype(np.float32)
    normal = np.ldexp(mantissa + np.float32(8), exponent - 10)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), normal).astype(np.float32)
    return np.where(code & 128, -value, value)


def fp8_blocks(scale, shape):
    """The scale of every element of a matrix."""
    full = np.repeat(np.repeat(scale, FP8_BLOCK, 0), FP8_BLOCK, 1)
    return full[: shape[0], : shape[1]]


def quantise_fp8(x):
    """float32 [N, K] to E4M3 bytes and a bf16-valued scale for each started block of 128 x 128."""
    rows, cols = (-(-n // FP8_BLOCK) for n in x.shape)
    padded = np.zeros((rows * FP8_BLOCK, cols * FP8_BLOCK), np.float32)
    padded[: x.shape[0], : x.shape[1]] = np.abs(x)
    largest = padded.reshape(rows, FP8_BLOCK, cols, FP8_BLOCK).max((1, 3))
    scale = bf16(largest / FP8_MAX)
    return encode_e4m3(x / fp8_blocks(scale, x.shape)), scale


def dequantise_fp8(code, scale):
    """code * scale in float32, which is exact."""
    return decode_e4m3(code) * fp8_blocks(scale, code.shape)


def golden_rows():
    """Named inputs of the affine golden, [2, 256] each."""
    from weights import normal, uniform

    shape = (2, 256)
    gaussian = normal("quantise.normal", 0, 512).reshape(shape)
    unit = uniform("quantise.unit", 0, 512, 0.0, 1.0).reshape(shape)
    ramp = np.stack([np.arange(-128, 128) / 128, np.arange(256) / 256])
    return {
        "normal": gaussian,
        "small": gaussian * 1e-3,
        "underflow": gaussian * 1e-9,
        "positive": unit + 0.5,
        "negative": -unit - 0.5,
        "zero": np.zeros(shape),
        "constant": np.full(shape, 0.3125),
        "ramp": ramp,
        "outlier": np.where(unit > 0.99, 40.0, 0.02) * gaussian,
    }


def check_fp8():
    """Every byte decodes as torch decodes it, and rounding agrees with torch's cast."""
    import torch

    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    assert np.array_equal(decode_e4m3(codes), torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy())
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(100000) * 2.0 ** rng.integers(-12, 7, 100000)).astype(np.float32)
    x = np.clip(np.concatenate([x, decode_e4m3(codes), (decode_e4m3(codes[:120]) + decode_e4m3(codes[1:121])) / 2]), -449, 449)
    x = x.astype(np.float32)
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(encode_e4m3(x), theirs)


def main(path):
    import mlx.core as mx
    from safetensors.numpy import save_file

    check_fp8()
    mx.set_default_device(mx.cpu)
    x = bf16(np.concatenate(list(golden_rows().values())).astype(np.float32))
    out = {"x": x}
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            words, *rest = mx.quantize(mx.array(x).astype(mx.bfloat16), group, bits)
            theirs = [np.array(words)] + [bf16_bits(np.array(t.astype(mx.float32))) for t in rest]
            words, *rest = quantise_affine(x, bits, group)
            ours = [words] + [bf16_bits(t) for t in rest]
            assert all(map(np.array_equal, theirs, ours)), (bits, group)
            key = f"b{bits}.g{group}."
            out[key + "weight"] = theirs[0].view(np.uint8)
            out[key + "scales"], out[key + "biases"] = theirs[1:]
    rows = ",".join(f"{name}.{i}" for name in golden_rows() for i in range(2))
    # One entry: safetensors writes several in no fixed order.
    save_file(out, path, metadata={"about": json.dumps({"mlx": mx.__version__, "rows": rows})})
    print(f"{path}: {len(out)} arrays, equal to mlx {mx.__version__}")


def bf16_bits(x):
    """bf16-valued float32 as the 16 stored bits."""
    return (np.ascontiguousarray(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


if __name__ == "__main__":
    main(sys.argv[1])
