fn SOURCE_four_NAME(at: u32, i: u32) -> vec4<f32> {
    return vec4(
        SOURCE_field8_NAME(at, i),
        SOURCE_field8_NAME(at, i + 1u),
        SOURCE_field8_NAME(at, i + 2u),
        SOURCE_field8_NAME(at, i + 3u),
    );
}

fn SOURCE_eight_NAME(m: Matrix, n: u32, part: u32) -> Eight {
    let at = m.weight + BITSu * n;
    let g = n * 32u / GROUPu;
    let scale = SOURCE_scale_SCALES(m.scales + g);
    let bias = SOURCE_scale_SCALES(m.biases + g);
    let low = SOURCE_four_NAME(at, part * 8u);
    return Eight(scale * low + bias, scale * SOURCE_four_NAME(at, part * 8u + 4u) + bias);
}
