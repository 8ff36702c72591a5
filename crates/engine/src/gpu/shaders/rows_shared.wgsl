fn input(token: u32, e: u32) -> f32 {
    let at = token * COLS + e;
    let gated = silu(scratch[SHARED_GATE_AT + at]) * scratch[SHARED_UP_AT + at];
    return gated * sigmoid(scratch[SHARED_SIGMOID_AT + token]);
}
