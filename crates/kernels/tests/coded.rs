//! Codes of keys and values, and attention on them, on every instruction set.
//!
//! What codes lose is held to the distortion of the optimal quantiser; what attention on them adds
//! is held to a softmax in f64 over the decoded page. Rows stand around register widths. Seeds are
//! fixed.

mod random;

use flash_moe_kernels::{
    CODED_POSITIONS, CodeBits, CodedPage, CodedQueries, CodedRows, CodedScratch, Gathered, Isa,
    NARROW_POSITIONS, NarrowPage, NarrowRows, Order, Queries, decode, encode, encode_int8,
    narrow_bf16, narrow_f16, rotate, rotate_back,
};
use random::Random;

const BITS: [CodeBits; 3] = [CodeBits::Two, CodeBits::Three, CodeBits::Four];

/// Numbers of a distribution near to the normal one: sums of twelve even ones.
fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut even = || (random.next() >> 40) as f32 / (1 << 24) as f32;
    (0..n).map(|_| (0..12).map(|_| even()).sum::<f32>() - 6.0).collect()
}

struct Encoded {
    bits: CodeBits,
    codes: Vec<u8>,
    scales: Vec<f32>,
    decoded: Vec<f32>, // [CODED_POSITIONS][head_dim]
}

impl Encoded {
    fn new(bits: CodeBits, order: Order, rows: &[f32]) -> Self {
        let head_dim = rows.len() / CODED_POSITIONS;
        let mut codes = vec![0; bits.page_bytes(head_dim)];
        let mut scales = vec![0.0; CODED_POSITIONS];
        encode(bits, order, rows, &mut codes, &mut scales);
        let mut decoded = vec![0.0; rows.len()];
        decode(&CodedRows { bits, codes: &codes, scales: &scales }, order, &mut decoded);
        Self { bits, codes, scales, decoded }
    }

    fn rows(&self) -> CodedRows<'_> {
        CodedRows { bits: self.bits, codes: &self.codes, scales: &self.scales }
    }
}

#[test]
fn a_rotation_keeps_inner_products_and_can_be_undone() {
    for width in [64, 128, 256] {
        let (a, b) = (normal(1, width), normal(2, width));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let (mut ra, mut rb) = (a.clone(), b.clone());
        rotate(&mut ra);
        rotate(&mut rb);
        assert!((dot(&a, &b) - dot(&ra, &rb)).abs() < 1e-4 * width as f32);
        assert!(dot(&a, &ra).abs() < 0.5 * dot(&a, &a), "it turns");
        rotate_back(&mut ra);
        assert!(a.iter().zip(&ra).all(|(a, b)| (a - b).abs() < 1e-5));
        // One large element becomes elements of one size.
        let mut single = vec![0.0; width];
        single[width / 3] = 8.0;
        rotate(&mut single);
        let size = 8.0 / (width as f32).sqrt();
        assert!(single.iter().all(|x| (x.abs() - size).abs() < 1e-5));
    }
}

#[test]
fn codes_lose_what_the_optimal_quantiser_loses() {
    // Mean squared errors of the optimal quantisers of a normal distribution (Max, 1960).
    for (bits, distortion) in BITS.into_iter().zip([0.1175, 0.034_54, 0.009_497]) {
        for order in [Order::Keys, Order::Values] {
            for width in [64, 128, 256] {
                let rows = normal(3, CODED_POSITIONS * width);
                let encoded = Encoded::new(bits, order, &rows);
                let pairs = || rows.iter().zip(&encoded.decoded);
                let error: f32 = pairs().map(|(x, y)| (x - y) * (x - y)).sum();
                let share = error / rows.iter().map(|x| x * x).sum::<f32>();
                let bound = distortion * 0.9..distortion * 1.03;
                assert!(bound.contains(&share), "{bits:?} {order:?} {width}: {share}");
            }
        }
    }
    let zero = Encoded::new(CodeBits::Two, Order::Keys, &[0.0; 64 * CODED_POSITIONS]);
    assert!(zero.decoded.iter().all(|x| *x == 0.0));
}

/// What rows have gathered.
#[derive(Clone, PartialEq, Debug)]
struct State {
    max: Vec<f32>,
    sum: Vec<f32>,
    mix: Vec<f32>,
}

/// Some coded pages and some rows, in one basis.
struct Case {
    width: usize,
    queries: Vec<f32>,
    pages: Vec<[Encoded; 2]>,
}

impl Case {
    fn new(bits: [CodeBits; 2], width: usize, rows: usize, pages: usize) -> Self {
        let page = |i: usize| {
            let rows = |seed: usize| normal((10 * i + seed) as u64, CODED_POSITIONS * width);
            [
                Encoded::new(bits[0], Order::Keys, &rows(5)),
                Encoded::new(bits[1], Order::Values, &rows(6)),
            ]
        };
        let mut queries = normal(7, rows * width);
        queries.iter_mut().for_each(|x| *x *= 2.0 / (width as f32).sqrt());
        Self { width, queries, pages: (0..pages).map(page).collect() }
    }

