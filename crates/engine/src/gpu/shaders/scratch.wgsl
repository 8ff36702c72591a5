// What every kernel shares: the scratch buffer and the small functions. Constants in capitals that no
// file declares are the model's; the engine writes them in front.

@group(0) @binding(0) var<storage, read_write> scratch: array<f32>;

fn silu(x: f32) -> f32 {
    return x / (1.0 + exp(-x));
}

fn sigmoid(x: f32) -> f32 {
    return 1.0 / (1.0 + exp(-x));
}

fn position() -> u32 {
    return bitcast<u32>(scratch[TOKEN_AT]);
}
