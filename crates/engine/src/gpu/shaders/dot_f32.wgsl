fn SOURCE_floats_NAME(at: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(SOURCE_vec(at));
}

fn SOURCE_dot_NAME(m: Matrix, n: u32, x: Unit) -> f32 {
    let at = (m.weight >> 2u) + 8u * n;
    var s = dot(SOURCE_floats_NAME(at), vec4(x.x0.x, x.x1.x, x.x2.x, x.x3.x));
    s += dot(SOURCE_floats_NAME(at + 1u), vec4(x.x4.x, x.x5.x, x.x6.x, x.x7.x));
    s += dot(SOURCE_floats_NAME(at + 2u), vec4(x.x0.y, x.x1.y, x.x2.y, x.x3.y));
    s += dot(SOURCE_floats_NAME(at + 3u), vec4(x.x4.y, x.x5.y, x.x6.y, x.x7.y));
    s += dot(SOURCE_floats_NAME(at + 4u), vec4(x.x0.z, x.x1.z, x.x2.z, x.x3.z));
    s += dot(SOURCE_floats_NAME(at + 5u), vec4(x.x4.z, x.x5.z, x.x6.z, x.x7.z));
    s += dot(SOURCE_floats_NAME(at + 6u), vec4(x.x0.w, x.x1.w, x.x2.w, x.x3.w));
    s += dot(SOURCE_floats_NAME(at + 7u), vec4(x.x4.w, x.x5.w, x.x6.w, x.x7.w));
    return s;
}
