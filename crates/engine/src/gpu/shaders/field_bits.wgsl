fn SOURCE_KIND_NAME(at: u32, i: u32) -> f32 {
    let bit = i * BITSu;
    let shift = bit & 31u;
    var value = SOURCE_word(at + (bit >> 5u)) >> shift;
    if shift + BITSu > 32u {
        value |= SOURCE_word(at + (bit >> 5u) + 1u) << (32u - shift);
    }
    return f32(value & ((1u << BITSu) - 1u));
}

