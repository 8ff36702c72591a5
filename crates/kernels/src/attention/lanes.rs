//! Attention over a page, written once over the registers of an instruction set.
//!
//! Owns the loops. Beside the primitives of `crate::lanes` a variant file owns `sum_each` (the sums
//! of as many registers as there are lanes, as one register), `SCORE_ROWS` (rows of one block of
//! scores) and `MIX_LANES` (registers of one strip of values). A macro for the reason given in
//! `crate::lanes`.
//!
//! Blocks at an edge repeat their last row or position: the same sums are formed and stored twice,
//! and no element depends on where in a block it stands.

/// Expands to `attend` of `scalar.rs` with these CPU features.
macro_rules! attention_operations {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        pub(crate) fn attend(
            page: &KvRows,
            queries: &Queries,
            gathered: &mut Gathered,
            scores: &mut [f32],
        ) {
            let rows = queries.visible.len();
            let head_dim = queries.rows.len() / rows;
            let positions = page.keys.len() / head_dim;
            for first in (0..rows).step_by(PANEL_ROWS) {
                let panel = first..rows.min(first + PANEL_ROWS);
                let floats = panel.start * head_dim..panel.end * head_dim;
                let visible = &queries.visible[panel.clone()];
                let seen = most(visible);
                let scores = &mut scores[panel.start * positions..panel.end * positions];
                let keys = &page.keys[..seen * head_dim];
                let values = &page.values[..seen * head_dim];
                let rows = &queries.rows[floats.clone()];
                score_panel(rows, (keys, values), (head_dim, positions), scores);
                let mix = &mut gathered.mix[floats];
                for (r, &visible) in visible.iter().enumerate() {
                    let scores = &mut scores[r * positions..][..positions];
                    let (max, sum) = (&mut gathered.max[first + r], &mut gathered.sum[first + r]);
                    scores[visible..].fill(0.0);
                    if visible > 0 {
                        let (factor, new) = weigh(&mut scores[..visible], max);
                        *sum = *sum * factor + new;
                        if factor != 1.0 {
                            scale(factor, &mut mix[r * head_dim..][..head_dim]);
                        }
                    }
                }
                mix_panel(values, (head_dim, positions), scores, mix);
            }
        }

        /// `scores[r][p] = queries[r] . keys[p]`: `queries [rows][head_dim]`,
        /// `keys` and `values` `[seen][head_dim]`, `scores [rows][positions]`. Positions come first:
        /// their keys are read once, while the queries stay in the nearest cache. The values are
        /// asked for along the way.
        #[target_feature(enable = $features)]
        fn score_panel(
            queries: &[f32],
            (keys, values): (&[f32], &[f32]),
            (head_dim, positions): (usize, usize),
            scores: &mut [f32],
        ) {
            let rows = queries.len() / head_dim;
            let seen = keys.len() / head_dim;
            for position in (0..seen).step_by(BLOCK) {
                let at = |n: usize| (position + n).min(seen - 1);
                let mut block: [&[f32]; BLOCK] = [&[]; BLOCK];
                for (n, key) in block.iter_mut().enumerate() {
                    *key = &keys[at(n) * head_dim..][..head_dim];
                }
                let next = position * head_dim..at(BLOCK) * head_dim;
                for line in values[next].chunks(LINE) {
                    prefetch(line.as_ptr().cast());
                }
                for row in (0..rows).step_by(SCORE_ROWS) {
                    let mut of: [&[f32]; SCORE_ROWS] = [&[]; SCORE_ROWS];
                    for (r, query) in of.iter_mut().enumerate() {
                        *query = &queries[(row + r).min(rows - 1) * head_dim..][..head_dim];
                    }
                    let sums = score_block(of, block);
                    for (r, sums) in sums.as_chunks::<BLOCK>().0.iter().enumerate() {
                        let to = &mut scores[(row + r).min(rows - 1) * positions..][..positions];
                        let whole = to[position..].first_chunk_mut::<BLOCK>();
                        match whole {
                            Some(to) => *to = *sums,
                            None => to[position..].copy_from_slice(&sums[..positions - position]),
                        }
                    }
                }
            }
        }

        /// The inner products of a few queries and a few keys of one length,
        /// `[SCORE_ROWS][BLOCK]`, each summed in the same order.
        #[inline]
        #[target_feature(enable = $features)]
        fn score_block(
            queries: [&[f32]; SCORE_ROWS],
            keys: [&[f32]; BLOCK],
        ) -> [f32; SCORE_ROWS * BLOCK] {
            // Cut to the count of a row, so that the loop below needs no bounds checks.
            let turns = queries[0].len() / LANES;
            let mut whole_queries: [&[[f32; LANES]]; SCORE_ROWS] = [&[]; SCORE_ROWS];
            for (whole, query) in whole_queries.iter_mut().zip(queries) {
                *whole = &query.as_chunks().0[..turns];
            }
            let mut whole_keys: [&[[f32; LANES]]; BLOCK] = [&[]; BLOCK];
            for (whole, key) in whole_keys.iter_mut().zip(keys) {
                *whole = &key.as_chunks().0[..turns];
            }
            let mut chains = [splat(0.0); SCORE_ROWS * BLOCK];
            for turn in 0..turns {
                let mut key = [splat(0.0); BLOCK];
                for n in 0..BLOCK {
                    key[n] = load(&whole_keys[n][turn]);
                }
                for r in 0..SCORE_ROWS {
                    let query = load(&whole_queries[r][turn]);
                    for n in 0..BLOCK {
                        chains[r * BLOCK + n] = fma(query, key[n], chains[r * BLOCK + n]);
                    }
                }
            }
            if turns * LANES < queries[0].len() {
                for r in 0..SCORE_ROWS {
                    let query = load_part(&queries[r][turns * LANES..]);
                    for n in 0..BLOCK {
                        let key = load_part(&keys[n][turns * LANES..]);
                        chains[r * BLOCK + n] = fma(query, key, chains[r * BLOCK + n]);
                    }
                }
            }
            let mut sums = [0.0; SCORE_ROWS * BLOCK];
            let registers = chains.as_chunks::<LANES>().0;
            for (chains, sums) in registers.iter().zip(sums.as_chunks_mut::<LANES>().0) {
                store(sum_each(chains), sums);
            }
            sums
        }

        /// Turns scores into weights relative to the largest score so far, which is updated. Gives
        /// the factor that brings older weights to the same level, and the sum of the new ones.
        #[inline]
        #[target_feature(enable = $features)]
        pub(crate) fn weigh(scores: &mut [f32], max: &mut f32) -> (f32, f32) {
            let (whole, rest) = scores.as_chunks::<LANES>();
            let mut maxima = splat(*max);
            for scores in whole {
                maxima = max_lanes(load(scores), maxima);
            }
            let largest = rest.iter().copied().fold(largest_lane(maxima), f32::max);
            let mut factor = [*max - largest];
            *max = largest;
            map([], &mut factor, |[], x| exp_lanes(x));
            let level = splat(largest);
            map([], scores, |[], x| exp_lanes(sub_lanes(x, level)));
            let mut sum = [0.0];
            group_sums(scores, scores.len(), &mut sum);
            (factor[0], sum[0])
        }

        /// `mix[r] += sum over p of weights[r][p] * values[p]`: `values [seen][head_dim]`,
        /// `weights [rows][positions]`, `mix [rows][head_dim]`. Some positions at a time, whose
        /// values stay in the nearest cache beside the sums while all rows pass.
        #[target_feature(enable = $features)]
        fn mix_panel(
            values: &[f32],
            (head_dim, positions): (usize, usize),
            weights: &[f32],
            mix: &mut [f32],
        ) {
            let rows = mix.len() / head_dim;
            for (i, values) in values.chunks(MIX_POSITIONS * head_dim).enumerate() {
                for first in (0..rows).step_by(BLOCK) {
                    let row = |r: usize| (first + r).min(rows - 1);
                    let mut of: [&[f32]; BLOCK] = [&[]; BLOCK];
                    for (r, of) in of.iter_mut().enumerate() {
                        let from = row(r) * positions + i * MIX_POSITIONS;
                        *of = &weights[from..][..values.len() / head_dim];
                    }
                    let strip = MIX_LANES * LANES;
                    let mut column = 0;
                    let mut starts: [usize; BLOCK] = std::array::from_fn(|r| row(r) * head_dim);
                    while column + strip <= head_dim {
                        mix_block::<MIX_LANES>(&values[column..], head_dim, of, (starts, mix));
                        starts = starts.map(|start| start + strip);
                        column += strip;
                    }
                    while column + LANES <= head_dim {
                        mix_block::<1>(&values[column..], head_dim, of, (starts, mix));
                        starts = starts.map(|start| start + LANES);
                        column += LANES;
                    }
                    for r in 0..BLOCK.min(rows - first) {
                        let mix = &mut mix[row(r) * head_dim..][..head_dim];
                        for (weight, value) in of[r].iter().zip(values.chunks_exact(head_dim)) {
                            for column in column..head_dim {
                                mix[column] += weight * value[column];
                            }
                        }
                    }
                }
            }
        }

        /// `N * LANES` columns of a few rows, row r's from `starts[r]` of `mix` on: `values` are those
        /// of the first position from the first column on, `head_dim` apart.
        #[inline]
        #[target_feature(enable = $features)]
        fn mix_block<const N: usize>(
            values: &[f32],
            head_dim: usize,
            weights: [&[f32]; BLOCK],
            (starts, mix): ([usize; BLOCK], &mut [f32]),
        ) {
            let mut sums = [[splat(0.0); N]; BLOCK];
            for r in 0..BLOCK {
                let from = mix[starts[r]..][..N * LANES].as_chunks::<LANES>().0;
                for i in 0..N {
                    sums[r][i] = load(&from[i]);
                }
            }
            for (position, value) in values.chunks(head_dim).enumerate() {
                let value = value[..N * LANES].as_chunks::<LANES>().0;
                let mut registers = [splat(0.0); N];
                for i in 0..N {
                    registers[i] = load(&value[i]);
                }
                for r in 0..BLOCK {
                    let weight = splat(weights[r][position]);
                    for i in 0..N {
                        sums[r][i] = fma(weight, registers[i], sums[r][i]);
                    }
                }
            }
            for r in 0..BLOCK {
                let to = mix[starts[r]..][..N * LANES].as_chunks_mut::<LANES>().0;
                for i in 0..N {
                    store(sums[r][i], &mut to[i]);
                }
            }
        }

        /// The largest count.
        #[inline]
        fn most(counts: &[usize]) -> usize {
            counts.iter().copied().max().unwrap_or(0)
        }
    };
}
pub(crate) use attention_operations;
