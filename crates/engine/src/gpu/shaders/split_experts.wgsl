@group(1) @binding(0) var<storage, read> lists: array<u32>;

fn input(pair: u32, e: u32) -> f32 {
    return scratch[ACTIVE_AT + pair * COLS + e];
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let listed = TILES_AT + 4u * group.y;
    if group.x < lists[listed + 2u] {
        split_row(lists[listed + 1u] + group.x, tid);
    }
}
