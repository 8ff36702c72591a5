@group(2) @binding(0) var<storage, read> dense: array<vec4<u32>>;
@group(2) @binding(1) var<storage, read> dense_words: array<u32>;

fn dense_vec(at: u32) -> vec4<u32> {
    return dense[at];
}

fn dense_word(at: u32) -> u32 {
    return dense_words[at];
}

fn shared_input(e: u32) -> vec4<f32> {
    let at = SHARED_GATE_AT + e;
    let g = vec4(scratch[at], scratch[at + 8u], scratch[at + 16u], scratch[at + 24u]);
    let other = SHARED_UP_AT + e;
    let up = vec4(scratch[other], scratch[other + 8u], scratch[other + 16u], scratch[other + 24u]);
    return g / (1.0 + exp(-g)) * up * sigmoid(scratch[SHARED_SIGMOID_AT]);
}
