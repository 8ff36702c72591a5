//! Products whose f32 factors are two halves each: how near they are, and rows of any size.
//!
//! A factor is h + l, h its nearest number of 11 bits and l the half nearest to the rest. With u = 2^-11
//! the rest is u of the factor at most and l is u of the rest apart from it, so that each factor is u^2
//! apart from its halves; the product of two rests that is left out is u^2 again. That is 3 u^2 = 12 * 2^-24
//! of |w x|, and where a factor is smaller than 2^-17 of its row's largest, half of the smallest half, 2^-25
//! of 2^14, of that largest one.

use half::f16;

use super::super::dense::{Packing, Segment};
use super::super::source::{Give, Rows, Tile};
use super::{Bench, Random, Rounded, assert_close, rounding, shape, stands};
use crate::container::{Matrix, Precision, ScaleKind};
use crate::memory::Block;

const COLS: usize = 96;

/// A factor as two halves, as the shaders make them of one that is shifted already.
fn halves(x: f32) -> [f64; 2] {
    let high = f32::from_bits((x.to_bits() + 0x1000) & 0xffff_e000);
    [high, x - high].map(|part| f16::from_f32(part).to_f64())
}

#[test]
fn a_product_of_halves_is_as_near_as_twelve_roundings() {
    let mut random = Random(61);
    let mut worst = 0f64;
    for i in 0..100_000 {
        // The largest and the smallest fractions and what rounds up to a power of two are among them.
        let factor = |random: &mut Random| match i % 4 {
            0 => f32::from_bits(0x4680_0000 | (random.bits() as u32 & 0x7f_ffff)),
            1 => 32767.998,
            2 => f32::from_bits(0x4680_0fff),
            _ => random.number() * 16384.0,
        };
        let [w, x] = [0, 1].map(|_| factor(&mut random));
        let ([wh, wl], [xh, xl]) = (halves(w), halves(x));
        let product = f64::from(w) * f64::from(x);
        let error = (wh * xh + wh * xl + wl * xh - product).abs();
        let floor = 2f64.powi(-25) * 32768.0 * 2.0;
        assert!(error <= rounding(12, product.abs()) + floor, "{w} by {x}: {error:e}");
        worst = worst.max(error / rounding(12, product.abs()));
    }
    assert!(worst > 0.1, "the bound is far from what there is: {worst}");
}

/// A matrix of f32 from its rows.
fn matrix(rows: &[Vec<f32>]) -> Matrix {
    let mut block = Block::zeroed(rows.len() * COLS * 4);
    block.bytes_mut().copy_from_slice(bytemuck::cast_slice(&rows.concat()));
    let parts = [block, Block::zeroed(0), Block::zeroed(0)];
    Matrix::new(Precision::F32, rows.len(), COLS, parts).expect("lengths of the format")
}

/// What a product with many vectors gives for each of them.
fn products(bench: &Bench, matrix: &Matrix, vectors: &[Vec<f32>], tile: Tile) -> Vec<Vec<f32>> {
    let (stand, tokens) = (bench.stand, vectors.len());
    bench.put("NORMED_AT", &vectors.concat());
    bench.put_numbers("TOKEN_AT", &[0, tokens]);
    bench.split(Rows::Normed, COLS, tokens);
    let packing = Packing {
        precisions: &bench.sources.precisions,
        buffer_bytes: 1 << 20,
        views: &stand.views,
    };
    let segments = [Segment { matrix, to: 0, chunk_to: bench.layout.at("OUTPUT_AT") }];
    let part = &packing.pack(&stand.device, "test", &segments, &[], 1).expect("memory")[0];
    let source = bench.sources.by_rows(Rows::Normed, Give::Store, COLS, tile);
    let counts = [part.tiles as usize, tokens.div_ceil(tile.vectors()), 1];
    bench.run(&source, &[&stand.views.read], &[(&[&part.group], counts)]);
    let rows = matrix.row_count();
    bench.get("OUTPUT_AT", tokens * rows).chunks(rows).map(<[f32]>::to_vec).collect()
}

fn scaled(random: &mut Random, exponents: &[i32]) -> Vec<Vec<f32>> {
    let row = |e: &i32| random.vector(COLS).iter().map(|x| x * 2f32.powi(*e)).collect();
    exponents.iter().map(row).collect()
}

