//! Dense matrices in every layout, times one vector and times many.
//!
//! Their rows fill no team and their vectors no tile, and what belongs to neither must stay as it was.

use super::super::dense::{Packing, Part, Segment};
use super::super::layout::BLOCK_MAX;
use super::super::source::{Give, Input, Rows, Tile};
use super::{
    Bench, Random, add, assert_close, by_team, precisions, product, rounding, shape, sigmoid, silu,
    size_of, stands, wide,
};
use crate::container::{Matrix, Precision};
use crate::shape::Shape;

/// Layouts of a kernel: a driver takes long to compile many.
const SOME: usize = 7;
/// Rows of the matrices in turn.
const ROWS: [usize; 5] = [1, 7, 33, 65, 130];

/// The matrices with where their outputs begin, one behind the other, for so many tokens.
fn places(matrices: &[Matrix], tokens: usize) -> Vec<usize> {
    let mut at = 0;
    let of = |matrix: &Matrix| {
        at += tokens * matrix.row_count();
        at - tokens * matrix.row_count()
    };
    matrices.iter().map(of).collect()
}

/// The matrices packed, their outputs from a part of the scratch on.
fn pack(bench: &Bench, matrices: &[Matrix], name: &str, vector: &[f32], rows: usize) -> Vec<Part> {
    let packing = Packing {
        precisions: &bench.sources.precisions,
        buffer_bytes: 128 << 20,
        views: &bench.stand.views,
    };
    let (first, tokens) = (bench.layout.at(name), bench.layout.tokens());
    let [one, many] = [1, tokens].map(|tokens| places(matrices, tokens));
    let segments: Vec<Segment> = (matrices.iter().zip(one.iter().zip(many)))
        .map(|(matrix, (to, many))| Segment { matrix, to: first + to, chunk_to: first + many })
        .collect();
    packing.pack(&bench.stand.device, "test", &segments, vector, rows).expect("memory")
}

fn by_vector(
    bench: &Bench,
    input: Input,
    give: Give,
    cols: usize,
    (parts, rows): (&[Part], usize),
) {
    let source = bench.sources.by_vector(input, give, cols, rows);
    let groups: Vec<_> = parts.iter().map(|part| [&part.group]).collect();
    let runs: Vec<_> = (groups.iter().zip(parts))
        .map(|(groups, part)| (&groups[..], [part.workgroups as usize, 1, 1]))
        .collect();
    bench.run(&source, &[&bench.stand.views.read], &runs);
}

/// What the matrices give for a vector.
fn expected(matrices: &[Matrix], x: &[f64]) -> Vec<f64> {
    matrices.iter().flat_map(|matrix| product(matrix, x)).collect()
}

fn matrices(random: &mut Random, precisions: &[Precision], cols: usize) -> Vec<Matrix> {
    let rows = ROWS.iter().cycle();
    precisions.iter().zip(rows).map(|(p, rows)| random.matrix(*p, *rows, cols)).collect()
}

/// A shape whose attention's mix is so long.
fn mixing(cols: usize) -> Shape {
    let mut shape = shape();
    (shape.attention.heads, shape.attention.head_dim) = (cols / 32, 32);
    shape
}

#[test]
fn a_vector_meets_every_layout_of_weights() {
    let cols = 384;
    let mut shape = mixing(cols);
    shape.vocab = 1000;
    let mut random = Random(1);
    for (some, rows) in precisions().chunks(SOME).zip([1, 2, 4]) {
        let (matrices, x) = (matrices(&mut random, some, cols), random.vector(cols));
        let want = expected(&matrices, &wide(&x));
        let bound = rounding(by_team(cols), size_of(&wide(&x)));
        for stand in stands() {
            let bench = Bench::new(&stand, &shape, some, 1);
            bench.put("MIXED_AT", &x);
            let parts = pack(&bench, &matrices, "LOGITS_AT", &[], rows);
            by_vector(&bench, Input::Plain, Give::Store, cols, (&parts, rows));
            assert_close("mat_vec", &bench.get("LOGITS_AT", want.len()), &want, bound);
        }
    }
}

#[test]
fn a_vector_longer_than_workgroup_memory_is_taken_in_blocks() {
    let cols = BLOCK_MAX + 1152;
    let shape = Shape { vocab: 1000, ..mixing(cols) };
    let some = [Precision::Bf16, precisions()[10], precisions()[16]];
    let mut random = Random(2);
    let (matrices, x) = (matrices(&mut random, &some, cols), random.vector(cols));
    let mut want = expected(&matrices, &wide(&x));
    let before = random.vector(want.len());
    add(&mut want, &wide(&before));
    let bound = rounding(by_team(cols), size_of(&wide(&x)));
    for stand in stands() {
        let bench = Bench::new(&stand, &shape, &some, 1);
        bench.put("MIXED_AT", &x);
        bench.put("LOGITS_AT", &before);
        let parts = pack(&bench, &matrices, "LOGITS_AT", &[], 2);
        by_vector(&bench, Input::Plain, Give::Add, cols, (&parts, 2));
        assert_close("mat_vec", &bench.get("LOGITS_AT", want.len()), &want, bound);
    }
}

