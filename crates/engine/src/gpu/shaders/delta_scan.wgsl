// The recurrence over a chunk: a workgroup takes 32 columns of one head's state through all tokens. A
// thread keeps its rows of one column in registers; queries and keys come 16 tokens at a time.

@group(1) @binding(0) var<storage, read> vectors: array<f32>;
@group(2) @binding(0) var<storage, read_write> memory: array<f32>;

const ROWS_EACH = KEY_DIM / 8u;
const STEP = 16u;

var<workgroup> query: array<f32, STEP * KEY_DIM>;
var<workgroup> key: array<f32, STEP * KEY_DIM>;
var<workgroup> onto: array<vec3<f32>, 512>;

fn softplus(x: f32) -> f32 {
    return max(x, 0.0) + log(1.0 + exp(-abs(x)));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let head = group.x;
    let first = group.y * 32u;
    let count = bitcast<u32>(scratch[TOKEN_AT + 1u]);
    let key_head = head / (VALUE_HEADS / KEY_HEADS);
    let column = tid & 31u;
    let part = tid >> 5u;
    let at = (head * KEY_DIM + part * ROWS_EACH) * VALUE_DIM + first + column;
    let value_at = CONVOLVED_AT + 2u * KEY_HEADS * KEY_DIM + head * VALUE_DIM + first + column;
    let gates = 4u * CHANNELS + head;
    var state: array<f32, ROWS_EACH>;
    for (var i = 0u; i < ROWS_EACH; i++) {
        state[i] = memory[at + i * VALUE_DIM];
    }
    for (var start = 0u; start < count; start += STEP) {
        workgroupBarrier();
        let here = min(STEP, count - start);
        for (var i = tid; i < here * KEY_DIM; i += 256u) {
            let row = CONVOLVED_AT + (start + i / KEY_DIM) * CHANNELS;
            let at = row + key_head * KEY_DIM + i % KEY_DIM;
            query[i] = scratch[at];
            key[i] = scratch[at + KEY_HEADS * KEY_DIM];
        }
        workgroupBarrier();
        for (var s = 0u; s < here; s++) {
            let t = start + s;
            let row = s * KEY_DIM + part * ROWS_EACH;
            var sums = vec3(0.0);
            for (var i = 0u; i < ROWS_EACH; i++) {
                let q = query[row + i];
                let k = key[row + i];
                sums += vec3(state[i] * k, state[i] * q, q * k);
            }
            // Two sets in turn, so that one barrier a token is enough.
            let half = (s & 1u) * 256u;
            onto[half + tid] = sums;
            workgroupBarrier();
            sums = vec3(0.0);
            for (var i = column; i < 256u; i += 32u) {
                sums += onto[half + i];
            }
            let decay = exp(-vectors[gates]
                * softplus(scratch[A_AT + t * VALUE_HEADS + head] + vectors[gates + VALUE_HEADS]));
            let beta = sigmoid(scratch[B_AT + t * VALUE_HEADS + head]);
            let change = beta * (scratch[value_at + t * CHANNELS] - decay * sums.x);
            for (var i = 0u; i < ROWS_EACH; i++) {
                state[i] = decay * state[i] + key[row + i] * change;
            }
            if part == 0u {
                let out = decay * sums.y + sums.z * change;
                scratch[MIXED_AT + (t * VALUE_HEADS + head) * VALUE_DIM + first + column] = out;
            }
        }
    }
    for (var i = 0u; i < ROWS_EACH; i++) {
        memory[at + i * VALUE_DIM] = state[i];
    }
    keep_history(head, first, tid, count);
}

// The chunk's last raw projections into the ring; each channel by one workgroup.
fn keep_history(head: u32, first: u32, tid: u32, count: u32) {
    let owns_keys = head % (VALUE_HEADS / KEY_HEADS) == 0u && first == 0u;
    let key_head = head / (VALUE_HEADS / KEY_HEADS);
    for (var back = 0u; back < min(4u, count); back++) {
        let t = count - 1u - back;
        let ring = HISTORY_AT + ((position() + t) & 3u) * CHANNELS;
        let row = RAW_AT + t * CHANNELS;
        if tid < 32u {
            let channel = 2u * KEY_HEADS * KEY_DIM + head * VALUE_DIM + first + tid;
            memory[ring + channel] = scratch[row + channel];
        }
        if owns_keys && tid < KEY_DIM {
            let channel = key_head * KEY_DIM + tid;
            memory[ring + channel] = scratch[row + channel];
            let of_key = channel + KEY_HEADS * KEY_DIM;
            memory[ring + of_key] = scratch[row + of_key];
        }
    }
}
