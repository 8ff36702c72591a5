// One token; the context is shared out over workgroups, whose parts `combine` joins.

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let first_head = group.x * GROUPED;
    let length = position() + 1u;
    let pages_each = bitcast<u32>(scratch[TOKEN_AT + 1u]);
    let end = min((group.y + 1u) * pages_each, (length + 63u) >> 6u);
    let mix = attend(first_head, 0u, Pages(group.y * pages_each, end, length), tid);
    for (var g = 0u; g < GROUPED; g++) {
        let part = PARTS_AT + ((first_head + g) * SPLITS_MAX + group.y) * (HEAD_DIM + 2u);
        if tid < HEAD_DIM {
            scratch[part + tid] = mix[g];
        }
        if tid == 0u {
            scratch[part + HEAD_DIM] = largest[g];
            scratch[part + HEAD_DIM + 1u] = total[g];
        }
    }
}
