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
    // One that is not here has the first one's numbers, which do not count.
    let record = select(0u, find(chosen[rank]), here);
    let gate = within(record, GATE_MATRIX);
    let up = within(record, UP_MATRIX);
    let lane = tid & 31u;
    let first = (group.x * 8u + (tid >> 5u)) * ROWSu;
    //ROW let n$r = min(first + $ru, WIDTH - 1u) * (HIDDEN >> 5u);
    //ROW var gate$r = 0.0;
    //ROW var up$r = 0.0;
    // An expert that is not here has no units.
    let units = select(0u, HIDDEN >> 5u, here);
    //STEP let n_$s = inside(lane + 32u * $su, units);
    //STEP //ROW var g$r_$s = expert_load_GATE(gate, n$r + n_$s);
    //STEP //ROW var u$r_$s = expert_load_UP(up, n$r + n_$s);
    stage(0u, HIDDEN, tid);
    for (var base = lane; base < units + lane; base += STRIDE) {
        //STEP let x$s = staged_unit(inside(base + 32u * $su, units));
        //STEP //ROW gate$r += counted(expert_dot_GATE(g$r_$s, x$s), base + 32u * $su, units);
        //STEP //ROW up$r += counted(expert_dot_UP(u$r_$s, x$s), base + 32u * $su, units);
        if base + STRIDE < units + lane {
            //STEP let m_$s = inside(base + STRIDE + 32u * $su, units);
            //STEP //ROW g$r_$s = expert_load_GATE(gate, n$r + m_$s);
            //STEP //ROW u$r_$s = expert_load_UP(up, n$r + m_$s);
        }
    }
    //ROW gate$r = team_sum(gate$r, tid);
    //ROW up$r = team_sum(up$r, tid);
    //ROW if here && lane == $ru && first + $ru < WIDTH { scratch[ACTIVE_AT + rank * WIDTH + place_of(first + $ru)] = weight * silu(gate$r) * up$r; }
}
