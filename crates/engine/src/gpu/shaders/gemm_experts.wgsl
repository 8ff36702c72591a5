// Experts times their tokens: `lists` holds the tiles (expert, first pair, pairs), tall ones and short ones
// apart, then the token of each pair. A workgroup takes a tile of 64 rows of one or two matrices.

@group(2) @binding(0) var<storage, read> lists: array<u32>;

fn four(at: u32) -> vec4<f32> {
    return vec4(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let listed = TILES_AT + 4u * group.y;
    let first_pair = lists[listed + 1u];
    let pairs = lists[listed + 2u];
    let record = find(lists[listed]);
    let first = group.x * 64u;
    let units = COLS >> 5u;
    let n = min(first + (tid >> 2u), OUT_ROWS - 1u) * units;
    let vector = input_row(first_pair + min(tid >> 3u, pairs - 1u));
    let other = input_row(first_pair + min((tid >> 3u) + 32u, pairs - 1u));
    let vector_at = ROWS_AT + vector * COLS + 4u * (tid & 7u);
    let other_at = ROWS_AT + other * COLS + 4u * (tid & 7u);
    let share = share_of(tid);
    var mine = four(vector_at);
    var second = vec4(0.0);
    if TILE > 32u {
        second = four(other_at);
    }
    //MATRIX let m$m = within(record, PLACE_$m);
    //MATRIX var unpacked$m = eight_$m(m$m, n, tid & 3u);
    //MATRIX var sums$m = mat4x4<f32>();
    for (var unit = 1u; unit <= units; unit++) {
        //MATRIX put_weights($mu, unpacked$m, tid);
        put_inputs(mine, second, tid);
        workgroupBarrier();
        if unit < units {
            //MATRIX unpacked$m = eight_$m(m$m, n + unit, tid & 3u);
            mine = four(vector_at + 32u * unit);
            if TILE > 32u {
                second = four(other_at + 32u * unit);
            }
        }
        //MATRIX sums$m += products($mu, share);
        workgroupBarrier();
    }
    //MATRIX sums$m = joined(sums$m, share.part, tid);
    for (var j = 0u; j < 4u; j++) {
        let pair = share.vector + STRIDE * j;
        let out = OUTPUT;
        for (var i = 0u; i < 4u; i++) {
            let r = first + share.row + 16u * i;
            if share.part == 0u && pair < pairs && r < OUT_ROWS {
                scratch[GIVEN_AT + (first_pair + pair) * OUT_ROWS + r] = out[i];
            }
        }
    }
}
