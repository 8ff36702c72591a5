// The chosen experts' down projections, added to the residual stream together with the shared expert's.
// The input of all of them is one vector: TOP_K * WIDTH weighted activations, then the shared expert's. A
// lane's units go over experts as over columns. An expert without a slot was computed elsewhere: what all of
// those give, weighted and added up, lies in the scratch.

const ROUTED = TOP_K * WIDTH;
const ALL = ROUTED + SHARED_WIDTH;

var<workgroup> records: array<u32, TOP_K>;
var<workgroup> slabs: array<u32, TOP_K>;

fn input(e: u32) -> vec4<f32> {
    if e < ROUTED {
        let at = ACTIVE_AT + (e & ~31u) + 4u * (e & 7u);
        return vec4(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]);
    }
    return shared_input(e - ROUTED);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    if tid < TOP_K {
        let expert = bitcast<u32>(scratch[CHOSEN_AT + tid]);
        records[tid] = select(find(expert), NOWHERE, places[expert] == NOWHERE);
        slabs[tid] = slab;
    }
    let lane = tid & 31u;
    let first = (group.x * 8u + (tid >> 5u)) * ROWSu;
    //ROW let row$r = min(first + $ru, HIDDEN - 1u);
    //ROW var acc$r = 0.0;
    for (var start = 0u; start < ALL; start += BLOCK) {
        let count = min(BLOCK, ALL - start);
        stage(start, count, tid);
        let end = min(count, max(ROUTED, start) - start) >> 5u;
        for (var u = lane; u < end; u += 32u) {
            let x = staged_unit(u);
            let at = (start >> 5u) + u;
            let rank = at / (WIDTH >> 5u);
            if records[rank] == NOWHERE {
                continue;
            }
            slab = slabs[rank];
            let down = within(records[rank], DOWN_MATRIX);
            let column = at % (WIDTH >> 5u);
            //ROW acc$r += expert_dot_DOWN(down, row$r * (WIDTH >> 5u) + column, x);
        }
        //SHARED
        workgroupBarrier();
    }
    var is_elsewhere = false;
    for (var i = 0u; i < TOP_K; i++) {
        is_elsewhere = is_elsewhere || records[i] == NOWHERE;
    }
    //ROW let sum$r = team_sum(acc$r, tid);
    //ROW if lane == $ru && first + $ru < HIDDEN { scratch[H_AT + first + $ru] += sum$r + select(0.0, scratch[ELSEWHERE_AT + first + $ru], is_elsewhere); }
}
