// Which matrix of the dense weights a tile of 64 rows is of.

struct Piece {
    m: Matrix,
    code: u32,
    first: u32, // row of the tile's
    rows: u32,
    to: u32, // where the tile's outputs for the first token begin
    stride: u32, // from token to token
}

fn piece_of(tile: u32) -> Piece {
    let segments = dense[0].x;
    var segment = 0u;
    var first = tile;
    for (var i = 0u; i + 1u < segments; i++) {
        let tiles = (dense[1u + 3u * i].y + 63u) / 64u;
        if segment == i && first >= tiles {
            first -= tiles;
            segment = i + 1u;
        }
    }
    first *= 64u;
    let head = dense[1u + 3u * segment];
    let place = dense[2u + 3u * segment];
    let to = dense[3u + 3u * segment];
    let m = Matrix(place.x, place.y, place.z);
    return Piece(m, head.z, first, head.y, to.y + to.x + first, head.w);
}

fn unpacked(code: u32, m: Matrix, n: u32, part: u32) -> Eight {
    var eight: Eight;
    switch code {
        //FORMATS
        default: {}
    }
    return eight;
}
