// A part of what a chunk's rows see, which `combine` joins with the others. What a part gives to a row that
// ends before it is never read.

fn part_of(number: u32, end: u32) -> Positions {
    let first = number * part_positions();
    return Positions(first, min(first + part_positions(), end));
}

// The mix as it was summed up, then the largest score and the total: `sums`.
fn give(row: Row, part: u32, column: u32, mix: vec4<f32>, sums: vec2<f32>) {
    let at = parts_at(row.head) + part * (HEAD_DIM + 2u);
    for (var i = 0u; i < 4u; i++) {
        if column + i < HEAD_DIM {
            scratch[at + column + i] = mix[i];
        }
    }
    if column == 0u {
        scratch[at + HEAD_DIM] = sums.x;
        scratch[at + HEAD_DIM + 1u] = sums.y;
    }
}
