// What a chunk's tokens are to each other under the delta rule, for one value head: a workgroup takes
// DELTA_TOKENS of them. With D[i][j] the product of the fades after token j up to i, and L[i][j] = beta[i]
// D[i][j] (k[i] . k[j]) below the diagonal, it leaves (1 + L)^-1 beta, D (q . k) down from the diagonal,
// and the fades from the start to each token and from each to the end. Nothing here depends on the state,
// so all parts of a chunk are taken at once. Tokens beyond the last change nothing: no key, no fade.

@group(1) @binding(0) var<storage, read> vectors: array<f32>;

const SIDE = DELTA_TOKENS;
// A row of a square is one longer, so that neighbours do not meet in a bank; so is one of 16 columns of
// keys or queries.
const ROW = SIDE + 1u;

var<workgroup> keys: array<vec4<f32>, SIDE * 5u>;
var<workgroup> queries: array<vec4<f32>, SIDE * 5u>;
var<workgroup> fades: array<f32, SIDE>;
var<workgroup> betas: array<f32, SIDE>;
var<workgroup> between: array<f32, SIDE * ROW>; // D, then (1 + L)^-1
var<workgroup> lower: array<f32, SIDE * ROW>;   // L

fn softplus(x: f32) -> f32 {
    return max(x, 0.0) + log(1.0 + exp(-abs(x)));
}

fn gates(token: u32, is_token: bool, head: u32, tid: u32) {
    var fade = 1.0;
    var beta = 0.0;
    if is_token {
        let at = token * VALUE_HEADS + head;
        let rate = vectors[4u * CHANNELS + head];
        fade = exp(-rate * softplus(scratch[A_AT + at] + vectors[4u * CHANNELS + VALUE_HEADS + head]));
        beta = sigmoid(scratch[B_AT + at]);
    }
    fades[tid] = fade;
    betas[tid] = beta;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let head = group.x;
    let first = group.y * SIDE;
    let here = min(SIDE, bitcast<u32>(scratch[TOKEN_AT + 1u]) - first);
    let pairs = PAIRS_AT + (group.y * VALUE_HEADS + head) * PAIRS_WORDS;
    if tid < SIDE {
        gates(first + tid, tid < here, head, tid);
    }
    workgroupBarrier();
    if tid < SIDE {
        var product = 1.0;
        for (var i = 0u; i < SIDE; i++) {
            product *= select(1.0, fades[i], i > tid);
            between[i * ROW + tid] = select(0.0, product, i >= tid);
        }
        scratch[pairs + 2u * SIDE * SIDE + SIDE + tid] = product;
    }
    // Products of token i's key and query with the keys of tokens j, j + 8, j + 16 and j + 24.
    let i = tid >> 3u;
    let j = tid & 7u;
    var of_keys = vec4(0.0);
    var of_queries = vec4(0.0);
    let key_head = head / (VALUE_HEADS / KEY_HEADS);
    let is_key = j >= 4u;
    let row = CONVOLVED_AT + (first + min(i, here - 1u)) * CHANNELS
        + (key_head + select(0u, KEY_HEADS, is_key)) * KEY_DIM;
    for (var start = 0u; start < KEY_DIM; start += 16u) {
        let e = start + 4u * (j & 3u);
        var four = vec4(0.0);
        if i < here && e < KEY_DIM {
            let at = row + e;
            four = vec4(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]);
        }
        workgroupBarrier();
        if is_key {
            keys[i * 5u + j - 4u] = four;
        } else {
            queries[i * 5u + j] = four;
        }
        workgroupBarrier();
        for (var p = 0u; p < 4u; p++) {
            let k = keys[i * 5u + p];
            let q = queries[i * 5u + p];
            let k0 = keys[j * 5u + p];
            let k1 = keys[j * 5u + 40u + p];
            let k2 = keys[j * 5u + 80u + p];
            let k3 = keys[j * 5u + 120u + p];
            of_keys += vec4(dot(k, k0), dot(k, k1), dot(k, k2), dot(k, k3));
            of_queries += vec4(dot(q, k0), dot(q, k1), dot(q, k2), dot(q, k3));
        }
    }
    for (var n = 0u; n < 4u; n++) {
        let other = j + 8u * n;
        let d = between[i * ROW + other];
        lower[i * ROW + other] = betas[i] * d * of_keys[n];
        scratch[pairs + SIDE * SIDE + i * SIDE + other] = d * of_queries[n];
    }
    if tid < SIDE {
        scratch[pairs + 2u * SIDE * SIDE + tid] = fades[0] * between[tid * ROW];
    }
    workgroupBarrier();
    // A thread for each column, from the top.
    if tid < SIDE {
        for (var r = 0u; r < SIDE; r++) {
            var x = select(0.0, 1.0, r == tid);
            for (var c = tid; c < r; c++) {
                x -= lower[r * ROW + c] * between[c * ROW + tid];
            }
            between[r * ROW + tid] = x;
            scratch[pairs + r * SIDE + tid] = x * betas[tid];
        }
    }
}
