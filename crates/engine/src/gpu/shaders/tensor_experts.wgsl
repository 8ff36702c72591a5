// Where a tile of an expert's weights has its rows and its vectors from: `lists` holds the tiles (expert,
// first pair, pairs), tall ones and short ones apart, then the token of each pair.

@group(2) @binding(0) var<storage, read> lists: array<u32>;

struct Aim {
    record: u32,
    first: u32,
    rows: u32,
    pair: u32,
    vectors: u32,
}

fn aimed(group: vec3<u32>) -> Aim {
    let listed = TILES_AT + 4u * group.y;
    let record = find(lists[listed]);
    return Aim(record, group.x * 64u, OUT_ROWS, lists[listed + 1u], lists[listed + 2u]);
}

fn vector_row(aim: Aim, v: u32) -> u32 {
    return input_row(aim.pair + min(v, aim.vectors - 1u));
}

fn joined_0(before: f32, now: f32) -> f32 {
    return now;
}

fn joined_1(gate: f32, up: f32) -> f32 {
    return silu(gate) * up;
}

fn give_one(aim: Aim, r: u32, v: u32, value: f32) {
    scratch[GIVEN_AT + (aim.pair + v) * OUT_ROWS + aim.first + r] = value;
}
