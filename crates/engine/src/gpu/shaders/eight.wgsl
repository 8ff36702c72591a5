// Weights of a unit that a thread unpacks together.

struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

