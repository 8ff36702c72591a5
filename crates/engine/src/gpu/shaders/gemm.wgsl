// Matrices times many vectors: a workgroup of 256 takes 64 rows by 64 vectors, a thread 4 by 4 of them.
// A unit of 32 columns at a time is unpacked into workgroup memory, a row every 9 vectors so that
// neighbours do not meet in a bank.

struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

var<workgroup> tile: array<vec4<f32>, 576>;
var<workgroup> inputs: array<vec4<f32>, 576>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let segments = dense[0].x;
    var segment = 0u;
    var first = group.x;
    for (var i = 0u; i + 1u < segments; i++) {
        let tiles = (dense[1u + 3u * i].y + 63u) / 64u;
        if segment == i && first >= tiles {
            first -= tiles;
            segment = i + 1u;
        }
    }
    first *= 64u;
    let head = dense[1u + 3u * segment];
    let place = dense[2u + 3u * segment];
    let rows = head.y;
    let m = Matrix(place.x, place.y, place.z);
    let count = bitcast<u32>(scratch[TOKEN_AT + 1u]);
    let row = min(first + (tid >> 2u), rows - 1u);
    let token = min(group.y * 64u + (tid >> 2u), count - 1u);
    let part = tid & 3u;
    let put = (tid >> 2u) * 9u + part * 2u;
    let across = (tid & 15u) * 9u;
    let down = (tid >> 4u) * 9u;
    var sum0 = vec4(0.0);
    var sum1 = vec4(0.0);
    var sum2 = vec4(0.0);
    var sum3 = vec4(0.0);
    for (var unit = 0u; unit < (COLS >> 5u); unit++) {
        let n = row * (COLS >> 5u) + unit;
        var eight: Eight;
        switch head.z {
            //FORMATS
            default: {}
        }
        tile[put] = eight.low;
        tile[put + 1u] = eight.high;
        let e = unit * 32u + part * 8u;
        inputs[put] = vec4(
            input(token, e), input(token, e + 1u), input(token, e + 2u), input(token, e + 3u),
        );
        inputs[put + 1u] = vec4(
            input(token, e + 4u), input(token, e + 5u), input(token, e + 6u), input(token, e + 7u),
        );
        workgroupBarrier();
        for (var k = 0u; k < 8u; k++) {
            let x0 = inputs[down + k];
            let x1 = inputs[down + 144u + k];
            let x2 = inputs[down + 288u + k];
            let x3 = inputs[down + 432u + k];
            let w0 = tile[across + k];
            let w1 = tile[across + 144u + k];
            let w2 = tile[across + 288u + k];
            let w3 = tile[across + 432u + k];
            sum0 += vec4(dot(w0, x0), dot(w0, x1), dot(w0, x2), dot(w0, x3));
            sum1 += vec4(dot(w1, x0), dot(w1, x1), dot(w1, x2), dot(w1, x3));
            sum2 += vec4(dot(w2, x0), dot(w2, x1), dot(w2, x2), dot(w2, x3));
            sum3 += vec4(dot(w3, x0), dot(w3, x1), dot(w3, x2), dot(w3, x3));
        }
        workgroupBarrier();
    }
    let to = dense[3u + 3u * segment].y;
    let behind = dense[3u + 3u * segment].x + first + (tid & 15u);
    for (var j = 0u; j < 4u; j++) {
        let t = group.y * 64u + (tid >> 4u) + 16u * j;
        if t < count {
            let at = to + t * head.w + behind;
            let left = rows - min(rows, first + (tid & 15u));
            if left > 0u { give(at, sum0[j]); }
            if left > 16u { give(at + 16u, sum1[j]); }
            if left > 32u { give(at + 32u, sum2[j]); }
            if left > 48u { give(at + 48u, sum3[j]); }
        }
    }
}
