fn SOURCE_low_NAME(q: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(q << vec4(16u));
}

fn SOURCE_high_NAME(q: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(q & vec4(0xffff0000u));
}
