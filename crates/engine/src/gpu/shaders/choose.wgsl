// The router's choice: of E logits the K largest, of equals the lower id first. A rank is the number of
// experts before one. Of each 32 experts at most K can be chosen: these are found first, in their order, and
// ranked among themselves then, where of equals the one listed first has the lower id.

const KEPT = min(32u, TOP_K);
const GROUPS = (EXPERTS + 31u) / 32u;
const LISTED = GROUPS * KEPT;
const PLACES = (LISTED + 3u) & ~3u;

var<workgroup> logits: array<vec4<f32>, GROUPS * 8u>;
var<workgroup> listed: array<f32, PLACES>;
var<workgroup> listed_ids: array<u32, LISTED>;
var<workgroup> chosen: array<u32, TOP_K>;
var<workgroup> chosen_logits: array<f32, TOP_K>;
var<workgroup> sum_parts: array<f32, 8>;

fn logit_of(token: u32, e: u32) -> f32 {
    if e < EXPERTS {
        return scratch[ROUTER_AT + token * EXPERTS + e];
    }
    return -3e38;
}

// How many of four are before one that lies `at` places behind the first of them.
fn before(four: vec4<f32>, mine: f32, at: i32) -> u32 {
    let earlier = vec4<i32>(0, 1, 2, 3) < vec4(at);
    let is_before = select(four > vec4(mine), four >= vec4(mine), earlier);
    let counted = select(vec4(0u), vec4(1u), is_before);
    return counted.x + counted.y + counted.z + counted.w;
}

fn choose(token: u32, tid: u32) {
    for (var i = tid; i < GROUPS * 8u; i += 256u) {
        let e = 4u * i;
        logits[i] = vec4(
            logit_of(token, e), logit_of(token, e + 1u),
            logit_of(token, e + 2u), logit_of(token, e + 3u),
        );
    }
    for (var i = LISTED + tid; i < PLACES; i += 256u) {
        listed[i] = -3e38;
    }
    if tid < TOP_K {
        chosen[tid] = 0u;
        chosen_logits[tid] = 0.0;
    }
    workgroupBarrier();
    for (var e = tid; e < GROUPS * 32u; e += 256u) {
        let mine = logits[e >> 2u][e & 3u];
        let group = e >> 5u;
        var rank = 0u;
        for (var i = 0u; i < 8u; i++) {
            rank += before(logits[group * 8u + i], mine, i32(e & 31u) - i32(4u * i));
        }
        if rank < KEPT {
            let at = group * KEPT + rank;
            listed[at] = mine;
            listed_ids[at] = e;
        }
    }
    workgroupBarrier();
    for (var at = tid; at < LISTED; at += 256u) {
        let mine = listed[at];
        var rank = 0u;
        for (var i = 0u; i < PLACES; i += 4u) {
            let four = vec4(listed[i], listed[i + 1u], listed[i + 2u], listed[i + 3u]);
            rank += before(four, mine, i32(at) - i32(i));
        }
        if rank < TOP_K {
            chosen[rank] = listed_ids[at];
            chosen_logits[rank] = mine;
        }
    }
    workgroupBarrier();
}

// The weight of a rank: its probability among all experts, or among the chosen where the model
// renormalises.
fn weight_of(rank: u32, tid: u32) -> f32 {
    let most = chosen_logits[0];
    var total = 0.0;
    if RENORMALISE {
        for (var i = 0u; i < TOP_K; i++) {
            total += exp(chosen_logits[i] - most);
        }
    } else {
        var sum = 0.0;
        for (var e = tid; e < EXPERTS; e += 256u) {
            sum += exp(logits[e >> 2u][e & 3u] - most);
        }
        sum = team_sum(sum, tid);
        if (tid & 31u) == 0u {
            sum_parts[tid >> 5u] = sum;
        }
        workgroupBarrier();
        for (var i = 0u; i < 8u; i++) {
            total += sum_parts[i];
        }
    }
    return exp(chosen_logits[rank] - most) / total;
}

// The ids and weights to the scratch.
fn tell(token: u32, tid: u32) {
    let weight = weight_of(min(tid, TOP_K - 1u), tid);
    if tid < TOP_K {
        scratch[CHOSEN_AT + token * TOP_K + tid] = bitcast<f32>(chosen[tid]);
        scratch[WEIGHTS_AT + token * TOP_K + tid] = weight;
    }
}
