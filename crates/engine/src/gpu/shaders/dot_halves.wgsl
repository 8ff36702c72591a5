fn SOURCE_dot_NAME(m: Matrix, n: u32, x: Unit) -> f32 {
    let at = (m.weight >> 2u) + 4u * n;
    let a = SOURCE_vec(at);
    let b = SOURCE_vec(at + 1u);
    let c = SOURCE_vec(at + 2u);
    let d = SOURCE_vec(at + 3u);
    let q0 = vec4(a.x, b.x, c.x, d.x);
    let q1 = vec4(a.y, b.y, c.y, d.y);
    let q2 = vec4(a.z, b.z, c.z, d.z);
    let q3 = vec4(a.w, b.w, c.w, d.w);
    var s = dot(SOURCE_low_NAME(q0), x.x0) + dot(SOURCE_high_NAME(q0), x.x1);
    s += dot(SOURCE_low_NAME(q1), x.x2) + dot(SOURCE_high_NAME(q1), x.x3);
    s += dot(SOURCE_low_NAME(q2), x.x4) + dot(SOURCE_high_NAME(q2), x.x5);
    s += dot(SOURCE_low_NAME(q3), x.x6) + dot(SOURCE_high_NAME(q3), x.x7);
    return s;
}
