fn input(token: u32, e: u32) -> f32 {
    return scratch[MIXED_AT + token * COLS + e];
}
