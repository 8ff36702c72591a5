// A tile of a product of 64 rows of weights with TILE vectors, 16 or 64, on tensor cores. A factor x is
// shifted with its row and split into halves h + l; w x is the sum of their products without that of the
// two l, added up in f32. A row has a stride of 18 vectors: 32 columns of h, of l, and two so that rows do
// not meet in a bank. A subgroup has BANDS by STRIPS squares of the tile, as wide as SIDE.

alias Left = coop_matSQUARE<f16, A>;
alias Right = coop_matSQUARE<f16, B>;
alias Sums = coop_matSQUARE<f32, C>;

const STRIDE = 18u;
const CELLS = SIDE * SIDE;
const ABREAST = TILE / (STRIPS * SIDE);

var<workgroup> tile: array<vec4<f16>, 64u * STRIDE * MATRICES>;
var<workgroup> inputs: array<vec4<f16>, TILE * STRIDE>;
var<workgroup> squares: array<f32, 1024>; // one for each subgroup
var<workgroup> sizes: array<u32, 128u * MATRICES>;

fn put_four(at: u32, x: vec4<f32>) {
    let high = nearest_half(x);
    tile[at] = vec4<f16>(high);
    tile[at + 8u] = vec4<f16>(x - high);
}

fn put_weights(at: u32, eight: Eight, factor: f32) {
    put_four(at, factor * eight.low);
    put_four(at + 1u, factor * eight.high);
}

fn words(at: u32) -> vec4<f32> {
    return vec4(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]);
}

fn put_inputs(at: u32, four: vec4<f32>) {
    let q = bitcast<vec4<u32>>(four);
    inputs[at] = vec4<f16>(vec4(unpack2x16float(q.x), unpack2x16float(q.y)));
    inputs[at + 8u] = vec4<f16>(vec4(unpack2x16float(q.z), unpack2x16float(q.w)));
}

fn row_shift(matrix: u32, row: u32) -> i32 {
    let at = matrix * 128u + 2u * row;
    return shift_of(max(sizes[at], sizes[at + 1u]));
}

// Row and vector in the tile of a number in `squares`, where subgroups have left this band and strip.
fn cell(i: u32, band: u32, strip: u32) -> vec2<u32> {
    let wave = i / CELLS;
    let row = (wave / ABREAST * BANDS + band) * SIDE + i % SIDE;
    return vec2(row, (wave % ABREAST * STRIPS + strip) * SIDE + i % CELLS / SIDE);
}

fn collected(aim: Aim, matrix: u32, i: u32, at: vec2<u32>) -> f32 {
    let of_vector = bitcast<i32>(scratch[SHIFTS_AT + vector_row(aim, at.y)]);
    return shifted_back(squares[i], row_shift(matrix, at.x) + of_vector);
}

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) tid: u32,
    @builtin(subgroup_id) wave: u32,
) {
    let aim = aimed(group);
    let row = tid >> 1u;
    let part = 2u * (tid & 1u);
    let n = min(aim.first + row, aim.rows - 1u) * (COLS >> 5u);
    //MATRIX sizes[$mu * 128u + tid] = size_$m(aim, n, tid & 1u);
    workgroupBarrier();
    //MATRIX let factor$m = factor_of(row_shift($mu, row));
    //MATRIX var low$m = weights_$m(aim, n, part);
    //MATRIX var high$m = weights_$m(aim, n, part + 1u);
    //FOUR let from$f = ROWS_AT + vector_row(aim, (tid >> 3u) + $fu * 16u) * COLS + 4u * (tid & 7u);
    //FOUR var four$f = words(from$f);
    //MATRIX //BAND //STRIP var sums$m$b$s = Sums();
    let of_tile = wave / ABREAST * BANDS * SIDE * STRIDE;
    let of_inputs = wave % ABREAST * STRIPS * SIDE * STRIDE;
    for (var e = 0u; e < COLS; e += 32u) {
        //MATRIX put_weights(($mu * 64u + row) * STRIDE + 2u * part, low$m, factor$m);
        //MATRIX put_weights(($mu * 64u + row) * STRIDE + 2u * part + 2u, high$m, factor$m);
        //FOUR put_inputs(((tid >> 3u) + $fu * 16u) * STRIDE + (tid & 7u), four$f);
        workgroupBarrier();
        if e + 32u < COLS {
            let next = n + (e >> 5u) + 1u;
            //MATRIX low$m = weights_$m(aim, next, part);
            //MATRIX high$m = weights_$m(aim, next, part + 1u);
            //FOUR four$f = words(from$f + e + 32u);
        }
        for (var k = 0u; k < 8u; k += SIDE / 4u) {
            //STRIP let x_at$s = of_inputs + $su * SIDE * STRIDE + k;
            //STRIP let x$s = coopLoad<Right>(&inputs[x_at$s], STRIDE);
            //STRIP let x_low$s = coopLoad<Right>(&inputs[x_at$s + 8u], STRIDE);
            //MATRIX //BAND let w_at$m$b = of_tile + ($mu * 64u + $bu * SIDE) * STRIDE + k;
            //MATRIX //BAND let w$m$b = coopLoadT<Left>(&tile[w_at$m$b], STRIDE);
            //MATRIX //BAND let w_low$m$b = coopLoadT<Left>(&tile[w_at$m$b + 8u], STRIDE);
            //MATRIX //BAND //STRIP sums$m$b$s = coopMultiplyAdd(w_low$m$b, x$s, sums$m$b$s);
            //MATRIX //BAND //STRIP sums$m$b$s = coopMultiplyAdd(w$m$b, x_low$s, sums$m$b$s);
            //MATRIX //BAND //STRIP sums$m$b$s = coopMultiplyAdd(w$m$b, x$s, sums$m$b$s);
        }
        workgroupBarrier();
    }
    //BAND //STRIP var given$b$s = array<f32, 8>();
    //MATRIX //BAND //STRIP coopStore(sums$m$b$s, &squares[wave * CELLS], SIDE);
    //MATRIX //BAND //STRIP workgroupBarrier();
    //MATRIX //BAND //STRIP for (var j = 0u; j < 8u; j++) {
    //MATRIX //BAND //STRIP     let i = tid + 128u * j;
    //MATRIX //BAND //STRIP     let sum = collected(aim, $mu, i, cell(i, $bu, $su));
    //MATRIX //BAND //STRIP     given$b$s[j] = joined_$m(given$b$s[j], sum);
    //MATRIX //BAND //STRIP }
    //MATRIX //BAND //STRIP workgroupBarrier();
    //BAND //STRIP for (var j = 0u; j < 8u; j++) {
    //BAND //STRIP     let at = cell(tid + 128u * j, $bu, $su);
    //BAND //STRIP     if at.y < aim.vectors && aim.first + at.x < aim.rows {
    //BAND //STRIP         give_one(aim, at.x, at.y, given$b$s[j]);
    //BAND //STRIP     }
    //BAND //STRIP }
}
