fn kept(at: u32) -> vec4<f32> {
    let pair = (at >> 1u) & 2u;
    let words = cache[at >> 3u];
    let low = select(words.x, words.z, pair == 2u);
    let high = select(words.y, words.w, pair == 2u);
    return vec4(unpack2x16float(low), unpack2x16float(high));
}
