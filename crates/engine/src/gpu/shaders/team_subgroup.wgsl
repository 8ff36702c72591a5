// The sum over a team of 32 lanes where subgroups have 32 lanes or more: no workgroup memory.

fn team_sum(value: f32, tid: u32) -> f32 {
    var sum = value;
    sum += subgroupShuffleXor(sum, 16u);
    sum += subgroupShuffleXor(sum, 8u);
    sum += subgroupShuffleXor(sum, 4u);
    sum += subgroupShuffleXor(sum, 2u);
    sum += subgroupShuffleXor(sum, 1u);
    return sum;
}

fn team_max(value: f32, tid: u32) -> f32 {
    var most = value;
    most = max(most, subgroupShuffleXor(most, 16u));
    most = max(most, subgroupShuffleXor(most, 8u));
    most = max(most, subgroupShuffleXor(most, 4u));
    most = max(most, subgroupShuffleXor(most, 2u));
    most = max(most, subgroupShuffleXor(most, 1u));
    return most;
}
