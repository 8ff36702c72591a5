// The residual stream of every token, normed. The norm's weights are behind the header of the part that
// is multiplied next.

var<workgroup> parts: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group.x * HIDDEN;
    var sum = 0.0;
    for (var e = tid; e < HIDDEN; e += 256u) {
        let h = scratch[H_AT + row + e];
        sum += h * h;
    }
    parts[tid] = sum;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half >>= 1u) {
        if tid < half {
            parts[tid] += parts[tid + half];
        }
        workgroupBarrier();
    }
    let scale = 1.0 / sqrt(parts[0] / f32(HIDDEN) + EPS);
    for (var e = tid; e < HIDDEN; e += 256u) {
        scratch[NORMED_AT + row + e] = scratch[H_AT + row + e] * scale * dense_vector(e);
    }
}
