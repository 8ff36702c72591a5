struct SOURCE_Packed_NAME {
    a: vec4<u32>,
    b: vec4<u32>,
    scale: f32,
    bias: f32,
}

fn SOURCE_load_NAME(m: Matrix, n: u32) -> SOURCE_Packed_NAME {
    let g = n * 32u / GROUPu;
    return SOURCE_Packed_NAME(
        SOURCE_vec((m.weight >> 2u) + 2u * n),
        SOURCE_vec((m.weight >> 2u) + 2u * n + 1u),
        SOURCE_scale_SCALES(m.scales + g),
        SOURCE_scale_SCALES(m.biases + g),
    );
}

fn SOURCE_dot_NAME(p: SOURCE_Packed_NAME, x: Unit) -> f32 {
    let even = vec4(p.a.x, p.a.z, p.b.x, p.b.z);
    let odd = vec4(p.a.y, p.a.w, p.b.y, p.b.w);
    let mask = vec4(0x007f8000u);
    var s = dot(bitcast<vec4<f32>>(((even << vec4(15u)) & mask) | ONE), x.x0);
    s += dot(bitcast<vec4<f32>>(((even << vec4(7u)) & mask) | ONE), x.x1);
    s += dot(bitcast<vec4<f32>>(((even >> vec4(1u)) & mask) | ONE), x.x2);
    s += dot(bitcast<vec4<f32>>(((even >> vec4(9u)) & mask) | ONE), x.x3);
    s += dot(bitcast<vec4<f32>>(((odd << vec4(15u)) & mask) | ONE), x.x4);
    s += dot(bitcast<vec4<f32>>(((odd << vec4(7u)) & mask) | ONE), x.x5);
    s += dot(bitcast<vec4<f32>>(((odd >> vec4(1u)) & mask) | ONE), x.x6);
    s += dot(bitcast<vec4<f32>>(((odd >> vec4(9u)) & mask) | ONE), x.x7);
    return SOURCE_affine(s, 256.0, x.sum, p.scale, p.bias);
}