#[test]
fn rows_keep_their_precision_whatever_their_size() {
    let mut shape = shape();
    (shape.hidden, shape.moe.top_k) = (COLS, 1);
    let mut random = Random(62);
    let weights = scaled(&mut random, &[0, -100, -60, -17, 5, 60, 100, 126]);
    let mut vectors = scaled(&mut random, &[0, -100, -40, -15, 14, 20, 110]);
    vectors.push(vec![0.0; COLS]);
    // One large number beside small ones, in both.
    vectors.push((0..COLS).map(|i| if i == 7 { 3e4 } else { random.number() }).collect());
    let matrix = matrix(&weights);
    for stand in stands() {
        let bench = Bench::new(&stand, &shape, &[Precision::F32], 40);
        for tile in [Tile::Short, Tile::Tall] {
            let got = products(&bench, &matrix, &vectors, tile);
            for (x, got) in vectors.iter().zip(&got) {
                let want = Rounded::exact(x).times(&matrix, (COLS / 4 + 12, 0.0));
                for (r, (want, error)) in want.values.iter().zip(&want.errors).enumerate() {
                    // Beyond f32 on either side anything near the end will do.
                    let in_range = (1e-30..1e38).contains(&(error * 1e5));
                    if in_range || *want == 0.0 {
                        let what = format!("{:?}, {tile:?}, row {r}", stand.tensor);
                        assert_close(&what, &[got[r]], &[*want], *error);
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_never_becomes_one() {
    let mut shape = shape();
    (shape.hidden, shape.moe.top_k) = (COLS, 1);
    let mut random = Random(63);
    let [mut weights, mut vectors] = [0, 1].map(|_| scaled(&mut random, &[0; 5]));
    let wrong = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0xffff_ffff)];
    for (i, wrong) in wrong.into_iter().enumerate() {
        weights[i][13 * i + 2] = wrong;
        vectors[i][11 * i + 31] = wrong;
    }
    let matrix = matrix(&weights);
    for stand in stands() {
        let bench = Bench::new(&stand, &shape, &[Precision::F32], 40);
        for tile in [Tile::Short, Tile::Tall] {
            let got = products(&bench, &matrix, &vectors, tile);
            for (t, got) in got.iter().enumerate() {
                for (r, got) in got.iter().enumerate() {
                    assert_eq!(got.is_finite(), t == 4 && r == 4, "{tile:?}, {t} by {r}: {got}");
                }
            }
        }
    }
}

#[test]
fn scales_that_are_no_number_spoil_their_row_alone() {
    let mut shape = shape();
    (shape.hidden, shape.moe.top_k) = (COLS, 1);
    let precision = Precision::Affine { bits: 4, group: 32, scales: ScaleKind::F32 };
    let mut random = Random(64);
    let mut parts = [4 * COLS / 2, 12 * 4, 12 * 4].map(Block::zeroed);
    parts[0].bytes_mut().iter_mut().for_each(|byte| *byte = random.bits() as u8);
    // Row after row: an infinite scale, a bias that is no number, denormal ones, all zero.
    let mut scales = [0.5f32; 12];
    let mut biases = [-1f32; 12];
    (scales[1], biases[5]) = (f32::INFINITY, f32::NAN);
    scales[6..9].fill(f32::from_bits(3));
    biases[6..9].fill(f32::from_bits(0x8000_0001));
    scales[9..].fill(0.0);
    biases[9..].fill(0.0);
    parts[1].bytes_mut().copy_from_slice(bytemuck::cast_slice(&scales));
    parts[2].bytes_mut().copy_from_slice(bytemuck::cast_slice(&biases));
    let matrix = Matrix::new(precision, 4, COLS, parts).expect("lengths of the format");
    let vectors = [random.vector(COLS)];
    for stand in stands() {
        let bench = Bench::new(&stand, &shape, &[precision], 40);
        let got = products(&bench, &matrix, &vectors, Tile::Short).concat();
        assert!(!got[0].is_finite() && !got[1].is_finite(), "{got:?}");
        assert!(got[2].abs() < 1e-36 && got[3] == 0.0, "{got:?}");
    }
}
