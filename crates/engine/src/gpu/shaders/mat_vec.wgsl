// Matrices times one vector. A workgroup has 8 teams of 32 lanes, a team takes ROWS rows of one matrix at
// a time. There are fewer workgroups than rows: each brings the input in once and goes over many rows.

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) tid: u32,
) {
    prepare(tid);
    let lane = tid & 31u;
    let segments = dense[0].x;
    let blocks = dense[0].y;
    var scale = 1.0;
    if COLS <= BLOCK {
        stage(0u, COLS, tid);
        scale = input_scale(tid);
        //KEEP
    }
    for (var block = group.x; block < blocks; block += groups.x) {
        var segment = 0u;
        for (var i = 1u; i < segments; i++) {
            if block >= dense[1u + 3u * i].x {
                segment = i;
            }
        }
        let head = dense[1u + 3u * segment];
        let place = dense[2u + 3u * segment];
        let rows = head.y;
        let m = Matrix(place.x, place.y, place.z);
        let first = ((block - head.x) * 8u + (tid >> 5u)) * ROWSu;
        let last = rows - 1u;
        //ROW let n$r = min(first + $ru, last) * (COLS >> 5u);
        //ROW var acc$r = 0.0;
        for (var start = 0u; start < COLS; start += BLOCK) {
            let units = min(BLOCK, COLS - start) >> 5u;
            if COLS > BLOCK {
                workgroupBarrier();
                stage(start, units << 5u, tid);
            }
            let start_unit = start >> 5u;
            switch head.z {
                //FORMATS
                default: {}
            }
        }
        //ROW let sum$r = team_sum(acc$r, tid) * scale;
        //ROW if lane == $ru && first + $ru < rows { give(place.w + first + $ru, sum$r); }
    }
}
