// What the delta rule gave for every token, normed by head and gated, in place. The norm's weights are
// behind the header of the part that is multiplied next.

var<workgroup> parts: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = (group.y * VALUE_HEADS + group.x) * VALUE_DIM;
    var sum = 0.0;
    for (var e = tid; e < VALUE_DIM; e += 64u) {
        let x = scratch[MIXED_AT + row + e];
        sum += x * x;
    }
    parts[tid] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if tid < half {
            parts[tid] += parts[tid + half];
        }
        workgroupBarrier();
    }
    let scale = 1.0 / sqrt(parts[0] / f32(VALUE_DIM) + EPS);
    for (var e = tid; e < VALUE_DIM; e += 64u) {
        let normed = scratch[MIXED_AT + row + e] * scale * dense_vector(e);
        scratch[MIXED_AT + row + e] = normed * silu(scratch[Z_AT + row + e]);
    }
}
