fn kept(at: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(cache[at >> 2u]);
}
