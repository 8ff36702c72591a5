fn SOURCE_eight_NAME(m: Matrix, n: u32, part: u32) -> Eight {
    let q = SOURCE_vec((m.weight >> 2u) + 4u * n + part);
    let low = SOURCE_low_NAME(q);
    let high = SOURCE_high_NAME(q);
    return Eight(vec4(low.x, high.x, low.y, high.y), vec4(low.z, high.z, low.w, high.w));
}
