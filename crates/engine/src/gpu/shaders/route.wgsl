@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    choose(group.x, tid);
    tell(group.x, tid);
    // All ranks are computed next, as far as their experts have slots.
    if group.x == 0u && tid < TOP_K {
        scratch[RANKS_AT + tid] = bitcast<f32>(tid);
    }
}
