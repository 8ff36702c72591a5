// The sum over a team of 32 lanes in workgroup memory, for devices whose subgroups are smaller. Adds in
// the order of the subgroup form, so both give the same bits. Called by all lanes of a workgroup.

var<workgroup> team_values: array<f32, 256>;

fn team_sum(value: f32, tid: u32) -> f32 {
    var sum = value;
    for (var distance = 16u; distance > 0u; distance >>= 1u) {
        team_values[tid] = sum;
        workgroupBarrier();
        sum += team_values[tid ^ distance];
        workgroupBarrier();
    }
    return sum;
}

fn team_max(value: f32, tid: u32) -> f32 {
    var most = value;
    for (var distance = 16u; distance > 0u; distance >>= 1u) {
        team_values[tid] = most;
        workgroupBarrier();
        most = max(most, team_values[tid ^ distance]);
        workgroupBarrier();
    }
    return most;
}
