//! Attention page by page against a two-pass softmax in f64, on every instruction set.
//!
//! Head dimensions and rows stand around register widths and block sizes, positions around page
//! borders. The bound of a result follows from that of its scores: a score that is off by d moves
//! every weight by a factor of up to `exp(d)`. Seeds are fixed.

mod random;

use flash_moe_kernels::{Gathered, Isa, KvRows, Queries};
use random::Random;

/// Sums of up to a few hundred products, in f32 in another order, relative to their magnitudes.
const SUM: f64 = 1e-6;
/// exp and the sums over positions, relative.
const WEIGHT: f64 = 4e-6;
const PAGE: usize = 64;

/// Queries, and the keys and values of one head.
struct Head {
    head_dim: usize,
    queries: Vec<f32>,   // [rows][head_dim]
    keys: Vec<f32>,      // [positions][head_dim]
    values: Vec<f32>,    // [positions][head_dim]
    visible: Vec<usize>, // [rows], of all positions
}

/// What rows have gathered, owned.
#[derive(Clone, PartialEq, Debug)]
struct State {
    max: Vec<f32>, // [rows]
    sum: Vec<f32>, // [rows]
    mix: Vec<f32>, // [rows][head_dim]
}

impl Head {
    fn random(head_dim: usize, visible: &[usize], seed: u64) -> Self {
        let positions = visible.iter().copied().max().unwrap_or(0);
        Self {
            head_dim,
            queries: floats(seed, visible.len() * head_dim),
            keys: floats(seed ^ 1, positions * head_dim),
            values: floats(seed ^ 2, positions * head_dim),
            visible: visible.to_vec(),
        }
    }

    /// The rows from `first` on, as many as `count`.
    fn attend(&self, isa: Isa, first: usize, count: usize) -> State {
        let d = self.head_dim;
        let (max, sum, mix) = (vec![9.0; count], vec![9.0; count], vec![9.0; count * d]);
        let mut state = State { max, sum, mix };
        let State { max, sum, mix } = &mut state;
        let mut gathered = Gathered { max, sum, mix };
        gathered.clear();
        let pages = self.keys.chunks(PAGE * d).zip(self.values.chunks(PAGE * d));
        for (page, (keys, values)) in pages.enumerate() {
            let positions = keys.len() / d;
            let seen = |n: &usize| n.saturating_sub(page * PAGE).min(positions);
            let visible: Vec<usize> = self.visible[first..first + count].iter().map(seen).collect();
            let rows = &self.queries[first * d..(first + count) * d];
            let mut scores = vec![f32::NAN; count * positions];
            let queries = Queries { rows, visible: &visible };
            isa.attend(&KvRows { keys, values }, &queries, &mut gathered, &mut scores);
        }
        state
    }

    /// The logarithm of the sum of exp(score) of a row, its mix, and the bound of both.
    fn expected(&self, row: usize) -> (f64, Vec<f64>, f64) {
        let d = self.head_dim;
        let query = &self.queries[row * d..][..d];
        let (mut scores, mut worst) = (Vec::new(), 0f64);
        for key in self.keys.chunks(d).take(self.visible[row]) {
            let products = || query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k));
            scores.push(products().sum::<f64>());
            worst = worst.max(products().map(f64::abs).sum());
        }
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut mix = vec![0.0; d];
        for (score, value) in scores.iter().zip(self.values.chunks(d)) {
            for (mix, value) in mix.iter_mut().zip(value) {
                *mix += (score - max).exp() / sum * f64::from(*value);
            }
        }
        (max + sum.ln(), mix, 2.0 * SUM * worst + WEIGHT)
    }

    fn check(&self, isa: Isa, label: &str) {
        let rows = self.visible.len();
        let state = self.attend(isa, 0, rows);
        let largest = self.values.iter().fold(0f32, |a, b| a.max(b.abs()));
        for row in 0..rows {
            let label = format!("{isa:?} {label}, row {row} of {rows}");
            let got = &state.mix[row * self.head_dim..][..self.head_dim];
            if self.visible[row] == 0 {
                assert_eq!((state.max[row], state.sum[row]), (f32::NEG_INFINITY, 0.0), "{label}");
                assert!(got.iter().all(|x| *x == 0.0), "{label}");
                continue;
            }
            let (logarithm, mix, bound) = self.expected(row);
            let (max, sum) = (f64::from(state.max[row]), f64::from(state.sum[row]));
            assert!(max.is_finite() && sum >= 0.999, "{label}: {max}, {sum}");
            let error = (max + sum.ln() - logarithm).abs();
            assert!(error <= bound, "{label}: logarithm off by {error:e}, bound {bound:e}");
            for (got, want) in got.iter().zip(mix) {
                let error = (f64::from(*got) / sum - want).abs();
                let bound = bound * f64::from(largest);
                assert!(error <= bound, "{label}: off by {error:e}, bound {bound:e}");
            }
        }
    }
}

#[test]
fn pages_add_up_to_a_softmax_over_all_positions() {
    for isa in Isa::available() {
        for head_dim in [1, 3, 4, 5, 8, 15, 16, 17, 31, 64, 72, 100, 128, 256] {
            for rows in [1, 2, 3, 4, 5, 8, 15, 16, 17, 33] {
                let last = [1, 2, 5, 63, 64, 65, 130, 200][(head_dim + rows) % 8];
                let visible: Vec<usize> = (0..rows).map(|r| last + r / 3).collect();
                let head = Head::random(head_dim, &visible, (head_dim * 100 + rows) as u64);
                head.check(isa, &format!("head of {head_dim}, {last} positions"));
            }
        }
    }
}

