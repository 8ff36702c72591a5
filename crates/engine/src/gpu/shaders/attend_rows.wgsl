// Attention of a chunk: a workgroup takes 64 rows, a row being one query head of one token, all of one
// key/value head and token after token. Keys and values come 32 positions by 32 columns at a time and
// serve all rows; the softmax is carried along. A thread has two rows, 32 apart: of each it forms the
// scores of four positions and, of every slice of 32 columns, the mix of four. `part_of` says which
// positions a workgroup takes, `give` what becomes of their mix.

@group(1) @binding(0) var<storage, read> cache: array<vec4<u32>>;

const SHARE = HEADS / KV_HEADS;
// Of a row in workgroup memory, in fours: one more than it has, so that neighbours do not meet in a bank.
const ROW = 9u;

var<workgroup> rows: array<vec4<f32>, 64u * ROW>; // queries, then scores and weights
var<workgroup> page: array<vec4<f32>, 32u * ROW>; // keys or values

struct Row {
    head: u32, // of all tokens' query heads
    query: u32, // where in the scratch
    seen: u32, // positions
}

fn row_of(kv_head: u32, row: u32) -> Row {
    let token = row / SHARE;
    let head = token * HEADS + kv_head * SHARE + row % SHARE;
    return Row(head, QUERY_AT + head * QUERY_STRIDE, position() + token + 1u);
}

struct Positions {
    first: u32,
    end: u32,
}

// Four columns of a key (part 0) or a value (1), zeros beyond the head's width and the context.
fn kept_at(kv_head: u32, part: u32, p: u32, end: u32, column: u32) -> vec4<f32> {
    if p >= end || column >= HEAD_DIM {
        return vec4(0.0);
    }
    let at = (((p >> 6u) * 2u + part) * KV_HEADS + kv_head) * 64u + (p & 63u);
    return kept(at * HEAD_DIM + column);
}

fn query_at(first: u32, column: u32) -> vec4<f32> {
    if column >= HEAD_DIM {
        return vec4(0.0);
    }
    let at = first + column;
    return vec4(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u])
        / sqrt(f32(HEAD_DIM));
}

fn largest(row: u32) -> f32 {
    var most = rows[row * ROW];
    for (var i = 1u; i < 8u; i++) {
        most = max(most, rows[row * ROW + i]);
    }
    return max(max(most.x, most.y), max(most.z, most.w));
}

// The mix of a slice: two rows' weights times the values.
fn mixed(low: vec4<f32>, high: vec4<f32>, a: u32, b: u32) -> array<vec4<f32>, 2> {
    var sums = array<vec4<f32>, 2>(low, high);
    for (var i = 0u; i < 8u; i++) {
        let w = rows[a * ROW + i];
        let x = rows[(a + 32u) * ROW + i];
        for (var j = 0u; j < 4u; j++) {
            let v = page[(4u * i + j) * ROW + b];
            sums[0] += w[j] * v;
            sums[1] += x[j] * v;
        }
    }
    return sums;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let kv_head = group.x;
    let count = bitcast<u32>(scratch[TOKEN_AT + 1u]) * SHARE;
    let first = group.y * 64u;
    let part = part_of(group.z, row_of(kv_head, min(first + 63u, count - 1u)).seen);
    let end = part.end;
    let a = tid >> 3u;
    let b = tid & 7u;
    let low = row_of(kv_head, min(first + a, count - 1u));
    let high = row_of(kv_head, min(first + a + 32u, count - 1u));
    var most = vec2(-1e30);
    var total = vec2(0.0);
    //SLICE var low$s = vec4(0.0);
    //SLICE var high$s = vec4(0.0);
    for (var start = part.first; start < end; start += 32u) {
        var scores = array<vec4<f32>, 2>(vec4(0.0), vec4(0.0));
        for (var column = 0u; column < HEAD_DIM; column += 32u) {
            let mine = column + 4u * b;
            workgroupBarrier();
            rows[a * ROW + b] = query_at(low.query, mine);
            rows[(a + 32u) * ROW + b] = query_at(high.query, mine);
            // Keys of positions 4 b .. 4 b + 3 lie 8 rows apart, so that no two threads meet in a bank.
            page[((a & 3u) * 8u + (a >> 2u)) * ROW + b] = kept_at(kv_head, 0u, start + a, end, mine);
            workgroupBarrier();
            for (var i = 0u; i < 8u; i++) {
                let q = rows[a * ROW + i];
                let r = rows[(a + 32u) * ROW + i];
                let k0 = page[b * ROW + i];
                let k1 = page[(b + 8u) * ROW + i];
                let k2 = page[(b + 16u) * ROW + i];
                let k3 = page[(b + 24u) * ROW + i];
                scores[0] += vec4(dot(q, k0), dot(q, k1), dot(q, k2), dot(q, k3));
                scores[1] += vec4(dot(r, k0), dot(r, k1), dot(r, k2), dot(r, k3));
            }
        }
        let p = vec4(start + 4u * b) + vec4(0u, 1u, 2u, 3u);
        scores[0] = select(vec4(-1e30), scores[0], p < vec4(low.seen));
        scores[1] = select(vec4(-1e30), scores[1], p < vec4(high.seen));
        workgroupBarrier();
        rows[a * ROW + b] = scores[0];
        rows[(a + 32u) * ROW + b] = scores[1];
        workgroupBarrier();
        let now = max(most, vec2(largest(a), largest(a + 32u)));
        let fade = exp(most - now);
        most = now;
        let weights = array<vec4<f32>, 2>(exp(scores[0] - now.x), exp(scores[1] - now.y));
        total = total * fade + vec2(dot(weights[0], vec4(1.0)), dot(weights[1], vec4(1.0)));
        workgroupBarrier();
        rows[a * ROW + b] = weights[0];
        rows[(a + 32u) * ROW + b] = weights[1];
        //SLICE page[a * ROW + b] = kept_at(kv_head, 1u, start + a, end, 32u * $su + 4u * b);
        //SLICE workgroupBarrier();
        //SLICE let mix$s = mixed(low$s * fade.x, high$s * fade.y, a, b);
        //SLICE low$s = mix$s[0];
        //SLICE high$s = mix$s[1];
        //SLICE workgroupBarrier();
    }
    // Of each row 8 threads have a part of the sum.
    workgroupBarrier();
    rows[a * ROW + b] = vec4(total, 0.0, 0.0);
    workgroupBarrier();
    var sums = vec2(0.0);
    for (var i = 0u; i < 8u; i++) {
        sums += rows[a * ROW + i].xy;
    }
    if first + a < count {
        //SLICE give(low, group.z, 32u * $su + 4u * b, low$s, vec2(most.x, sums.x));
    }
    if first + a + 32u < count {
        //SLICE give(high, group.z, 32u * $su + 4u * b, high$s, vec2(most.y, sums.y));
    }
}
