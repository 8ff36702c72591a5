fn SOURCE_eight_NAME(m: Matrix, n: u32, part: u32) -> Eight {
    let at = (m.weight >> 2u) + 8u * n + 2u * part;
    return Eight(bitcast<vec4<f32>>(SOURCE_vec(at)), bitcast<vec4<f32>>(SOURCE_vec(at + 1u)));
}
