fn keep(at: u32, pair: vec2<f32>) {
    cache[at >> 1u] = pack2x16float(pair);
}
