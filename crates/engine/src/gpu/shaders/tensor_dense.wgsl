// Where a tile of dense weights has its rows and its vectors from.

struct Aim {
    piece: Piece,
    first: u32,
    rows: u32,
    vector: u32,
    vectors: u32,
}

fn aimed(group: vec3<u32>) -> Aim {
    let piece = piece_of(group.x);
    let vector = group.y * TILE;
    return Aim(piece, piece.first, piece.rows, vector, bitcast<u32>(scratch[TOKEN_AT + 1u]) - vector);
}

fn weights_0(aim: Aim, n: u32, part: u32) -> Eight {
    return unpacked(aim.piece.code, aim.piece.m, n, part);
}

fn size_0(aim: Aim, n: u32, half: u32) -> u32 {
    let m = aim.piece.m;
    var size = 0u;
    switch aim.piece.code {
        //FORMATS
        default: {}
    }
    return size;
}

fn vector_row(aim: Aim, v: u32) -> u32 {
    return aim.vector + min(v, aim.vectors - 1u);
}

fn joined_0(before: f32, now: f32) -> f32 {
    return now;
}

fn give_one(aim: Aim, r: u32, v: u32, value: f32) {
    give(aim.piece.to + (aim.vector + v) * aim.piece.stride + r, value);
}
