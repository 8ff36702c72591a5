// The router's choice: of E logits the K largest, of equals the lower id first. Every expert's rank is
// the number of experts before it, so all ranks are found at once.

var<workgroup> logits: array<vec4<f32>, (EXPERTS + 3u) / 4u>;
var<workgroup> chosen: array<u32, TOP_K>;
var<workgroup> chosen_logits: array<f32, TOP_K>;
var<workgroup> sum_parts: array<f32, 8>;

fn logit_of(token: u32, e: u32) -> f32 {
    if e < EXPERTS {
        return scratch[ROUTER_AT + token * EXPERTS + e];
    }
    return -3e38;
}

fn choose(token: u32, tid: u32) {
    for (var i = tid; i < (EXPERTS + 3u) / 4u; i += 256u) {
        let e = 4u * i;
        logits[i] = vec4(
            logit_of(token, e), logit_of(token, e + 1u),
            logit_of(token, e + 2u), logit_of(token, e + 3u),
        );
    }
    if tid < TOP_K {
        chosen[tid] = 0u;
        chosen_logits[tid] = 0.0;
    }
    workgroupBarrier();
    for (var e = tid; e < EXPERTS; e += 256u) {
        let mine = logits[e >> 2u][e & 3u];
        var before = vec4(0u);
        for (var i = 0u; i < (EXPERTS + 3u) / 4u; i++) {
            let its = logits[i];
            let other = vec4(4u * i) + vec4(0u, 1u, 2u, 3u);
            let equal = select(vec4(0u), vec4(1u), its == vec4(mine))
                * select(vec4(0u), vec4(1u), other < vec4(e));
            before += select(equal, vec4(1u), its > vec4(mine));
        }
        let rank = before.x + before.y + before.z + before.w;
        if rank < TOP_K {
            chosen[rank] = e;
            chosen_logits[rank] = mine;
        }
    }
    workgroupBarrier();
}

// The weight of a rank: its probability among all experts, renormalised where the model does.
fn weight_of(rank: u32, tid: u32) -> f32 {
    let most = chosen_logits[0];
    var sum = 0.0;
    for (var e = tid; e < EXPERTS; e += 256u) {
        sum += exp(logits[e >> 2u][e & 3u] - most);
    }
    sum = team_sum(sum, tid);
    if (tid & 31u) == 0u {
        sum_parts[tid >> 5u] = sum;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < 8u; i++) {
        total += sum_parts[i];
    }
    var scale = 1.0;
    if RENORMALISE {
        scale = 0.0;
        for (var i = 0u; i < TOP_K; i++) {
            scale += exp(chosen_logits[i] - most) / total;
        }
    }
    return exp(chosen_logits[rank] - most) / total / scale;
}

// The ids and weights to the scratch.
fn tell(token: u32, tid: u32) {
    let weight = weight_of(min(tid, TOP_K - 1u), tid);
    if tid < TOP_K {
        scratch[CHOSEN_AT + token * TOP_K + tid] = bitcast<f32>(chosen[tid]);
        scratch[WEIGHTS_AT + token * TOP_K + tid] = weight;
    }
}
