fn keep(at: u32, pair: vec2<f32>) {
    cache[at] = bitcast<u32>(pair.x);
    cache[at + 1u] = bitcast<u32>(pair.y);
}
