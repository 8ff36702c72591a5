fn give(at: u32, value: f32) {
    scratch[at] = value;
}
