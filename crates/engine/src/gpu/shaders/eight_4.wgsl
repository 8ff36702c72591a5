fn SOURCE_eight_NAME(m: Matrix, n: u32, part: u32) -> Eight {
    let q = SOURCE_word(m.weight + 4u * n + part);
    let mask = vec4(15u);
    let g = n * 32u / GROUPu;
    let scale = SOURCE_scale_SCALES(m.scales + g);
    let bias = SOURCE_scale_SCALES(m.biases + g);
    let low = vec4<f32>((vec4(q) >> vec4(0u, 4u, 8u, 12u)) & mask);
    let high = vec4<f32>((vec4(q) >> vec4(16u, 20u, 24u, 28u)) & mask);
    return Eight(scale * low + bias, scale * high + bias);
}
