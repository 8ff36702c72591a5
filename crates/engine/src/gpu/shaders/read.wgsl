// The sum of all words of a buffer, one for each workgroup: as fast as the device reads.

@group(0) @binding(0) var<storage, read> words: array<vec4<u32>>;
@group(1) @binding(0) var<storage, read_write> sums: array<u32>;

var<workgroup> parts: array<u32, 256>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) tid: u32,
) {
    let stride = groups.x * 256u;
    var sum = vec4(0u);
    // Four reads under way a thread; the buffer is a whole number of them.
    for (var i = group.x * 256u + tid; i < arrayLength(&words); i += 4u * stride) {
        sum += words[i] + words[i + stride] + words[i + 2u * stride] + words[i + 3u * stride];
    }
    parts[tid] = sum.x + sum.y + sum.z + sum.w;
    workgroupBarrier();
    if tid == 0u {
        var total = 0u;
        for (var i = 0u; i < 256u; i++) {
            total += parts[i];
        }
        sums[group.x] = total;
    }
}
