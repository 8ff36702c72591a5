// A row shifted and split for tensor cores, in place: of four numbers x the words hold the nearest halves
// h of the first and the second, of the third and the fourth, then those of x - h. Each is read as `input`
// first, by the thread that writes it then.

var<workgroup> sizes: array<u32, 256>;

fn split_row(row: u32, tid: u32) {
    var size = 0u;
    for (var e = tid; e < COLS; e += 256u) {
        size = max(size, size_of(input(row, e)));
    }
    sizes[tid] = size;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half >>= 1u) {
        if tid < half {
            sizes[tid] = max(sizes[tid], sizes[tid + half]);
        }
        workgroupBarrier();
    }
    let shift = shift_of(sizes[0]);
    let factor = factor_of(shift);
    for (var e = 4u * tid; e < COLS; e += 1024u) {
        let x = factor * vec4(input(row, e), input(row, e + 1u), input(row, e + 2u), input(row, e + 3u));
        let high = nearest_half(x);
        let low = x - high;
        let at = ROWS_AT + row * COLS + e;
        scratch[at] = bitcast<f32>(pack2x16float(high.xy));
        scratch[at + 1u] = bitcast<f32>(pack2x16float(high.zw));
        scratch[at + 2u] = bitcast<f32>(pack2x16float(low.xy));
        scratch[at + 3u] = bitcast<f32>(pack2x16float(low.zw));
    }
    if tid == 0u {
        scratch[SHIFTS_AT + row] = bitcast<f32>(shift);
    }
}
