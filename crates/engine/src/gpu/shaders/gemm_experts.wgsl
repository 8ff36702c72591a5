// Experts times their tokens: `lists` holds the tiles (expert, first pair, pairs), then the token of each
// pair. A workgroup takes 64 rows by 32 pairs, a thread 4 by 2.

struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

@group(2) @binding(0) var<storage, read> lists: array<u32>;

var<workgroup> inputs: array<vec4<f32>, 288>;
//TILES

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let expert = lists[4u * group.y];
    let first_pair = lists[4u * group.y + 1u];
    let pairs = lists[4u * group.y + 2u];
    let record = find(expert);
    let first = group.x * 64u;
    let row = min(first + (tid >> 2u), OUT_ROWS - 1u);
    let part = tid & 3u;
    let put = (tid >> 2u) * 9u + part * 2u;
    let across = (tid & 15u) * 9u;
    let down = (tid >> 4u) * 9u;
    let source = min(tid >> 3u, pairs - 1u);
    let vector_at = input_row(first_pair + source);
    let quarter = tid & 7u;
    //MATRICES
    for (var unit = 0u; unit < (COLS >> 5u); unit++) {
        let n = row * (COLS >> 5u) + unit;
        //UNPACK
        let e = vector_at + unit * 32u + quarter * 4u;
        inputs[(tid >> 3u) * 9u + quarter] =
            vec4(scratch[e], scratch[e + 1u], scratch[e + 2u], scratch[e + 3u]);
        workgroupBarrier();
        for (var k = 0u; k < 8u; k++) {
            let x0 = inputs[down + k];
            let x1 = inputs[down + 144u + k];
            //PRODUCTS
        }
        workgroupBarrier();
    }
    //OUTPUTS
    for (var j = 0u; j < 2u; j++) {
        let pair = (tid >> 4u) + 16u * j;
        let out = select(out0, out1, vec4(j == 1u));
        if pair < pairs {
            for (var i = 0u; i < 4u; i++) {
                let r = first + (tid & 15u) + 16u * i;
                if r < OUT_ROWS {
                    scratch[GIVEN_AT + (first_pair + pair) * OUT_ROWS + r] = out[i];
                }
            }
        }
    }
}
