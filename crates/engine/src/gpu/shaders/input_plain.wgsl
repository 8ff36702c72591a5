fn prepare(tid: u32) {}

fn input(e: u32) -> vec4<f32> {
    let at = MIXED_AT + e;
    return vec4(scratch[at], scratch[at + 8u], scratch[at + 16u], scratch[at + 24u]);
}

fn input_scale(tid: u32) -> f32 {
    return 1.0;
}
