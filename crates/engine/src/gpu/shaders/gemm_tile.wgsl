// A tile of a product of 64 rows of weights with TILE vectors, 16 or 64. A unit of 32 columns at a time is
// unpacked into workgroup memory, a row every 9 vectors so that neighbours do not meet in a bank; the unit
// after it is on its way meanwhile. A thread has 4 rows by 4 vectors. Where the vectors are few, 4 threads
// share them: each takes a quarter of a unit's columns, and the sums are joined at the end.

const STRIDE = TILE / 4u;
const PARTS = 64u / TILE;
const FOURS = 8u / PARTS;

var<workgroup> tile: array<vec4<f32>, 576u * MATRICES>;
var<workgroup> inputs: array<vec4<f32>, 9u * TILE>;

// What a thread has: rows row + 16 i, vectors vector + STRIDE j, columns from four `part` * FOURS on.
struct Share {
    row: u32,
    vector: u32,
    part: u32,
}

fn share_of(tid: u32) -> Share {
    return Share(tid & 15u, (tid >> 4u) % STRIDE, (tid >> 4u) / STRIDE);
}

fn put_weights(matrix: u32, eight: Eight, tid: u32) {
    let at = matrix * 576u + (tid >> 2u) * 9u + 2u * (tid & 3u);
    tile[at] = eight.low;
    tile[at + 1u] = eight.high;
}

// Fours of the vectors: thread n brings four n & 7 of vector n / 8, and of the one 32 behind it.
fn put_inputs(first: vec4<f32>, second: vec4<f32>, tid: u32) {
    let at = (tid >> 3u) * 9u + (tid & 7u);
    if tid < 8u * TILE {
        inputs[at] = first;
    }
    if TILE > 32u {
        inputs[at + 288u] = second;
    }
}

// The products of a unit's share: column j is of vector j.
fn products(matrix: u32, share: Share) -> mat4x4<f32> {
    var sums = mat4x4<f32>();
    let w = matrix * 576u + share.row * 9u + share.part * FOURS;
    let x = share.vector * 9u + share.part * FOURS;
    for (var i = 0u; i < FOURS; i++) {
        let w0 = tile[w + i];
        let w1 = tile[w + 144u + i];
        let w2 = tile[w + 288u + i];
        let w3 = tile[w + 432u + i];
        let x0 = inputs[x + i];
        let x1 = inputs[x + 9u * STRIDE + i];
        let x2 = inputs[x + 18u * STRIDE + i];
        let x3 = inputs[x + 27u * STRIDE + i];
        sums += mat4x4(
            vec4(dot(w0, x0), dot(w1, x0), dot(w2, x0), dot(w3, x0)),
            vec4(dot(w0, x1), dot(w1, x1), dot(w2, x1), dot(w3, x1)),
            vec4(dot(w0, x2), dot(w1, x2), dot(w2, x2), dot(w3, x2)),
            vec4(dot(w0, x3), dot(w1, x3), dot(w2, x3), dot(w3, x3)),
        );
    }
    return sums;
}

// The sums of all parts, at the threads of the first.
fn joined(sums: mat4x4<f32>, part: u32, tid: u32) -> mat4x4<f32> {
    var all = sums;
    for (var p = 1u; p < PARTS; p++) {
        workgroupBarrier();
        if part == p {
            for (var j = 0u; j < 4u; j++) {
                tile[j * 64u + (tid & 63u)] = all[j];
            }
        }
        workgroupBarrier();
        if part == 0u {
            for (var j = 0u; j < 4u; j++) {
                all[j] += tile[j * 64u + tid];
            }
        }
    }
    return all;
}
