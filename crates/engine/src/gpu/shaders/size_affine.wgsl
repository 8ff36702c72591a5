fn SOURCE_size_NAME(m: Matrix, n: u32, half: u32) -> u32 {
    let first = n * 32u / GROUPu;
    var size = 0u;
    for (var g = first + half; g < first + COLS / GROUPu; g += 2u) {
        let most = f32((1u << BITSu) - 1u) * abs(SOURCE_scale_SCALES(m.scales + g));
        size = max(size, size_of(most + abs(SOURCE_scale_SCALES(m.biases + g))));
    }
    return size;
}
