// Adds the outputs of each token's experts to the residual stream, weighted, in the router's order.

@group(1) @binding(0) var<storage, read> lists: array<u32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let token = group.x;
    let places = bitcast<u32>(scratch[TOKEN_AT + 2u]);
    for (var e = tid; e < HIDDEN; e += 256u) {
        var sum = scratch[H_AT + token * HIDDEN + e];
        for (var rank = 0u; rank < TOP_K; rank++) {
            let pair = lists[places + token * TOP_K + rank];
            sum += scratch[WEIGHTS_AT + token * TOP_K + rank] * scratch[OUTPUT_AT + pair * HIDDEN + e];
        }
        scratch[H_AT + token * HIDDEN + e] = sum;
    }
}
