// A chunk of tokens; a workgroup takes the whole context of one, and applies the output gate.

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let first_head = group.x * GROUPED;
    let token = group.y;
    let length = position() + token + 1u;
    let mix = attend(first_head, token, Pages(0u, (length + 63u) >> 6u, length), tid);
    if tid < HEAD_DIM {
        for (var g = 0u; g < GROUPED; g++) {
            let head = token * HEADS + first_head + g;
            var out = mix[g] / total[g];
            if GATED {
                out *= sigmoid(scratch[QUERY_AT + head * QUERY_STRIDE + HEAD_DIM + tid]);
            }
            scratch[MIXED_AT + head * HEAD_DIM + tid] = out;
        }
    }
}