/// The residual stream of one token, normed.
fn normed(h: &[f32], weights: &[f32], eps: f32) -> Vec<f64> {
    let squares: f64 = wide(h).iter().map(|h| h * h).sum();
    let root = (squares / h.len() as f64 + f64::from(eps)).sqrt();
    h.iter().zip(weights).map(|(h, w)| f64::from(*h) * f64::from(*w) / root).collect()
}

#[test]
fn a_vector_is_normed_or_gated_on_its_way_in() {
    let mut shape = shape();
    (shape.dense_width, shape.vocab) = (160, 4000);
    let d = shape.delta.clone().expect("a delta-net");
    let mut random = Random(3);
    let (h, weights) = (random.vector(shape.hidden), random.vector(shape.hidden));
    let (mixed, z) = (random.vector(d.value_width()), random.vector(d.value_width()));
    let (gate, up) = (random.vector(160), random.vector(160));
    let squares: Vec<f32> = mixed.chunks(32).map(|x| x.iter().map(|x| x * x).sum()).collect();
    let heads: Vec<f64> = (mixed.chunks(d.value_dim).zip(z.chunks(d.value_dim)))
        .flat_map(|(mixed, z)| {
            let normed = normed(mixed, &weights[..d.value_dim], shape.rms_eps);
            let gated = normed.into_iter().zip(z).map(|(x, z)| x * silu(f64::from(*z)));
            gated.collect::<Vec<f64>>()
        })
        .collect();
    let gated = gate.iter().zip(&up).map(|(g, u)| silu(f64::from(*g)) * f64::from(*u)).collect();
    let normed = normed(&h, &weights, shape.rms_eps);
    let cases = [
        (Input::Norm, normed.clone(), &weights[..]),
        (Input::KeptNorm, normed.clone(), &weights[..]),
        (Input::Heads, heads, &weights[..d.value_dim]),
        (Input::Gated, gated, &[][..]),
    ];
    for stand in stands() {
        let bench = Bench::new(&stand, &shape, &[Precision::F32], 1);
        for (name, values) in [
            ("H_AT", &h),
            ("MIXED_AT", &mixed),
            ("SQUARES_AT", &squares),
            ("Z_AT", &z),
            ("GATE_AT", &gate),
            ("UP_AT", &up),
        ] {
            bench.put(name, values);
        }
        for (input, x, vector) in &cases {
            let matrix = [random.matrix(Precision::F32, 37, x.len())];
            let parts = pack(&bench, &matrix, "LOGITS_AT", vector, 2);
            by_vector(&bench, *input, Give::Store, x.len(), (&parts, 2));
            // The norm, the exponential and the gate are another 24.
            let bound = rounding(by_team(x.len()) + 24, size_of(x));
            let got = bench.get("LOGITS_AT", 37);
            assert_close(&format!("{input:?}"), &got, &expected(&matrix, x), bound);
        }
        // Kept for the experts in the order of the staged input.
        let kept = bench.get("NORMED_AT", shape.hidden);
        let of = |at: usize| (at & !31) + ((at >> 2) & 7) + 8 * (at & 3);
        let want: Vec<f64> = (0..shape.hidden).map(|at| normed[of(at)]).collect();
        assert_close("kept", &kept, &want, rounding(24, 4.0));
    }
}

/// Runs a product of many vectors on the packed matrices.
fn by_rows(bench: &Bench, rows: Rows, give: Give, cols: usize, parts: &[Part], tokens: usize) {
    bench.put_numbers("TOKEN_AT", &[0, tokens]);
    bench.split(rows, cols, tokens);
    let tile = if tokens == 33 { Tile::Short } else { Tile::Tall };
    let source = bench.sources.by_rows(rows, give, cols, tile);
    let groups: Vec<_> = parts.iter().map(|part| [&part.group]).collect();
    let runs: Vec<_> = (groups.iter().zip(parts))
        .map(|(groups, part)| {
            (&groups[..], [part.tiles as usize, tokens.div_ceil(tile.vectors()), 1])
        })
        .collect();
    bench.run(&source, &[&bench.stand.views.read], &runs);
}

