fn SOURCE_dot_NAME(m: Matrix, n: u32, x: Unit) -> f32 {
    let at = m.weight + 2u * n;
    let a = SOURCE_word(at);
    let b = SOURCE_word(at + 1u);
    let q = vec4(a, a >> 16u, b, b >> 16u);
    let mask = vec4(0x00600000u);
    var s = dot(bitcast<vec4<f32>>(((q << vec4(21u)) & mask) | ONE), x.x0);
    s += dot(bitcast<vec4<f32>>(((q << vec4(19u)) & mask) | ONE), x.x1);
    s += dot(bitcast<vec4<f32>>(((q << vec4(17u)) & mask) | ONE), x.x2);
    s += dot(bitcast<vec4<f32>>(((q << vec4(15u)) & mask) | ONE), x.x3);
    s += dot(bitcast<vec4<f32>>(((q << vec4(13u)) & mask) | ONE), x.x4);
    s += dot(bitcast<vec4<f32>>(((q << vec4(11u)) & mask) | ONE), x.x5);
    s += dot(bitcast<vec4<f32>>(((q << vec4(9u)) & mask) | ONE), x.x6);
    s += dot(bitcast<vec4<f32>>(((q << vec4(7u)) & mask) | ONE), x.x7);
    let g = n * 32u / GROUPu;
    let scale = SOURCE_scale_SCALES(m.scales + g);
    return SOURCE_affine(s, 4.0, x.sum, scale, SOURCE_scale_SCALES(m.biases + g));
}
