// Factors as two halves: powers of two that bring the largest of a row to between 2^14 and 2^15, and its
// sums back again, and the nearest number of 11 bits, which is a half. It is made of bits, as compilers take a
// conversion there and back for nothing.

// The shift of a row that is no number or infinite somewhere: what it enters is no number.
const POISON = 1024;

// What the magnitude is of, in bits: they have the order of the numbers, infinity and NaN the last.
fn size_of(x: f32) -> u32 {
    return bitcast<u32>(x) & 0x7fffffffu;
}

fn size_of_four(x: vec4<f32>) -> u32 {
    return max(max(size_of(x.x), size_of(x.y)), max(size_of(x.z), size_of(x.w)));
}

// What the exponents of a row grow by, whose numbers are of such a size at most. Two to its power
// is normal, and so is two to its negative.
fn shift_of(size: u32) -> i32 {
    if size >= 0x7f800000u {
        return POISON;
    }
    return min(141 - i32(size >> 23u), 126);
}

fn power_of_two(exponent: i32) -> f32 {
    return bitcast<f32>(u32(exponent + 127) << 23u);
}

fn factor_of(shift: i32) -> f32 {
    return power_of_two(select(shift, 0, shift == POISON));
}

// A sum of products of rows that were shifted by so much together. Two factors, as one may be no
// normal number.
fn shifted_back(sum: f32, shift: i32) -> f32 {
    if shift > 256 {
        return bitcast<f32>(u32(shift) | 0x7fc00000u);
    }
    let half = shift / 2;
    return sum * power_of_two(-half) * power_of_two(half - shift);
}

fn nearest_half(x: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>((bitcast<vec4<u32>>(x) + vec4(0x1000u)) & vec4(0xffffe000u));
}