/// What the matrices give for each row of `xs [tokens][cols]`, matrix after matrix, where the outputs of
/// a matrix lie `[rows_of_scratch][rows]`; `f64::NAN` where there is no token.
fn expected_rows(matrices: &[Matrix], xs: &[f64], cols: usize, tokens_most: usize) -> Vec<f64> {
    let mut all = Vec::new();
    for matrix in matrices {
        let from = all.len();
        xs.chunks(cols).for_each(|x| all.extend(product(matrix, x)));
        all.resize(from + tokens_most * matrix.row_count(), f64::NAN);
    }
    all
}

/// Compares, and sees that what belongs to no token was left as it was.
fn assert_rows(what: &str, got: &[f32], before: &[f32], want: &[f64], bound: f64) {
    for (i, ((got, before), want)) in got.iter().zip(before).zip(want).enumerate() {
        match want.is_nan() {
            true => assert!(got == before, "{what}: wrote beyond its tokens, {i}"),
            false => assert_close(&format!("{what}, {i}"), &[*got], &[*want], bound),
        }
    }
}

#[test]
fn many_vectors_meet_every_layout_of_weights() {
    let cols = 256;
    let mut shape = mixing(cols);
    let (most, mut random) = (66, Random(4));
    // Tiles of 64, of 16, of 64.
    for (some, tokens) in precisions().chunks(SOME).zip([1, 33, 65]) {
        let matrices = matrices(&mut random, some, cols);
        let rows: usize = matrices.iter().map(Matrix::row_count).sum();
        (shape.moe.top_k, shape.hidden) = (1, rows);
        let (xs, before) = (random.vector(tokens * cols), vec![9.0; most * rows]);
        let want = expected_rows(&matrices, &wide(&xs), cols, most);
        let bound = rounding(cols / 4 + 8, 3.5 * cols as f64);
        for stand in stands() {
            let bench = Bench::new(&stand, &shape, some, most);
            let parts = pack(&bench, &matrices, "OUTPUT_AT", &[], 1);
            bench.put("MIXED_AT", &xs);
            bench.put("OUTPUT_AT", &before);
            by_rows(&bench, Rows::Mixed, Give::Store, cols, &parts, tokens);
            let got = bench.get("OUTPUT_AT", most * rows);
            assert_rows(&format!("gemm of {tokens}"), &got, &before, &want, bound);
        }
    }
}

#[test]
fn rows_are_gated_or_weighted_on_their_way_in() {
    let mut shape = shape();
    (shape.dense_width, shape.moe.shared_width) = (160, 64);
    (shape.moe.top_k, shape.hidden) = (1, 96);
    let (most, tokens, mut random) = (40, 33, Random(5));
    let [gate, up] = [0, 1].map(|_| random.vector(tokens * 160));
    let [shared_gate, shared_up] = [0, 1].map(|_| random.vector(tokens * 64));
    let (sigmoids, h) = (random.vector(tokens), random.vector(tokens * 96));
    let product = |(g, u): (&f32, &f32)| -> f64 { silu(f64::from(*g)) * f64::from(*u) };
    let gated: Vec<f64> = gate.iter().zip(&up).map(product).collect();
    let shared: Vec<f64> = (shared_gate.iter().zip(&shared_up).map(product).enumerate())
        .map(|(i, x)| x * sigmoid(f64::from(sigmoids[i / 64])))
        .collect();
    let before = random.vector(most * 50);
    for stand in stands() {
        let bench = Bench::new(&stand, &shape, &[Precision::F32], most);
        for (name, values) in [
            ("GATE_AT", &gate),
            ("UP_AT", &up),
            ("SHARED_GATE_AT", &shared_gate),
            ("SHARED_UP_AT", &shared_up),
            ("SHARED_SIGMOID_AT", &sigmoids),
            ("NORMED_AT", &h),
        ] {
            bench.put(name, values);
        }
        for (rows, cols, xs) in
            [(Rows::Gated, 160, &gated), (Rows::Shared, 64, &shared), (Rows::Normed, 96, &wide(&h))]
        {
            let matrix = [random.matrix(Precision::F32, 50, cols)];
            let parts = pack(&bench, &matrix, "OUTPUT_AT", &[], 1);
            bench.put("OUTPUT_AT", &before);
            by_rows(&bench, rows, Give::Add, cols, &parts, tokens);
            let mut want = expected_rows(&matrix, xs, cols, most);
            add(&mut want, &wide(&before));
            let bound = rounding(cols / 4 + 24, 1.0 + cols as f64);
            let got = bench.get("OUTPUT_AT", before.len());
            assert_rows(&format!("{rows:?}"), &got, &before, &want, bound);
        }
    }
}
