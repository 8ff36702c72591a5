struct SOURCE_Packed_NAME {
    a: u32,
    b: u32,
    scale: f32,
    bias: f32,
}

fn SOURCE_load_NAME(m: Matrix, n: u32) -> SOURCE_Packed_NAME {
    let g = n * 32u / GROUPu;
    return SOURCE_Packed_NAME(
        SOURCE_word(m.weight + 2u * n),
        SOURCE_word(m.weight + 2u * n + 1u),
        SOURCE_scale_SCALES(m.scales + g),
        SOURCE_scale_SCALES(m.biases + g),
    );
}

fn SOURCE_dot_NAME(p: SOURCE_Packed_NAME, x: Unit) -> f32 {
    let q = vec4(p.a, p.a >> 16u, p.b, p.b >> 16u);
    let mask = vec4(0x00600000u);
    var s = dot(bitcast<vec4<f32>>(((q << vec4(21u)) & mask) | ONE), x.x0);
    s += dot(bitcast<vec4<f32>>(((q << vec4(19u)) & mask) | ONE), x.x1);
    s += dot(bitcast<vec4<f32>>(((q << vec4(17u)) & mask) | ONE), x.x2);
    s += dot(bitcast<vec4<f32>>(((q << vec4(15u)) & mask) | ONE), x.x3);
    s += dot(bitcast<vec4<f32>>(((q << vec4(13u)) & mask) | ONE), x.x4);
    s += dot(bitcast<vec4<f32>>(((q << vec4(11u)) & mask) | ONE), x.x5);
    s += dot(bitcast<vec4<f32>>(((q << vec4(9u)) & mask) | ONE), x.x6);
    s += dot(bitcast<vec4<f32>>(((q << vec4(7u)) & mask) | ONE), x.x7);
    return SOURCE_affine(s, 4.0, x.sum, p.scale, p.bias);
}