    /// The rows from `first` on, and the queries as integers stand for them.
    fn attend(&self, isa: Isa, first: usize, count: usize) -> (State, Vec<f32>) {
        let width = self.width;
        let mut state =
            State { max: vec![9.0; count], sum: vec![9.0; count], mix: vec![9.0; count * width] };
        let State { max, sum, mix } = &mut state;
        let mut gathered = Gathered { max, sum, mix };
        gathered.clear();
        let (mut codes, mut scales) = (vec![0; count * width], vec![0.0; count]);
        let mut sums = vec![0.0; count];
        let mut queries = CodedQueries { codes: &mut codes, scales: &mut scales, sums: &mut sums };
        isa.code_queries(&self.queries[first * width..][..count * width], &mut queries);
        let mut scores = vec![f32::NAN; count * CODED_POSITIONS];
        let mut weights = vec![0; 2 * count * CODED_POSITIONS];
        let (mut steps, mut tile) =
            (vec![0.0; 2 * count], vec![0; CodedScratch::tile_bytes(width)]);
        for [keys, values] in &self.pages {
            let mut scratch = CodedScratch {
                scores: &mut scores,
                weights: &mut weights,
                steps: &mut steps,
                tile: &mut tile,
            };
            let page = CodedPage { keys: keys.rows(), values: values.rows() };
            isa.attend_coded(&page, &queries, &mut gathered, &mut scratch);
        }
        let scaled = codes.iter().enumerate().map(|(i, code)| f32::from(*code) * scales[i / width]);
        (state, scaled.collect())
    }

    /// The logarithm of a row's sum of exp(score), and its mix, in f64.
    fn expected(&self, query: &[f32]) -> (f64, Vec<f64>) {
        let rows = |half: usize| {
            let decoded = self.pages.iter().map(move |page| &page[half].decoded);
            decoded.flat_map(|page| page.chunks(self.width))
        };
        let score = |key: &[f32]| {
            query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
        };
        let scores: Vec<f64> = rows(0).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut mix = vec![0.0; self.width];
        for (score, value) in scores.iter().zip(rows(1)) {
            for (mix, value) in mix.iter_mut().zip(value) {
                *mix += (score - max).exp() / sum * f64::from(*value);
            }
        }
        (max + sum.ln(), mix)
    }
}

