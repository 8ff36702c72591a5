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

struct Down {
    place: Matrix,
    column: u32,
    slab: u32,
    is_here: bool,
}

// What unit `u` behind `start` is multiplied with. An expert without a slot has the numbers of the first
// one, which do not count.
fn down_of(start: u32, u: u32) -> Down {
    let at = (start >> 5u) + u;
    let rank = min(at / (WIDTH >> 5u), TOP_K - 1u);
    let is_here = records[rank] != NOWHERE;
    let place = within(select(0u, records[rank], is_here), DOWN_MATRIX);
    return Down(place, at % (WIDTH >> 5u), select(0u, slabs[rank], is_here), is_here);
}

fn load_down(down: Down, row: u32) -> expert_Packed_DOWN {
    slab = down.slab;
    return expert_load_DOWN(down.place, row * (WIDTH >> 5u) + down.column);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    if tid < TOP_K {
        let expert = bitcast<u32>(scratch[CHOSEN_AT + tid]);
        records[tid] = select(find(expert), NOWHERE, places[expert] == NOWHERE);
        slabs[tid] = slab;
    }
    workgroupBarrier();
    let lane = tid & 31u;
    let first = (group.x * 8u + (tid >> 5u)) * ROWSu;
    //ROW let row$r = min(first + $ru, HIDDEN - 1u);
    //ROW var acc$r = 0.0;
    for (var start = 0u; start < ALL; start += BLOCK) {
        let count = min(BLOCK, ALL - start);
        let end = min(count, max(ROUTED, start) - start) >> 5u;
        //STEP var d_$s = down_of(start, inside(lane + 32u * $su, end));
        //STEP //ROW var q$r_$s = load_down(d_$s, row$r);
        stage(start, count, tid);
        for (var base = lane; base < end + lane; base += STRIDE) {
            //STEP let x$s = staged_unit(inside(base + 32u * $su, end));
            //STEP //ROW acc$r += select(0.0, counted(expert_dot_DOWN(q$r_$s, x$s), base + 32u * $su, end), d_$s.is_here);
            if base + STRIDE < end + lane {
                //STEP d_$s = down_of(start, inside(base + STRIDE + 32u * $su, end));
                //STEP //ROW q$r_$s = load_down(d_$s, row$r);
            }
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
