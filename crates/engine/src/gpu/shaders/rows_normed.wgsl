fn input(token: u32, e: u32) -> f32 {
    return scratch[NORMED_AT + token * HIDDEN + e];
}
