fn SOURCE_dot_NAME(m: Matrix, n: u32, x: Unit) -> f32 {
    let a = SOURCE_vec((m.weight >> 2u) + 2u * n);
    let b = SOURCE_vec((m.weight >> 2u) + 2u * n + 1u);
    let even = vec4(a.x, a.z, b.x, b.z);
    let odd = vec4(a.y, a.w, b.y, b.w);
    let mask = vec4(0x007f8000u);
    var s = dot(bitcast<vec4<f32>>(((even << vec4(15u)) & mask) | ONE), x.x0);
    s += dot(bitcast<vec4<f32>>(((even << vec4(7u)) & mask) | ONE), x.x1);
    s += dot(bitcast<vec4<f32>>(((even >> vec4(1u)) & mask) | ONE), x.x2);
    s += dot(bitcast<vec4<f32>>(((even >> vec4(9u)) & mask) | ONE), x.x3);
    s += dot(bitcast<vec4<f32>>(((odd << vec4(15u)) & mask) | ONE), x.x4);
    s += dot(bitcast<vec4<f32>>(((odd << vec4(7u)) & mask) | ONE), x.x5);
    s += dot(bitcast<vec4<f32>>(((odd >> vec4(1u)) & mask) | ONE), x.x6);
    s += dot(bitcast<vec4<f32>>(((odd >> vec4(9u)) & mask) | ONE), x.x7);
    let g = n * 32u / GROUPu;
    let scale = SOURCE_scale_SCALES(m.scales + g);
    return SOURCE_affine(s, 256.0, x.sum, scale, SOURCE_scale_SCALES(m.biases + g));
}
