fn SOURCE_dot_NAME(m: Matrix, n: u32, x: Unit) -> f32 {
    let q = SOURCE_vec((m.weight >> 2u) + n);
    let mask = vec4(0x00780000u);
    var s = dot(bitcast<vec4<f32>>(((q << vec4(19u)) & mask) | ONE), x.x0);
    s += dot(bitcast<vec4<f32>>(((q << vec4(15u)) & mask) | ONE), x.x1);
    s += dot(bitcast<vec4<f32>>(((q << vec4(11u)) & mask) | ONE), x.x2);
    s += dot(bitcast<vec4<f32>>(((q << vec4(7u)) & mask) | ONE), x.x3);
    s += dot(bitcast<vec4<f32>>(((q << vec4(3u)) & mask) | ONE), x.x4);
    s += dot(bitcast<vec4<f32>>(((q >> vec4(1u)) & mask) | ONE), x.x5);
    s += dot(bitcast<vec4<f32>>(((q >> vec4(5u)) & mask) | ONE), x.x6);
    s += dot(bitcast<vec4<f32>>(((q >> vec4(9u)) & mask) | ONE), x.x7);
    let g = n * 32u / GROUPu;
    let scale = SOURCE_scale_SCALES(m.scales + g);
    return SOURCE_affine(s, 16.0, x.sum, scale, SOURCE_scale_SCALES(m.biases + g));
}
