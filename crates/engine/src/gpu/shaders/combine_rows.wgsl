// The parts of a head of a chunk's tokens, as far as its token sees.

fn parts_of(head: u32) -> Parts {
    return Parts(parts_at(head), parts_in(position() + head / HEADS + 1u));
}
