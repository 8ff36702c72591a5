// One token of the gated delta rule: convolution, norm of query and key, the recurrence. A workgroup
// takes 32 columns of one head's state; a thread keeps its rows of one column in registers, so that the
// state is read and written once. `memory` holds the states, then the convolution's history as a ring of
// the last 4 columns: a token reads 3 of them and writes the fourth, which nobody reads meanwhile.

@group(1) @binding(0) var<storage, read> vectors: array<f32>;
@group(2) @binding(0) var<storage, read_write> memory: array<f32>;

const ROWS_EACH = KEY_DIM / 8u;

var<workgroup> query: array<f32, KEY_DIM>;
var<workgroup> key: array<f32, KEY_DIM>;
var<workgroup> value: array<f32, 32>;
var<workgroup> onto: array<vec2<f32>, 256>;
var<workgroup> products: array<vec3<f32>, 8>;

fn convolved(channel: u32, p: u32, keep: bool) -> f32 {
    let now = scratch[RAW_AT + channel];
    let ring = HISTORY_AT + channel;
    let sum = vectors[channel] * memory[ring + ((p + 1u) & 3u) * CHANNELS]
        + vectors[CHANNELS + channel] * memory[ring + ((p + 2u) & 3u) * CHANNELS]
        + vectors[2u * CHANNELS + channel] * memory[ring + ((p + 3u) & 3u) * CHANNELS]
        + vectors[3u * CHANNELS + channel] * now;
    if keep {
        memory[ring + (p & 3u) * CHANNELS] = now;
    }
    return silu(sum);
}

fn softplus(x: f32) -> f32 {
    return max(x, 0.0) + log(1.0 + exp(-abs(x)));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let head = group.x;
    let first = group.y * 32u;
    let column = tid & 31u;
    let part = tid >> 5u;
    let at = (head * KEY_DIM + part * ROWS_EACH) * VALUE_DIM + first + column;
    // Asked for first, since it comes from the device's memory while the rest is computed.
    var state: array<f32, ROWS_EACH>;
    for (var i = 0u; i < ROWS_EACH; i++) {
        state[i] = memory[at + i * VALUE_DIM];
    }
    let gates = 4u * CHANNELS + head;
    let decay = exp(-vectors[gates] * softplus(scratch[A_AT + head] + vectors[gates + VALUE_HEADS]));
    let beta = sigmoid(scratch[B_AT + head]);
    let p = position();
    let key_head = head / (VALUE_HEADS / KEY_HEADS);
    let keeps = head % (VALUE_HEADS / KEY_HEADS) == 0u && group.y == 0u;
    var q = 0.0;
    var k = 0.0;
    if tid < KEY_DIM {
        q = convolved(key_head * KEY_DIM + tid, p, keeps);
        k = convolved((KEY_HEADS + key_head) * KEY_DIM + tid, p, keeps);
        query[tid] = q;
        key[tid] = k;
    }
    if tid >= 224u {
        let i = tid - 224u;
        let channel = 2u * KEY_HEADS * KEY_DIM + head * VALUE_DIM + first + i;
        value[i] = convolved(channel, p, true);
    }
    let by_team = vec3(team_sum(q * q, tid), team_sum(k * k, tid), team_sum(q * k, tid));
    if column == 0u {
        products[part] = by_team;
    }
    workgroupBarrier();
    var sums = vec3(0.0);
    for (var i = 0u; i < 8u; i++) {
        sums += products[i];
    }
    let query_scale = 1.0 / (sqrt(sums.x + 1e-6) * sqrt(f32(KEY_DIM)));
    let key_scale = 1.0 / sqrt(sums.y + 1e-6);

    var on = vec2(0.0);
    for (var i = 0u; i < ROWS_EACH; i++) {
        let row = part * ROWS_EACH + i;
        on += state[i] * vec2(key[row], query[row]);
    }
    onto[tid] = on;
    workgroupBarrier();
    on = vec2(0.0);
    for (var i = column; i < 256u; i += 32u) {
        on += onto[i];
    }
    let change = beta * (value[column] - decay * key_scale * on.x);
    for (var i = 0u; i < ROWS_EACH; i++) {
        let moved = decay * state[i] + key[part * ROWS_EACH + i] * key_scale * change;
        memory[at + i * VALUE_DIM] = moved;
    }
    // The updated state's S^T q is the old one's, faded, plus the change along q . k.
    let out = query_scale * (decay * on.y + sums.z * key_scale * change);
    let squares = team_sum(out * out, tid);
    if part == 0u {
        scratch[MIXED_AT + head * VALUE_DIM + first + column] = out;
    }
    if tid == 0u {
        scratch[SQUARES_AT + head * VALUE_BLOCKS + group.y] = squares;
    }
}
