// One token; the context is shared out over workgroups, whose parts `combine` joins.

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let first_head = group.x * GROUPED;
    let length = position() + 1u;
    let pages_each = bitcast<u32>(scratch[TOKEN_AT + 1u]);
    let end = min((group.y + 1u) * pages_each, (length + 63u) >> 6u);
    let mix = attend(first_head, Pages(group.y * pages_each, end, length), tid);
    for (var g = 0u; g < GROUPED; g++) {
        if tid < SHARERS * FOURS {
            shares[tid] = mix.fours[g];
        }
        workgroupBarrier();
        let part = PARTS_AT + ((first_head + g) * SPLITS_MAX + group.y) * (HEAD_DIM + 2u);
        if tid < FOURS {
            var sum = shares[tid];
            for (var i = 1u; i < SHARERS; i++) {
                sum += shares[i * FOURS + tid];
            }
            let at = part + 4u * tid;
            scratch[at] = sum.x;
            scratch[at + 1u] = sum.y;
            scratch[at + 2u] = sum.z;
            scratch[at + 3u] = sum.w;
        }
        if tid == 0u {
            scratch[part + HEAD_DIM] = largest[g];
            scratch[part + HEAD_DIM + 1u] = total[g];
        }
        workgroupBarrier();
    }
}
