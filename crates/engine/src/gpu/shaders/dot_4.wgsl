struct SOURCE_Packed_NAME {
    q: vec4<u32>,
    scale: f32,
    bias: f32,
}

fn SOURCE_load_NAME(m: Matrix, n: u32) -> SOURCE_Packed_NAME {
    let g = n * 32u / GROUPu;
    return SOURCE_Packed_NAME(
        SOURCE_vec((m.weight >> 2u) + n),
        SOURCE_scale_SCALES(m.scales + g),
        SOURCE_scale_SCALES(m.biases + g),
    );
}

fn SOURCE_dot_NAME(p: SOURCE_Packed_NAME, x: Unit) -> f32 {
    let q = p.q;
    let mask = vec4(0x00780000u);
    var s = dot(bitcast<vec4<f32>>(((q << vec4(19u)) & mask) | ONE), x.x0);
    s += dot(bitcast<vec4<f32>>(((q << vec4(15u)) & mask) | ONE), x.x1);
    s += dot(bitcast<vec4<f32>>(((q << vec4(11u)) & mask) | ONE), x.x2);
    s += dot(bitcast<vec4<f32>>(((q << vec4(7u)) & mask) | ONE), x.x3);
    s += dot(bitcast<vec4<f32>>(((q << vec4(3u)) & mask) | ONE), x.x4);
    s += dot(bitcast<vec4<f32>>(((q >> vec4(1u)) & mask) | ONE), x.x5);
    s += dot(bitcast<vec4<f32>>(((q >> vec4(5u)) & mask) | ONE), x.x6);
    s += dot(bitcast<vec4<f32>>(((q >> vec4(9u)) & mask) | ONE), x.x7);
    return SOURCE_affine(s, 16.0, x.sum, p.scale, p.bias);
}
