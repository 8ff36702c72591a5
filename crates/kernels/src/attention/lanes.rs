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
                let seen = most(&queries.visible[panel.clone()]);
                let keys = &page.keys[..seen * head_dim];
                let queries = &queries.rows[panel.start * head_dim..panel.end * head_dim];
                let scores = &mut scores[panel.start * positions..panel.end * positions];
                score_panel(queries, keys, (head_dim, positions), scores);
            }
            for (row, &visible) in queries.visible.iter().enumerate() {
                let scores = &mut scores[row * positions..][..positions];
                scores[visible..].fill(0.0);
                if visible > 0 {
                    let max = &mut gathered.max[row];
                    let (factor, sum) = weigh(&mut scores[..visible], max);
                    gathered.sum[row] = gathered.sum[row] * factor + sum;
                    if factor != 1.0 {
                        scale(factor, &mut gathered.mix[row * head_dim..][..head_dim]);
                    }
                }
            }
            mix_strips(page.values, queries.visible, scores, gathered.mix);
        }

        /// `scores[r][p] = queries[r] . keys[p]`: `queries [rows][head_dim]`,
        /// `keys [seen][head_dim]`, `scores [rows][positions]`. Positions come first: their keys
        /// are read once, while the queries stay in the nearest cache.
        #[target_feature(enable = $features)]
        fn score_panel(
            queries: &[f32],
            keys: &[f32],
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
        fn weigh(scores: &mut [f32], max: &mut f32) -> (f32, f32) {
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

        /// `mix[r] += sum over p of weights[r][p] * values[p]`: `values [positions][head_dim]`,
        /// `weights [rows][positions]`, zero past a row's `visible [rows]`, `mix [rows][head_dim]`.
        /// Values go in strips, which stay in the nearest cache while all rows pass.
        #[target_feature(enable = $features)]
        fn mix_strips(values: &[f32], visible: &[usize], weights: &[f32], mix: &mut [f32]) {
            let head_dim = mix.len() / visible.len();
            let strip = MIX_LANES * LANES;
            let mut column = 0;
            while column + strip <= head_dim {
                mix_columns::<MIX_LANES>(values, visible, weights, (column, &mut *mix));
                column += strip;
            }
            while column + LANES <= head_dim {
                mix_columns::<1>(values, visible, weights, (column, &mut *mix));
                column += LANES;
            }
            if column == head_dim {
                return;
            }
            let positions = values.len() / head_dim;
            for (row, mix) in mix.chunks_exact_mut(head_dim).enumerate() {
                let weights = &weights[row * positions..][..visible[row]];
                for (weight, value) in weights.iter().zip(values.chunks_exact(head_dim)) {
                    for column in column..head_dim {
                        mix[column] += weight * value[column];
                    }
                }
            }
        }

        /// The `N * LANES` columns from `column` on.
        #[inline]
        #[target_feature(enable = $features)]
        fn mix_columns<const N: usize>(
            values: &[f32],
            visible: &[usize],
            weights: &[f32],
            (column, mix): (usize, &mut [f32]),
        ) {
            let rows = visible.len();
            let head_dim = mix.len() / rows;
            let positions = values.len() / head_dim;
            for first in (0..rows).step_by(BLOCK) {
                let row = |r: usize| (first + r).min(rows - 1);
                let seen = most(&visible[first..rows.min(first + BLOCK)]);
                let mut of: [&[f32]; BLOCK] = [&[]; BLOCK];
                let mut sums = [[splat(0.0); N]; BLOCK];
                for r in 0..BLOCK {
                    of[r] = &weights[row(r) * positions..][..seen];
                    let from = mix[row(r) * head_dim + column..].as_chunks::<LANES>().0;
                    for i in 0..N {
                        sums[r][i] = load(&from[i]);
                    }
                }
                for (position, value) in values.chunks_exact(head_dim).take(seen).enumerate() {
                    let value = value[column..column + N * LANES].as_chunks::<LANES>().0;
                    let mut registers = [splat(0.0); N];
                    for i in 0..N {
                        registers[i] = load(&value[i]);
                    }
                    for r in 0..BLOCK {
                        let weight = splat(of[r][position]);
                        for i in 0..N {
                            sums[r][i] = fma(weight, registers[i], sums[r][i]);
                        }
                    }
                }
                for r in 0..BLOCK {
                    let to = mix[row(r) * head_dim + column..].as_chunks_mut::<LANES>().0;
                    for i in 0..N {
                        store(sums[r][i], &mut to[i]);
                    }
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
