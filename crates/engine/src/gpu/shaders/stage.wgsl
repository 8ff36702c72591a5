// Brings a run of the input vector into workgroup memory in units of 32 elements, so that a lane reads
// its unit as 8 vectors without bank conflicts: vector j of a unit holds elements j, j + 8, j + 16, j + 24.
// `input(e)` is the kernel's own and gives such a vector.

var<workgroup> staged: array<vec4<f32>, BLOCK / 4u>;
var<workgroup> unit_sums: array<f32, BLOCK / 32u>;

struct Unit {
    x0: vec4<f32>,
    x1: vec4<f32>,
    x2: vec4<f32>,
    x3: vec4<f32>,
    x4: vec4<f32>,
    x5: vec4<f32>,
    x6: vec4<f32>,
    x7: vec4<f32>,
    sum: f32,
}

fn staged_unit(unit: u32) -> Unit {
    let at = (unit >> 5u) * 256u + (unit & 31u);
    return Unit(
        staged[at], staged[at + 32u], staged[at + 64u], staged[at + 96u],
        staged[at + 128u], staged[at + 160u], staged[at + 192u], staged[at + 224u],
        unit_sums[unit],
    );
}

fn stage(first: u32, count: u32, tid: u32) {
    for (var slot = tid; slot < (count >> 2u); slot += 256u) {
        let unit = slot >> 3u;
        let j = slot & 7u;
        staged[(unit >> 5u) * 256u + j * 32u + (unit & 31u)] = input(first + unit * 32u + j);
    }
    workgroupBarrier();
    for (var unit = tid; unit < (count >> 5u); unit += 256u) {
        let at = (unit >> 5u) * 256u + (unit & 31u);
        var sum = vec4(0.0);
        for (var j = 0u; j < 256u; j += 32u) {
            sum += staged[at + j];
        }
        unit_sums[unit] = sum.x + sum.y + sum.z + sum.w;
    }
    workgroupBarrier();
}
