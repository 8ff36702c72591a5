// The delta rule over a chunk, DELTA_TOKENS at a time: a workgroup takes 32 columns of one head's state
// through all of them. With S the state before, F the fades since then and what `delta_pairs` has left,
// new = (1 + L)^-1 beta (v - F S^T k) and out = F S^T q + (D (q . k)) new; the state after is
// F[last] S + the sum over j of D[last][j] k[j] (x) new[j]. A thread keeps its rows of one column in
// registers, in fours; keys and queries come STEP tokens at a time, and for the state POOLED keys.

@group(2) @binding(0) var<storage, read_write> memory: array<f32>;

const SIDE = DELTA_TOKENS;
// A key in fours, as many for each of the 8 teams.
const FOURS = (KEY_DIM + 31u) / 32u;
const KEY_FOURS = 8u * FOURS;
// Tokens of a step are added up two by two; steps go to sets of threads in turn.
const TWOS = STEP / 2u;
const SETS = 8u / TWOS;

var<workgroup> query: array<vec4<f32>, STEP * KEY_FOURS>;
var<workgroup> key: array<vec4<f32>, STEP * KEY_FOURS>;
var<workgroup> pool: array<vec4<f32>, TWOS * 256u>; // sums by team, then a square of pairs, then keys
var<workgroup> news: array<f32, SIDE * 32u>;

// Four of a token's key or query, zeros beyond its end and for no token.
fn four(token: u32, count: u32, column: u32, e: u32) -> vec4<f32> {
    if token >= count || e >= KEY_DIM {
        return vec4(0.0);
    }
    let at = CONVOLVED_AT + token * CHANNELS + column + e;
    return vec4(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]);
}

// A square of pairs into the pool, four of a row together.
fn bring_square(at: u32, tid: u32) {
    let source = at + 4u * tid;
    pool[tid] = vec4(scratch[source], scratch[source + 1u], scratch[source + 2u], scratch[source + 3u]);
}

// The square times the new values, at four tokens of a column.
fn times_news(tokens: vec4<u32>, column: u32) -> vec4<f32> {
    var sums = vec4(0.0);
    for (var i = 0u; i < SIDE / 4u; i++) {
        let at = 4u * i * 32u + column;
        let n = vec4(news[at], news[at + 32u], news[at + 64u], news[at + 96u]);
        let rows = tokens * (SIDE / 4u) + i;
        sums += vec4(dot(pool[rows.x], n), dot(pool[rows.y], n), dot(pool[rows.z], n), dot(pool[rows.w], n));
    }
    return sums;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let head = group.x;
    let first = group.y * 32u;
    let count = bitcast<u32>(scratch[TOKEN_AT + 1u]);
    let of_query = head / (VALUE_HEADS / KEY_HEADS) * KEY_DIM;
    let of_key = of_query + KEY_HEADS * KEY_DIM;
    let column = tid & 31u;
    let team = tid >> 5u;
    let at = head * KEY_DIM * VALUE_DIM + first + column;
    let value_at = CONVOLVED_AT + 2u * KEY_HEADS * KEY_DIM + head * VALUE_DIM + first + column;
    let mixed_at = MIXED_AT + head * VALUE_DIM + first + column;
    // The thread's four tokens: two of each of two steps.
    let token = STEP * (team / TWOS) + 2u * (team % TWOS);
    let tokens = vec4(token, token + 1u, token + SIDE / 2u, token + SIDE / 2u + 1u);
    var state: array<vec4<f32>, FOURS>;
    for (var i = 0u; i < FOURS; i++) {
        let r = 4u * (team + 8u * i);
        if r < KEY_DIM {
            let source = at + r * VALUE_DIM;
            state[i] = vec4(memory[source], memory[source + VALUE_DIM],
                memory[source + 2u * VALUE_DIM], memory[source + 3u * VALUE_DIM]);
        }
    }
    for (var start = 0u; start < count; start += SIDE) {
        let pairs = PAIRS_AT + (start / SIDE * VALUE_HEADS + head) * PAIRS_WORDS;
        let fades = pairs + 2u * SIDE * SIDE;
        var out = vec4(0.0);
        for (var step = 0u; step < SIDE / STEP; step++) {
            workgroupBarrier();
            for (var i = tid; i < STEP * KEY_FOURS; i += 256u) {
                let t = start + step * STEP + i / KEY_FOURS;
                let e = 4u * (i % KEY_FOURS);
                query[i] = four(t, count, of_query, e);
                key[i] = four(t, count, of_key, e);
            }
            workgroupBarrier();
            for (var two = 0u; two < TWOS; two++) {
                var sums = vec4(0.0);
                for (var i = 0u; i < FOURS; i++) {
                    let even = 2u * two * KEY_FOURS + team + 8u * i;
                    let odd = even + KEY_FOURS;
                    sums += vec4(dot(state[i], key[even]), dot(state[i], query[even]),
                        dot(state[i], key[odd]), dot(state[i], query[odd]));
                }
                pool[two * 256u + tid] = sums;
            }
            workgroupBarrier();
            if team / TWOS == step % SETS {
                var sums = vec4(0.0);
                for (var i = 0u; i < 8u; i++) {
                    sums += pool[(team % TWOS) * 256u + i * 32u + column];
                }
                let t = step * STEP + 2u * (team % TWOS);
                let fade = vec2(scratch[fades + t], scratch[fades + t + 1u]);
                var v = vec2(0.0);
                if start + t < count {
                    v.x = scratch[value_at + (start + t) * CHANNELS];
                }
                if start + t + 1u < count {
                    v.y = scratch[value_at + (start + t + 1u) * CHANNELS];
                }
                news[t * 32u + column] = v.x - fade.x * sums.x;
                news[(t + 1u) * 32u + column] = v.y - fade.y * sums.z;
                let onto = fade * sums.yw;
                out = select(vec4(out.xy, onto), vec4(onto, out.zw), step < SETS);
            }
        }
        workgroupBarrier();
        bring_square(pairs, tid);
        workgroupBarrier();
        let now = times_news(tokens, column);
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            news[tokens[i] * 32u + column] = now[i];
        }
        bring_square(pairs + SIDE * SIDE, tid);
        workgroupBarrier();
        out += times_news(tokens, column);
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            let t = start + tokens[i];
            if t < count {
                scratch[mixed_at + t * VALUE_HEADS * VALUE_DIM] = out[i];
            }
            news[tokens[i] * 32u + column] = now[i] * scratch[fades + SIDE + tokens[i]];
        }
        let fade = scratch[fades + SIDE - 1u];
        for (var i = 0u; i < FOURS; i++) {
            state[i] *= fade;
        }
        for (var back = 0u; back < SIDE; back += POOLED) {
            workgroupBarrier();
            for (var i = tid; i < POOLED * KEY_FOURS; i += 256u) {
                let t = start + back + i / KEY_FOURS;
                pool[i] = four(t, count, of_key, 4u * (i % KEY_FOURS));
            }
            workgroupBarrier();
            for (var t = 0u; t < POOLED; t++) {
                let n = news[(back + t) * 32u + column];
                for (var i = 0u; i < FOURS; i++) {
                    state[i] += n * pool[t * KEY_FOURS + team + 8u * i];
                }
            }
        }
    }
    for (var i = 0u; i < FOURS; i++) {
        let r = 4u * (team + 8u * i);
        if r < KEY_DIM {
            let to = at + r * VALUE_DIM;
            memory[to] = state[i].x;
            memory[to + VALUE_DIM] = state[i].y;
            memory[to + 2u * VALUE_DIM] = state[i].z;
            memory[to + 3u * VALUE_DIM] = state[i].w;
        }
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
