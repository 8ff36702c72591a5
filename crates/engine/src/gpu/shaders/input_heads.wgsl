// What the delta rule gave, normed by head and gated: rms norm over the head, then silu(z).

var<workgroup> head_scales: array<f32, VALUE_HEADS>;

fn prepare(tid: u32) {
    for (var head = tid; head < VALUE_HEADS; head += 256u) {
        var sum = 0.0;
        for (var block = 0u; block < VALUE_BLOCKS; block++) {
            sum += scratch[SQUARES_AT + head * VALUE_BLOCKS + block];
        }
        head_scales[head] = 1.0 / sqrt(sum / f32(VALUE_DIM) + EPS);
    }
    workgroupBarrier();
}

fn input(e: u32) -> vec4<f32> {
    let at = MIXED_AT + e;
    let mixed = vec4(scratch[at], scratch[at + 8u], scratch[at + 16u], scratch[at + 24u]);
    let gate = Z_AT + e;
    let z = vec4(scratch[gate], scratch[gate + 8u], scratch[gate + 16u], scratch[gate + 24u]);
    return mixed * head_scales[e / VALUE_DIM] * dense_vectors(e % VALUE_DIM) * z / (1.0 + exp(-z));
}

fn input_scale(tid: u32) -> f32 {
    return 1.0;
}
