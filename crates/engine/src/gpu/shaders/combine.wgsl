// Joins the parts of a head's attention and applies the output gate.

struct Parts {
    first: u32, // where in the scratch
    count: u32,
}

var<workgroup> largest: array<f32, SPLITS_MAX>;
var<workgroup> totals: array<f32, SPLITS_MAX>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let head = group.x;
    let of_head = parts_of(head);
    let parts = of_head.first;
    let splits = of_head.count;
    if tid < splits {
        let part = parts + tid * (HEAD_DIM + 2u) + HEAD_DIM;
        largest[tid] = scratch[part];
        totals[tid] = scratch[part + 1u];
    }
    workgroupBarrier();
    var most = -1e30;
    for (var i = 0u; i < splits; i++) {
        most = max(most, largest[i]);
    }
    for (var e = tid; e < HEAD_DIM; e += 256u) {
        var total = 0.0;
        var sum = 0.0;
        var i = 0u;
        for (; i + 3u < splits; i += 4u) {
            let at = parts + i * (HEAD_DIM + 2u) + e;
            let part = vec4(
                scratch[at], scratch[at + HEAD_DIM + 2u],
                scratch[at + 2u * (HEAD_DIM + 2u)], scratch[at + 3u * (HEAD_DIM + 2u)],
            );
            let weight = exp(vec4(largest[i], largest[i + 1u], largest[i + 2u], largest[i + 3u]) - most);
            total += dot(weight, vec4(totals[i], totals[i + 1u], totals[i + 2u], totals[i + 3u]));
            sum += dot(weight, part);
        }
        for (; i < splits; i++) {
            let weight = exp(largest[i] - most);
            total += weight * totals[i];
            sum += weight * scratch[parts + i * (HEAD_DIM + 2u) + e];
        }
        var out = sum / total;
        if GATED {
            out *= sigmoid(scratch[QUERY_AT + head * QUERY_STRIDE + HEAD_DIM + e]);
        }
        scratch[MIXED_AT + head * HEAD_DIM + e] = out;
    }
}