#[test]
fn attention_on_codes_is_that_of_the_decoded_page() {
    for isa in Isa::available() {
        for (keys, values) in [(0, 0), (1, 1), (2, 2), (2, 0), (0, 1)] {
            for width in [64, 128, 256] {
                for rows in [1, 2, 3, 7, 8, 9, 17] {
                    let case = Case::new([BITS[keys], BITS[values]], width, rows, 3);
                    let (state, queries) = case.attend(isa, 0, rows);
                    for (row, query) in queries.chunks(width).enumerate() {
                        let label = format!("{isa:?} {keys} {values} {width}, row {row} of {rows}");
                        let original = &case.queries[row * width..][..width];
                        let largest = original.iter().fold(0f32, |a, b| a.max(b.abs()));
                        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= largest / 253.0;
                        assert!(original.iter().zip(query).all(near), "{label}: queries");
                        let (logarithm, mix) = case.expected(query);
                        let got = f64::from(state.max[row]) + f64::from(state.sum[row]).ln();
                        assert!((got - logarithm).abs() < 2e-5, "{label}: {got} for {logarithm}");
                        for (got, want) in state.mix[row * width..][..width].iter().zip(mix) {
                            let got = f64::from(*got) / f64::from(state.sum[row]);
                            assert!((got - want).abs() < 2e-4, "{label}: {got} for {want}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_on_codes_does_not_depend_on_the_rows_beside_it() {
    for isa in Isa::available() {
        let case = Case::new([CodeBits::Three, CodeBits::Two], 64, 21, 2);
        let whole = case.attend(isa, 0, 21).0;
        for (first, count) in [(0, 1), (3, 2), (5, 9), (20, 1)] {
            let part = case.attend(isa, first, count).0;
            let rows = first..first + count;
            assert_eq!(part.mix, whole.mix[first * 64..][..count * 64], "{isa:?} {rows:?}");
            assert_eq!(
                (&part.max[..], &part.sum[..]),
                (&whole.max[rows.clone()], &whole.sum[rows])
            );
        }
    }
}

#[test]
fn small_weights_beside_a_large_one_are_not_lost() {
    // One key answers the query, all others hold a hundredth of its weight: together a third.
    for isa in Isa::available() {
        let mut case = Case::new([CodeBits::Four, CodeBits::Four], 64, 1, 1);
        let mut keys = vec![0.0; CODED_POSITIONS * 64];
        keys[..64].fill(1.0);
        case.pages[0][0] = Encoded::new(CodeBits::Four, Order::Keys, &keys);
        case.queries.fill(100f32.ln() / 64.0);
        let (state, queries) = case.attend(isa, 0, 1);
        let (_, mix) = case.expected(&queries);
        for (got, want) in state.mix.iter().zip(mix) {
            assert!((f64::from(got / state.sum[0]) - want).abs() < 2e-4, "{isa:?}: {got} {want}");
        }
    }
}

#[test]
fn what_is_not_finite_stays_visible_on_codes() {
    for isa in Isa::available() {
        let case = || Case::new([CodeBits::Two, CodeBits::Two], 64, 3, 2);
        let mut bad = case();
        bad.queries[70] = f32::NAN;
        let state = bad.attend(isa, 0, 3).0;
        assert!(state.mix[64..128].iter().all(|x| x.is_nan()), "{isa:?}: query");
        assert!(state.mix[..64].iter().all(|x| x.is_finite()), "{isa:?}: another query");
        for half in [0, 1] {
            let mut bad = case();
            bad.pages[1][half].scales[17] = f32::NAN;
            let state = bad.attend(isa, 0, 3).0;
            assert!(state.mix.iter().all(|x| x.is_nan()), "{isa:?}: scale of {half}");
        }
    }
}

#[test]
fn attention_on_narrow_numbers_is_that_of_the_wide_ones() {
    for isa in Isa::available() {
        for (width, positions, rows) in [(64, 64, 8), (20, 37, 3), (256, 16, 17), (5, 1, 1)] {
            let [keys, values] = [1, 2].map(|seed| normal(seed, positions * width));
            let queries = normal(3, rows * width);
            let visible: Vec<usize> = (0..rows).map(|r| positions.saturating_sub(r)).collect();
            for format in 0..3 {
                let [keys, values] = [&keys, &values].map(|rows| Narrow::new(format, rows, width));
                let page = NarrowPage { keys: keys.rows(format), values: values.rows(format) };
                let run = |narrow: bool| {
                    let (mut max, mut mix) = (vec![0.0; rows], vec![0.0; rows * width]);
                    let mut sum = max.clone();
                    let mut gathered = Gathered { max: &mut max, sum: &mut sum, mix: &mut mix };
                    gathered.clear();
                    let mut scores = vec![0.0; rows * positions.max(NARROW_POSITIONS)];
                    let queries = Queries { rows: &queries, visible: &visible };
                    if narrow {
                        let mut wide = vec![0.0; 2 * NARROW_POSITIONS * width];
                        let scratch = (&mut wide[..], &mut scores[..]);
                        let mut here = vec![0; rows];
                        isa.attend_narrow(&page, &queries, &mut gathered, scratch, &mut here);
                    } else {
                        let mut wide = [(); 2].map(|()| vec![0.0; positions * width]);
                        Isa::scalar().widen_rows(&page.keys, width, &mut wide[0]);
                        Isa::scalar().widen_rows(&page.values, width, &mut wide[1]);
                        let [keys, values] = &wide;
                        let page = flash_moe_kernels::KvRows { keys, values };
                        let scores = &mut scores[..rows * positions];
                        isa.attend(&page, &queries, &mut gathered, scores);
                    }
                    mix.iter().enumerate().map(|(i, x)| x / sum[i / width]).collect::<Vec<f32>>()
                };
                for (got, want) in run(true).iter().zip(run(false)) {
                    let same = (got - want).abs() < 1e-5 || (got.is_nan() && want.is_nan());
                    assert!(same, "{isa:?} {width} {format}: {got} {want}");
                }
            }
        }
    }
}

/// A matrix in narrow numbers.
struct Narrow {
    bytes: Vec<u8>,
    codes: Vec<i8>,
    scales: Vec<f32>,
}

impl Narrow {
    fn new(format: usize, rows: &[f32], width: usize) -> Self {
        let (mut bytes, mut codes) = (vec![0; 2 * rows.len()], vec![0; rows.len()]);
        let mut scales = Vec::new();
        match format {
            0 => narrow_f16(rows, &mut bytes),
            1 => narrow_bf16(rows, &mut bytes),
            _ => {
                for (row, codes) in rows.chunks(width).zip(codes.chunks_mut(width)) {
                    scales.push(encode_int8(row, codes));
                }
                let exact = rows.iter().zip(&codes).enumerate().all(|(i, (x, code))| {
                    let scale = scales[i / width];
                    (x - scale * f32::from(*code)).abs() <= 0.5001 * scale
                });
                assert!(exact, "an element is off by more than half a scale");
            }
        }
        Self { bytes, codes, scales }
    }

    fn rows(&self, format: usize) -> NarrowRows<'_> {
        match format {
            0 => NarrowRows::F16(&self.bytes),
            1 => NarrowRows::Bf16(&self.bytes),
            _ => NarrowRows::Int8 { codes: &self.codes, scales: &self.scales },
        }
    }
}
