fn SOURCE_size_NAME(m: Matrix, n: u32, half: u32) -> u32 {
    var size = 0u;
    for (var i = half; i < COLS / 8u; i += 2u) {
        let eight = SOURCE_eight_NAME(m, n + (i >> 2u), i & 3u);
        size = max(size, max(size_of_four(eight.low), size_of_four(eight.high)));
    }
    return size;
}
