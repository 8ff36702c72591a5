// Attention of one token over some pages of one key/value head, for GROUPED of its query heads: the
// softmax is carried from page to page. Reads that do not wait for one another are asked for four at a
// time.

@group(1) @binding(0) var<storage, read> cache: array<vec4<u32>>;

// Fours of a head, and threads that share the positions of one of them.
const FOURS = HEAD_DIM / 4u;
const SHARERS = 256u / FOURS;

var<workgroup> queries: array<vec4<f32>, GROUPED * FOURS>;
var<workgroup> quarters: array<f32, 4u * 64u * GROUPED>;
var<workgroup> weights: array<f32, 64u * GROUPED>;
var<workgroup> largest: array<f32, GROUPED>;
var<workgroup> total: array<f32, GROUPED>;
var<workgroup> fade: array<f32, GROUPED>;
var<workgroup> shares: array<vec4<f32>, SHARERS * FOURS>;

struct Pages {
    first: u32,
    end: u32,
    length: u32, // positions that the token sees
}

// What a thread has summed up: four elements of each head.
struct Mix {
    fours: array<vec4<f32>, GROUPED>,
}

fn attend(first_head: u32, pages: Pages, tid: u32) -> Mix {
    let kv_head = first_head / (HEADS / KV_HEADS);
    for (var i = tid; i < GROUPED * FOURS; i += 256u) {
        let at = QUERY_AT + (first_head + i / FOURS) * QUERY_STRIDE + 4u * (i % FOURS);
        queries[i] = vec4(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u])
            / sqrt(f32(HEAD_DIM));
    }
    if tid < GROUPED {
        largest[tid] = -1e30;
        total[tid] = 0.0;
    }
    var mix: Mix;
    for (var g = 0u; g < GROUPED; g++) {
        mix.fours[g] = vec4(0.0);
    }
    workgroupBarrier();
    for (var page = pages.first; page < pages.end; page++) {
        let keys = (page * 2u * KV_HEADS + kv_head) * 64u * HEAD_DIM;
        let count = min(64u, pages.length - page * 64u);
        score(keys, tid);
        workgroupBarrier();
        weigh(count, tid);
        workgroupBarrier();
        if tid < SHARERS * FOURS {
            for (var g = 0u; g < GROUPED; g++) {
                mix.fours[g] *= fade[g];
            }
            let values = keys + KV_HEADS * 64u * HEAD_DIM + 4u * (tid % FOURS);
            var i = tid / FOURS;
            for (; i + 3u * SHARERS < count; i += 4u * SHARERS) {
                let v0 = kept(values + i * HEAD_DIM);
                let v1 = kept(values + (i + SHARERS) * HEAD_DIM);
                let v2 = kept(values + (i + 2u * SHARERS) * HEAD_DIM);
                let v3 = kept(values + (i + 3u * SHARERS) * HEAD_DIM);
                for (var g = 0u; g < GROUPED; g++) {
                    let w = g * 64u + i;
                    mix.fours[g] += weights[w] * v0 + weights[w + SHARERS] * v1
                        + weights[w + 2u * SHARERS] * v2 + weights[w + 3u * SHARERS] * v3;
                }
            }
            for (; i < count; i += SHARERS) {
                let v = kept(values + i * HEAD_DIM);
                for (var g = 0u; g < GROUPED; g++) {
                    mix.fours[g] += weights[g * 64u + i] * v;
                }
            }
        }
        workgroupBarrier();
    }
    return mix;
}

// A quarter of the product of each query with the key of position tid / 4.
fn score(keys: u32, tid: u32) {
    var sums: array<f32, GROUPED>;
    for (var g = 0u; g < GROUPED; g++) {
        sums[g] = 0.0;
    }
    let row = keys + (tid >> 2u) * HEAD_DIM;
    var i = tid & 3u;
    for (; i + 12u < FOURS; i += 16u) {
        let k0 = kept(row + 4u * i);
        let k1 = kept(row + 4u * i + 16u);
        let k2 = kept(row + 4u * i + 32u);
        let k3 = kept(row + 4u * i + 48u);
        for (var g = 0u; g < GROUPED; g++) {
            let q = g * FOURS + i;
            sums[g] += dot(k0, queries[q]) + dot(k1, queries[q + 4u])
                + dot(k2, queries[q + 8u]) + dot(k3, queries[q + 12u]);
        }
    }
    for (; i < FOURS; i += 4u) {
        let k = kept(row + 4u * i);
        for (var g = 0u; g < GROUPED; g++) {
            sums[g] += dot(k, queries[g * FOURS + i]);
        }
    }
    for (var g = 0u; g < GROUPED; g++) {
        quarters[g * 256u + tid] = sums[g];
    }
}

// The page's weights, and by how much what was before it fades: a team for each head, a lane for two
// positions.
fn weigh(count: u32, tid: u32) {
    let lane = tid & 31u;
    let g = tid >> 5u;
    var two = vec2(-1e30);
    for (var i = 0u; i < 2u; i++) {
        let position = lane + 32u * i;
        if g < GROUPED && position < count {
            let at = 4u * (g * 64u + position);
            two[i] = quarters[at] + quarters[at + 1u] + quarters[at + 2u] + quarters[at + 3u];
        }
    }
    let before = select(-1e30, largest[min(g, GROUPED - 1u)], g < GROUPED);
    let most = max(before, team_max(max(two.x, two.y), tid));
    let weight = exp(two - most);
    let sum = team_sum(weight.x + weight.y, tid);
    if g < GROUPED {
        weights[g * 64u + lane] = weight.x;
        weights[g * 64u + lane + 32u] = weight.y;
        if lane == 0u {
            fade[g] = exp(before - most);
            total[g] = total[g] * exp(before - most) + sum;
            largest[g] = most;
        }
    }
}
