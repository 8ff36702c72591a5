// The product of a unit of 32 weights with a unit of the input, for each layout of weights. SOURCE_vec
// gives 16 bytes of the matrix's buffer, SOURCE_word 4: a buffer is bound as both, since to take a word out of
// 16 bytes costs more than to read it. Unit n of a matrix is columns 32 u .. of row r, n = r * units + u:
// units never straddle rows, and groups of 32, 64 or 128 never straddle units.
//
// Affine: q is set into the mantissa of 1.0, which makes 1 + q / 2^bits without a conversion; the ones
// add up to the sum of the input and are taken off at the end.

const ONE = vec4(0x3f800000u);

fn SOURCE_scale_bf16(at: u32) -> f32 {
    return bitcast<f32>((SOURCE_word(at >> 1u) << (16u * (~at & 1u))) & 0xffff0000u);
}

fn SOURCE_scale_f16(at: u32) -> f32 {
    return unpack2x16float(SOURCE_word(at >> 1u) >> (16u * (at & 1u))).x;
}

fn SOURCE_scale_f32(at: u32) -> f32 {
    return bitcast<f32>(SOURCE_word(at));
}

// scale * q + bias from the sum of (1 + q / 2^bits) x.
fn SOURCE_affine(sum: f32, steps: f32, input_sum: f32, scale: f32, bias: f32) -> f32 {
    return scale * steps * (sum - input_sum) + bias * input_sum;
}
