// Norm and rotation of each query head in place and of each key head into the cache; its value too. A
// page holds 64 positions: the keys of each head in turn, then the values.

@group(1) @binding(0) var<storage, read> vectors: array<f32>;
@group(2) @binding(0) var<storage, read_write> cache: array<u32>;

var<workgroup> turned: array<f32, HEAD_DIM>;
var<workgroup> parts: array<f32, 64>;

fn rotated(token: u32, e: u32) -> f32 {
    let half = ROTARY / 2u;
    if e >= ROTARY {
        return turned[e];
    }
    let j = select(e, e - half, e >= half);
    let cosine = scratch[COS_AT + token * half + j];
    let sine = scratch[SIN_AT + token * half + j];
    if e < half {
        return turned[e] * cosine - turned[e + half] * sine;
    }
    return turned[e - half] * sine + turned[e] * cosine;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let is_key = group.x >= HEADS;
    let head = select(group.x, group.x - HEADS, is_key);
    let token = group.y;
    let start = select(
        QUERY_AT + (token * HEADS + head) * QUERY_STRIDE,
        KEY_AT + (token * KV_HEADS + head) * HEAD_DIM,
        is_key,
    );
    var sum = 0.0;
    for (var e = tid; e < HEAD_DIM; e += 64u) {
        let x = scratch[start + e];
        sum += x * x;
    }
    parts[tid] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if tid < half {
            parts[tid] += parts[tid + half];
        }
        workgroupBarrier();
    }
    let scale = 1.0 / sqrt(parts[0] / f32(HEAD_DIM) + EPS);
    let weights = select(0u, HEAD_DIM, is_key);
    for (var e = tid; e < HEAD_DIM; e += 64u) {
        turned[e] = scratch[start + e] * scale * vectors[weights + e];
    }
    workgroupBarrier();
    let p = position() + token;
    let page = (p >> 6u) * 2u * KV_HEADS * 64u * HEAD_DIM;
    let row = page + (head * 64u + (p & 63u)) * HEAD_DIM;
    for (var e = 2u * tid; e < HEAD_DIM; e += 128u) {
        let pair = vec2(rotated(token, e), rotated(token, e + 1u));
        if is_key {
            keep(row + e, pair);
            let value = VALUE_AT + (token * KV_HEADS + head) * HEAD_DIM + e;
            keep(row + KV_HEADS * 64u * HEAD_DIM + e, vec2(scratch[value], scratch[value + 1u]));
        } else {
            scratch[start + e] = pair.x;
            scratch[start + e + 1u] = pair.y;
        }
    }
}
