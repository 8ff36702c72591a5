fn SOURCE_low_NAME(q: vec4<u32>) -> vec4<f32> {
    return vec4(
        unpack2x16float(q.x).x, unpack2x16float(q.y).x,
        unpack2x16float(q.z).x, unpack2x16float(q.w).x,
    );
}

fn SOURCE_high_NAME(q: vec4<u32>) -> vec4<f32> {
    return SOURCE_low_NAME(q >> vec4(16u));
}
