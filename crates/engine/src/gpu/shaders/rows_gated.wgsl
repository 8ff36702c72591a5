fn input(token: u32, e: u32) -> f32 {
    return silu(scratch[GATE_AT + token * COLS + e]) * scratch[UP_AT + token * COLS + e];
}