#[test]
fn every_number_of_positions_up_to_two_pages_is_right() {
    for isa in Isa::available() {
        for positions in 1..=2 * PAGE + 1 {
            let head = Head::random(40, &[positions; 5], positions as u64);
            head.check(isa, &format!("{positions} positions"));
        }
    }
}

#[test]
fn a_row_sees_its_positions_and_no_more() {
    for isa in Isa::available() {
        for visible in [
            vec![0, 0, 0, 1, 0, 0],
            vec![70, 1, 0, 64, 65, 3, 70, 63, 2],
            (0..40).collect(),
            (60..69).rev().collect(),
            vec![130, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        ] {
            let mut head = Head::random(48, &visible, 7);
            head.check(isa, &format!("{visible:?}"));
            // A position that a row does not see may hold anything finite.
            let state = head.attend(isa, 0, visible.len());
            let least = *visible.iter().min().expect("rows");
            head.keys[least * 48..].fill(3e18);
            head.values[least * 48..].fill(3e18);
            let other = head.attend(isa, 0, visible.len());
            for (row, _) in visible.iter().enumerate().filter(|(_, n)| **n == least) {
                assert_eq!(state.mix[row * 48..][..48], other.mix[row * 48..][..48], "{isa:?}");
                assert_eq!(state.sum[row].to_bits(), other.sum[row].to_bits(), "{isa:?}");
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    for isa in Isa::available() {
        for head_dim in [5, 64, 104] {
            let visible: Vec<usize> = (0..37).map(|r| 50 + r * 31 % 90).collect();
            let head = Head::random(head_dim, &visible, 8);
            let whole = head.attend(isa, 0, 37);
            for (first, count) in [(0, 1), (3, 2), (5, 16), (20, 17), (36, 1)] {
                let part = head.attend(isa, first, count);
                let mix = &whole.mix[first * head_dim..][..count * head_dim];
                assert_eq!(bits(&part.mix), bits(mix), "{isa:?} {count} rows from {first}");
                assert_eq!(bits(&part.sum), bits(&whole.sum[first..][..count]), "{isa:?}");
                assert_eq!(bits(&part.max), bits(&whole.max[first..][..count]), "{isa:?}");
            }
        }
    }
}

#[test]
fn large_scores_neither_overflow_nor_vanish() {
    for isa in Isa::available() {
        // One key a position whose score is the wanted one: 80 and -80 in turns, rising, falling.
        let shapes: [&dyn Fn(usize) -> f32; 5] = [
            &|p| if p % 2 == 0 { 80.0 } else { -80.0 },
            &|p| -80.0 + p as f32,
            &|p| 80.0 - p as f32,
            &|_| -80.0,
            &|p| if p == 129 { 3000.0 } else { -3000.0 },
        ];
        for (shape, score) in shapes.iter().enumerate() {
            let mut head = Head::random(16, &[130; 3], 9);
            head.queries.fill(0.0);
            head.queries.iter_mut().step_by(16).for_each(|q| *q = 1.0);
            for (position, key) in head.keys.chunks_mut(16).enumerate() {
                key[0] = score(position);
            }
            head.check(isa, &format!("scores {shape}"));
        }
        // The older page fades entirely, and then nothing of it is left.
        let mut head = Head::random(16, &[65], 10);
        head.queries.fill(1.0);
        head.keys.fill(-8.0);
        head.keys[64 * 16..].fill(8.0);
        let state = head.attend(isa, 0, 1);
        assert_eq!(state.mix, head.values[64 * 16..], "{isa:?}");
        assert_eq!((state.max[0], state.sum[0]), (128.0, 1.0), "{isa:?}");
    }
}

#[test]
fn what_is_not_finite_stays_visible() {
    for isa in Isa::available() {
        for at in [0, 17, 64] {
            let mut head = Head::random(16, &[65], 11);
            head.keys[at * 16 + 3] = f32::NAN;
            assert!(head.attend(isa, 0, 1).mix.iter().all(|x| x.is_nan()), "{isa:?} key {at}");
            let mut head = Head::random(16, &[65], 11);
            head.values[at * 16 + 3] = f32::NAN;
            assert!(head.attend(isa, 0, 1).mix[3].is_nan(), "{isa:?} value {at}");
        }
    }
}

#[test]
fn a_wrong_length_panics_before_any_variant_runs() {
    let x = floats(12, 64);
    let refused = |name: &str, rows: &[f32], page: (&[f32], &[f32]), lengths: [usize; 4]| {
        let [visible, max, mix, scores] = lengths;
        let call = std::panic::AssertUnwindSafe(|| {
            let (mut max, mut mix) = (vec![0.0; max], vec![0.0; mix]);
            let mut sum = max.clone();
            let mut gathered = Gathered { max: &mut max, sum: &mut sum, mix: &mut mix };
            let queries = Queries { rows, visible: &[visible; 2] };
            let page = KvRows { keys: page.0, values: page.1 };
            Isa::detect().attend(&page, &queries, &mut gathered, &mut vec![0.0; scores]);
        });
        assert!(std::panic::catch_unwind(call).is_err(), "{name}");
    };
    let page = (&x[..24], &x[..24]);
    refused("state", &x[..16], page, [3, 3, 16, 6]);
    refused("mix", &x[..16], page, [3, 2, 15, 6]);
    refused("queries", &x[..17], page, [3, 2, 17, 6]);
    refused("keys", &x[..16], (&x[..23], &x[..23]), [2, 2, 16, 4]);
    refused("values", &x[..16], (&x[..24], &x[..16]), [2, 2, 16, 6]);
    refused("scores", &x[..16], page, [3, 2, 16, 5]);
    refused("visible", &x[..16], page, [4, 2, 16, 6]);
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Numbers from -1 to 1.
fn floats(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}
