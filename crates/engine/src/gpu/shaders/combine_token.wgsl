// The parts of a token's head.

fn parts_of(head: u32) -> Parts {
    let pages_each = bitcast<u32>(scratch[TOKEN_AT + 1u]);
    let pages = (position() + 64u) >> 6u;
    let count = (pages + pages_each - 1u) / pages_each;
    return Parts(PARTS_AT + head * SPLITS_MAX * (HEAD_DIM + 2u), count);
}
