// Matrices times many vectors, a tile a workgroup.

fn unpacked(code: u32, m: Matrix, n: u32, part: u32) -> Eight {
    var eight: Eight;
    switch code {
        //FORMATS
        default: {}
    }
    return eight;
}

fn four(token: u32, e: u32) -> vec4<f32> {
    return vec4(input(token, e), input(token, e + 1u), input(token, e + 2u), input(token, e + 3u));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let segments = dense[0].x;
    var segment = 0u;
    var first = group.x;
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
    let rows = head.y;
    let m = Matrix(place.x, place.y, place.z);
    let count = bitcast<u32>(scratch[TOKEN_AT + 1u]);
    let units = COLS >> 5u;
    let n = min(first + (tid >> 2u), rows - 1u) * units;
    let token = min(group.y * TILE + (tid >> 3u), count - 1u);
    let other = min(group.y * TILE + (tid >> 3u) + 32u, count - 1u);
    let share = share_of(tid);
    var sums = mat4x4<f32>();
    var eight = unpacked(head.z, m, n, tid & 3u);
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
            eight = unpacked(head.z, m, n + unit, tid & 3u);
            mine = four(token, e);
            if TILE > 32u {
                second = four(other, e);
            }
        }
        sums += products(0u, share);
        workgroupBarrier();
    }
    sums = joined(sums, share.part, tid);
    let to = dense[3u + 3u * segment].y;
    let behind = dense[3u + 3u * segment].x + first + share.row;
    for (var j = 0u; j < 4u; j++) {
        let t = group.y * TILE + share.vector + STRIDE * j;
        for (var i = 0u; i < 4u; i++) {
            if share.part == 0u && t < count && first + share.row + 16u * i < rows {
                give(to + t * head.w + behind + 16u * i, sums[j][i]);
            }
        }
    }
}
