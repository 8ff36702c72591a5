//! Layouts, the quantiser against the goldens of the reference, and the narrow floats.
//!
//! The goldens come from `goldens/quantise.py`; the rows are made here again from integers, so only
//! hashes of the outputs are stored.

mod random;

use flash_moe_kernels::{
    Format, Isa, LayoutError, Rows, ScaleType, bf16_to_f32, e4m3_to_f32, f16_to_f32, f32_to_bf16,
    f32_to_f16, narrow_bf16, narrow_f16, quantise_row, widen_bf16, widen_e4m3, widen_f16,
};
use random::Random;

const COLS: usize = 512;
const BITS: [u8; 6] = [2, 3, 4, 5, 6, 8];
const GROUPS: [u16; 3] = [32, 64, 128];
const KINDS: [&str; 9] =
    ["normal", "small", "positive", "negative", "zero", "constant", "tiny", "outlier", "symmetric"];

#[test]
fn quantised_rows_have_the_bits_of_the_reference() {
    let goldens = include_str!("goldens/quantise.txt");
    let mut seen = 0;
    for line in goldens.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (Some(kind), [_, bits, group, golden]) =
            (KINDS.iter().find(|k| **k == fields[0]), &fields[..])
        else {
            continue;
        };
        let row = quantised(&golden_row(kind), bits.parse().unwrap(), group.parse().unwrap());
        let hash = [&row.weight, &row.scale_bytes(), &row.bias_bytes()]
            .into_iter()
            .flatten()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
            });
        assert_eq!(format!("{hash:016x}"), *golden, "{kind} {bits} bits group {group}");
        seen += 1;
    }
    assert_eq!(seen, KINDS.len() * BITS.len() * GROUPS.len());
}

#[test]
fn the_golden_written_in_full_is_reproduced() {
    let row = quantised(&golden_row("normal"), 3, 128);
    let parts = [
        ("weight", row.weight.clone()),
        ("scales", row.scale_bytes()),
        ("biases", row.bias_bytes()),
    ];
    for (part, bytes) in parts {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let line = format!("{part} normal 3 128 {hex}");
        assert!(include_str!("goldens/quantise.txt").lines().any(|l| l == line), "{line}");
    }
}

#[test]
fn packed_integers_come_back_in_every_width() {
    for bits in BITS {
        for group in GROUPS {
            // One group that spans exactly [0, largest] keeps integers as they are: scale -1 and
            // bias `largest`, hence q = largest - value.
            let largest = u32::from(u8::MAX >> (8 - bits));
            let mut random = Random::new(u64::from(bits) * 1000 + u64::from(group));
            let mut values: Vec<f32> =
                (0..COLS).map(|_| (random.next() % u64::from(largest + 1)) as f32).collect();
            for group in values.chunks_exact_mut(usize::from(group)) {
                group[0] = 0.0;
                group[1] = largest as f32;
            }
            let row = quantised(&values, bits, group);
            let (scales, biases) = (row.scale_bytes(), row.bias_bytes());
            let format = Format::Affine { bits, group, scales: ScaleType::Bf16 };
            let rows = Rows::new(format, 1, COLS, &row.weight, &scales, &biases).unwrap();
            let mut back = vec![0.0; COLS];
            Isa::scalar().unpack_row(&rows, 0, &mut back);
            assert_eq!(back, values, "{bits} bits group {group}");
            // The stream itself, read one bit at a time.
            for (k, value) in values.iter().enumerate() {
                let bit = |b: usize| u32::from(row.weight[b / 8]) >> (b % 8) & 1;
                let width = usize::from(bits);
                let q: u32 = (0..width).map(|b| bit(k * width + b) << b).sum();
                assert_eq!(q, largest - *value as u32, "{bits} bits, element {k}");
            }
        }
    }
}

#[test]
fn a_wrong_shape_is_named() {
    let affine = |bits, group| Format::Affine { bits, group, scales: ScaleType::Bf16 };
    let new = |format, rows, cols, lengths: [usize; 3]| {
        let bytes = [0; 1024];
        let [w, s, b] = lengths.map(|len| &bytes[..len]);
        Rows::new(format, rows, cols, w, s, b).err()
    };
    let length = |part, expected, actual| Some(LayoutError::Length { part, expected, actual });
    assert_eq!(new(affine(4, 64), 2, 64, [64, 4, 4]), None);
    assert_eq!(new(affine(4, 64), 0, 64, [0, 0, 0]), None);
    assert_eq!(new(affine(7, 64), 2, 64, [64, 4, 4]), Some(LayoutError::Bits(7)));
    assert_eq!(new(affine(0, 64), 2, 64, [64, 4, 4]), Some(LayoutError::Bits(0)));
    assert_eq!(new(affine(4, 0), 2, 64, [64, 4, 4]), Some(LayoutError::Group(0)));
    assert_eq!(
        new(affine(4, 64), 2, 96, [96, 4, 4]),
        Some(LayoutError::Cols { cols: 96, group: 64 })
    );
    assert_eq!(new(affine(4, 64), 2, 64, [63, 4, 4]), length("weight", Some(64), 63));
    assert_eq!(new(affine(4, 64), 2, 64, [64, 2, 4]), length("scales", Some(4), 2));
    assert_eq!(new(affine(4, 64), 2, 64, [64, 4, 6]), length("biases", Some(4), 6));
    assert_eq!(new(Format::Bf16, 2, 3, [12, 2, 0]), length("scales", Some(0), 2));
    assert_eq!(new(Format::F32, usize::MAX, 3, [12, 0, 0]), length("weight", None, 12));
    assert_eq!(new(Format::F32, 1, usize::MAX, [12, 0, 0]), length("weight", None, 12));
}

