struct SOURCE_Packed_NAME {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
}

fn SOURCE_load_NAME(m: Matrix, n: u32) -> SOURCE_Packed_NAME {
    let at = (m.weight >> 2u) + 4u * n;
    return SOURCE_Packed_NAME(
        SOURCE_vec(at), SOURCE_vec(at + 1u), SOURCE_vec(at + 2u), SOURCE_vec(at + 3u),
    );
}

fn SOURCE_dot_NAME(p: SOURCE_Packed_NAME, x: Unit) -> f32 {
    let q0 = vec4(p.a.x, p.b.x, p.c.x, p.d.x);
    let q1 = vec4(p.a.y, p.b.y, p.c.y, p.d.y);
    let q2 = vec4(p.a.z, p.b.z, p.c.z, p.d.z);
    let q3 = vec4(p.a.w, p.b.w, p.c.w, p.d.w);
    var s = dot(SOURCE_low_NAME(q0), x.x0) + dot(SOURCE_high_NAME(q0), x.x1);
    s += dot(SOURCE_low_NAME(q1), x.x2) + dot(SOURCE_high_NAME(q1), x.x3);
    s += dot(SOURCE_low_NAME(q2), x.x4) + dot(SOURCE_high_NAME(q2), x.x5);
    s += dot(SOURCE_low_NAME(q3), x.x6) + dot(SOURCE_high_NAME(q3), x.x7);
    return s;
}
