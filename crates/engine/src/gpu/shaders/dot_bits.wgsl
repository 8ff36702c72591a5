fn SOURCE_fields_NAME(at: u32, j: u32) -> vec4<f32> {
    return vec4(
        SOURCE_field_NAME(at, j),
        SOURCE_field_NAME(at, j + 8u),
        SOURCE_field_NAME(at, j + 16u),
        SOURCE_field_NAME(at, j + 24u),
    );
}

fn SOURCE_dot_NAME(m: Matrix, n: u32, x: Unit) -> f32 {
    let at = m.weight + BITSu * n;
    var s = dot(SOURCE_fields_NAME(at, 0u), x.x0) + dot(SOURCE_fields_NAME(at, 1u), x.x1);
    s += dot(SOURCE_fields_NAME(at, 2u), x.x2) + dot(SOURCE_fields_NAME(at, 3u), x.x3);
    s += dot(SOURCE_fields_NAME(at, 4u), x.x4) + dot(SOURCE_fields_NAME(at, 5u), x.x5);
    s += dot(SOURCE_fields_NAME(at, 6u), x.x6) + dot(SOURCE_fields_NAME(at, 7u), x.x7);
    let g = n * 32u / GROUPu;
    return SOURCE_scale_SCALES(m.scales + g) * s + SOURCE_scale_SCALES(m.biases + g) * x.sum;
}