#[test]
fn an_expert_of_the_397b_has_its_known_size() {
    let format = Format::Affine { bits: 4, group: 64, scales: ScaleType::Bf16 };
    assert_eq!(format.row_bytes(4096), 2048);
    assert_eq!(format.scale_row_bytes(4096), 128);
    let expert = 2 * format.matrix_bytes(1024, 4096) + format.matrix_bytes(4096, 1024);
    assert_eq!(expert, 7_077_888);
}

#[test]
fn e4m3_is_the_formula_at_all_256() {
    let bytes: Vec<u8> = (0..=255).collect();
    let mut wide = vec![0.0; 256];
    widen_e4m3(&bytes, &mut wide);
    for (byte, wide) in bytes.into_iter().zip(wide) {
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
        let magnitude = match exponent {
            0 => mantissa / 8.0 * 2f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        };
        let expected = if byte & 0x80 == 0 { magnitude } else { -magnitude } as f32;
        if byte & 0x7f == 0x7f {
            assert!(wide.is_nan() && e4m3_to_f32(byte).is_nan(), "{byte:#04x}");
        } else {
            assert_eq!(wide.to_bits(), expected.to_bits(), "{byte:#04x}");
            assert_eq!(e4m3_to_f32(byte).to_bits(), expected.to_bits(), "{byte:#04x}");
        }
    }
    assert_eq!(e4m3_to_f32(0x7e), 448.0);
}

#[test]
fn bf16_rounds_to_the_nearest_with_ties_to_even() {
    let rounded = |bits: u32| f32_to_bf16(f32::from_bits(bits));
    assert_eq!(rounded(0x3f80_8000), 0x3f80, "tie, even below");
    assert_eq!(rounded(0x3f81_8000), 0x3f82, "tie, even above");
    assert_eq!(rounded(0x3f80_8001), 0x3f81);
    assert_eq!(rounded(0x3f80_7fff), 0x3f80);
    assert_eq!(rounded(0x7f7f_ffff), 0x7f80, "the largest f32 becomes infinity");
    assert_eq!(rounded(0xff80_0000), 0xff80);
    assert_eq!(rounded(0x8000_0001), 0x8000);
    assert!(bf16_to_f32(rounded(0x7f80_0001)).is_nan(), "a payload below the cut");
    assert!(bf16_to_f32(rounded(0xffff_ffff)).is_nan());
    for bits in 0..=u16::MAX {
        if !bf16_to_f32(bits).is_nan() {
            assert_eq!(f32_to_bf16(bf16_to_f32(bits)), bits);
        }
    }
}

#[test]
fn slices_of_narrow_floats_are_their_elements() {
    let values: Vec<f32> = (0..77).map(|i| (i as f32 - 31.7) * 1.37f32.powi(i % 9)).collect();
    let (mut bytes, mut back) = (vec![0; 154], vec![0.0; 77]);
    narrow_bf16(&values, &mut bytes);
    widen_bf16(&bytes, &mut back);
    let each: Vec<f32> = values.iter().map(|&x| bf16_to_f32(f32_to_bf16(x))).collect();
    assert_eq!(back, each);
    narrow_f16(&values, &mut bytes);
    widen_f16(&bytes, &mut back);
    let each: Vec<f32> = values.iter().map(|&x| f16_to_f32(f32_to_f16(x))).collect();
    assert_eq!(back, each);
    assert_eq!(f16_to_f32(0x3c00), 1.0);
    assert_eq!(f16_to_f32(0x0001), 2f32.powi(-24));
    assert_eq!(f32_to_f16(65520.0), 0x7c00);
}

struct Quantised {
    weight: Vec<u8>,
    scales: Vec<u16>,
    biases: Vec<u16>,
}

impl Quantised {
    fn scale_bytes(&self) -> Vec<u8> {
        self.scales.iter().flat_map(|s| s.to_le_bytes()).collect()
    }

    fn bias_bytes(&self) -> Vec<u8> {
        self.biases.iter().flat_map(|s| s.to_le_bytes()).collect()
    }
}

fn quantised(x: &[f32], bits: u8, group: u16) -> Quantised {
    let groups = x.len() / usize::from(group);
    let mut out = Quantised {
        weight: vec![0xaa; x.len() * usize::from(bits) / 8],
        scales: vec![0; groups],
        biases: vec![0; groups],
    };
    quantise_row(x, bits, group, &mut out.weight, &mut out.scales, &mut out.biases);
    out
}

/// The row that `goldens/quantise.py` makes for this kind.
fn golden_row(kind: &str) -> Vec<f32> {
    let seed = KINDS.iter().position(|k| *k == kind).unwrap();
    let mut random = Random::new(seed as u64);
    let value = |k: usize| {
        let r = random.next();
        let fields = [0, 16, 32, 48].map(|shift| (r >> shift & 0xffff) as f64);
        let normal = (fields.iter().sum::<f64>() - 131_070.0) / 65536.0;
        let value = match kind {
            "normal" => normal,
            "small" => normal / 1024.0,
            "positive" => (fields[0] + 32768.0) / 65536.0,
            "negative" => -(fields[0] + 32768.0) / 65536.0,
            "zero" => 0.0,
            "constant" => 0.3125,
            "tiny" => normal / f64::from(1 << 27),
            "outlier" if fields[3] < 1024.0 => normal * 32.0,
            "outlier" => normal / 64.0,
            "symmetric" => (k as f64 - 256.0) / 256.0,
            _ => unreachable!(),
        };
        value as f32
    };
    (0..COLS).map(value).collect()
}
