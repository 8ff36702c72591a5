fn prepare(tid: u32) {}

fn input(e: u32) -> vec4<f32> {
    let at = GATE_AT + e;
    let g = vec4(scratch[at], scratch[at + 8u], scratch[at + 16u], scratch[at + 24u]);
    let other = UP_AT + e;
    let up = vec4(scratch[other], scratch[other + 8u], scratch[other + 16u], scratch[other + 24u]);
    return g / (1.0 + exp(-g)) * up;
}

fn input_scale(tid: u32) -> f32 {
    return 1.0;
}
