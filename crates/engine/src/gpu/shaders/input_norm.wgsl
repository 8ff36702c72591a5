// The residual stream times the norm's weights. The root that divides it is a factor of every product,
// so it is formed from what the lanes have read on the way and comes last.

var<workgroup> norm_parts: array<f32, 8>;
var<private> squares: f32 = 0.0;

fn prepare(tid: u32) {}

fn input(e: u32) -> vec4<f32> {
    let at = H_AT + e;
    let h = vec4(scratch[at], scratch[at + 8u], scratch[at + 16u], scratch[at + 24u]);
    squares += dot(h, h);
    return h * dense_vectors(e);
}

fn input_scale(tid: u32) -> f32 {
    let sum = team_sum(squares, tid);
    if (tid & 31u) == 0u {
        norm_parts[tid >> 5u] = sum;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < 8u; i++) {
        total += norm_parts[i];
    }
    return 1.0 / sqrt(total / f32(HIDDEN) + EPS);
}
