// Convolution, silu and the norm of queries and keys for every token of a chunk; a workgroup takes one
// head of one token: queries, keys, then values.

@group(1) @binding(0) var<storage, read> vectors: array<f32>;
@group(2) @binding(0) var<storage, read> memory: array<f32>;

var<workgroup> parts: array<f32, 128>;

// The raw projection `back` tokens before token t of the chunk.
fn raw(channel: u32, t: u32, back: u32) -> f32 {
    if back <= t {
        return scratch[RAW_AT + (t - back) * CHANNELS + channel];
    }
    return memory[HISTORY_AT + ((position() + t - back) & 3u) * CHANNELS + channel];
}

fn convolved(channel: u32, t: u32) -> f32 {
    return silu(vectors[channel] * raw(channel, t, 3u)
        + vectors[CHANNELS + channel] * raw(channel, t, 2u)
        + vectors[2u * CHANNELS + channel] * raw(channel, t, 1u)
        + vectors[3u * CHANNELS + channel] * raw(channel, t, 0u));
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let t = group.y;
    let is_value = group.x >= 2u * KEY_HEADS;
    let width = select(KEY_DIM, VALUE_DIM, is_value);
    let first = select(
        group.x * KEY_DIM,
        2u * KEY_HEADS * KEY_DIM + (group.x - 2u * KEY_HEADS) * VALUE_DIM,
        is_value,
    );
    var sum = 0.0;
    for (var e = tid; e < width; e += 128u) {
        let x = convolved(first + e, t);
        scratch[CONVOLVED_AT + t * CHANNELS + first + e] = x;
        sum += x * x;
    }
    parts[tid] = sum;
    workgroupBarrier();
    for (var half = 64u; half > 0u; half >>= 1u) {
        if tid < half {
            parts[tid] += parts[tid + half];
        }
        workgroupBarrier();
    }
    if !is_value {
        var scale = 1.0 / sqrt(parts[0] + 1e-6);
        if group.x < KEY_HEADS {
            scale /= sqrt(f32(KEY_DIM));
        }
        for (var e = tid; e < width; e += 128u) {
            scratch[CONVOLVED_AT + t * CHANNELS + first + e] *= scale;
        }
    }
}
