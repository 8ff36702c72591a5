// silu(gate x) * (up x) of chosen experts, weighted: a workgroup takes rows of one expert. Both its input
// and its output lie in the order of the staged input. An expert without a slot is passed over: every
// barrier is met all the same.

fn input(e: u32) -> vec4<f32> {
    let at = NORMED_AT + (e & ~31u) + 4u * (e & 7u);
    return vec4(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]);
}

// Where element i of a vector lies in that order.
fn place_of(i: u32) -> u32 {
    return (i & ~31u) + 4u * (i & 7u) + ((i >> 3u) & 3u);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    choose(0u, tid);
    let rank = bitcast<u32>(scratch[RANKS_AT + group.y]);
    let weight = weight_of(rank, tid);
    if group.x == 0u && group.y == 0u {
        workgroupBarrier();
        tell(0u, tid);
    }
    let here = places[chosen[rank]] != NOWHERE;
    let record = find(chosen[rank]);
    let gate = within(record, GATE_MATRIX);
    let up = within(record, UP_MATRIX);
    let lane = tid & 31u;
    let first = (group.x * 8u + (tid >> 5u)) * ROWSu;
    //ROW let n$r = min(first + $ru, WIDTH - 1u) * (HIDDEN >> 5u);
    //ROW var gate$r = 0.0;
    //ROW var up$r = 0.0;
    for (var start = 0u; start < HIDDEN; start += BLOCK) {
        let units = min(BLOCK, HIDDEN - start) >> 5u;
        stage(start, units << 5u, tid);
        let start_unit = start >> 5u;
        let end = select(0u, units, here);
        for (var u = lane; u < end; u += 32u) {
            let x = staged_unit(u);
            //ROW gate$r += expert_dot_GATE(gate, n$r + start_unit + u, x);
            //ROW up$r += expert_dot_UP(up, n$r + start_unit + u, x);
        }
        workgroupBarrier();
    }
    //ROW gate$r = team_sum(gate$r, tid);
    //ROW up$r = team_sum(up$r, tid);
    //ROW if here && lane == $ru && first + $ru < WIDTH { scratch[ACTIVE_AT + rank * WIDTH + place_of(first + $ru)] = weight * silu(gate$r) * up$r; }
}
