// Matrices times many vectors, a tile a workgroup.

fn four(token: u32, e: u32) -> vec4<f32> {
    return vec4(input(token, e), input(token, e + 1u), input(token, e + 2u), input(token, e + 3u));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let piece = piece_of(group.x);
    let count = bitcast<u32>(scratch[TOKEN_AT + 1u]);
    let units = COLS >> 5u;
    let n = min(piece.first + (tid >> 2u), piece.rows - 1u) * units;
    let token = min(group.y * TILE + (tid >> 3u), count - 1u);
    let other = min(group.y * TILE + (tid >> 3u) + 32u, count - 1u);
    let share = share_of(tid);
    var sums = mat4x4<f32>();
    var eight = unpacked(piece.code, piece.m, n, tid & 3u);
    var mine = four(token, 4u * (tid & 7u));
    var second = vec4(0.0);
    if TILE > 32u {
        second = four(other, 4u * (tid & 7u));
    }
    for (var unit = 1u; unit <= units; unit++) {
        put_weights(0u, eight, tid);
        put_inputs(mine, second, tid);
        workgroupBarrier();
        if unit < units {
            let e = unit * 32u + 4u * (tid & 7u);
            eight = unpacked(piece.code, piece.m, n + unit, tid & 3u);
            mine = four(token, e);
            if TILE > 32u {
                second = four(other, e);
            }
        }
        sums += products(0u, share);
        workgroupBarrier();
    }
    sums = joined(sums, share.part, tid);
    for (var j = 0u; j < 4u; j++) {
        let t = group.y * TILE + share.vector + STRIDE * j;
        for (var i = 0u; i < 4u; i++) {
            if share.part == 0u && t < count && piece.first + share.row + 16u * i < piece.rows {
                give(piece.to + t * piece.stride + share.row + 16u * i, sums[j][i]);
            }
        }
    }
}
