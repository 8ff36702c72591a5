// All that a chunk's rows see, in one workgroup: the mix is whole.

fn part_of(number: u32, end: u32) -> Positions {
    return Positions(0u, end);
}

fn give(row: Row, part: u32, column: u32, mix: vec4<f32>, sums: vec2<f32>) {
    for (var i = 0u; i < 4u; i++) {
        let e = column + i;
        if e < HEAD_DIM {
            var out = mix[i] / sums.y;
            if GATED {
                out *= sigmoid(scratch[row.query + HEAD_DIM + e]);
            }
            scratch[MIXED_AT + row.head * HEAD_DIM + e] = out;
        }
    }
}
