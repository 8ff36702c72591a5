// The parts in which a chunk's rows see the context: all are equally long but the last one.

fn part_positions() -> u32 {
    return bitcast<u32>(scratch[TOKEN_AT + 4u]);
}

fn parts_in(positions: u32) -> u32 {
    return (positions + part_positions() - 1u) / part_positions();
}

// Where a head's parts begin: as many for each as the chunk's last token has.
fn parts_at(head: u32) -> u32 {
    let parts = parts_in(position() + bitcast<u32>(scratch[TOKEN_AT + 1u]));
    return PARTS_AT + head * parts * (HEAD_DIM + 2u);
}
