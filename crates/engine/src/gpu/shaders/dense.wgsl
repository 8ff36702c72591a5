// Dense weights of one dispatch: a header of segments, a vector for the input, then matrices.

struct Matrix {
    weight: u32, // in words
    scales: u32, // in scales
    biases: u32, // in scales
}

@group(1) @binding(0) var<storage, read> dense: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> dense_words: array<u32>;

fn dense_vec(at: u32) -> vec4<u32> {
    return dense[at];
}

fn dense_word(at: u32) -> u32 {
    return dense_words[at];
}

// The norm's weights lie behind the header in the order of the staged input: vector j of a unit holds
// elements j, j + 8, j + 16 and j + 24.
fn dense_vectors(e: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(dense[VECTOR_AT + (e >> 5u) * 8u + (e & 7u)]);
}

fn dense_vector(e: u32) -> f32 {
    return dense_vectors(e)[(e >> 3u) & 3u];
}
