//! Attention on codes written once over the registers of an instruction set.
//!
//! Owns the loops. Beside the primitives of `crate::fixed::lanes` a variant file owns `look_up` (the
//! bytes of a table of 16 that codes name) and `with_third_bit` (adds the bit of one of eight planes
//! to codes of two bits). Levels of a few units are looked up into the first-level cache and then
//! meet all rows. A macro for the reason given in `crate::lanes`.

/// Expands to the operations of `attention::coded` in `fixed::scalar` with these CPU features.
macro_rules! coded_operations {
    ($features:literal) => {
        /// Rows whose sums stay in registers.
        const CODED_ROWS: usize = if LANES == SIDE { 8 } else { 2 };
        /// Registers of those side by side.
        const CODED_PARTS: usize = SIDE / LANES;
        /// Sums of a few rows over two blocks of those side by side.
        type CodedSums = [[[Ints; CODED_PARTS]; 2]; CODED_ROWS];

        #[target_feature(enable = $features)]
        pub(crate) fn code_queries(x: &[f32], out: &mut CodedQueries) {
            let width = x.len() / out.scales.len();
            for (r, x) in x.chunks_exact(width).enumerate() {
                let (mut largest, mut total) = (splat(0.0), splat(0.0));
                for x in x.as_chunks::<LANES>().0 {
                    let size = floats::max_lanes(load(x), mul_lanes(load(x), splat(-1.0)));
                    largest = floats::max_lanes(size, largest);
                    total = add_lanes(total, size);
                }
                let largest = floats::largest_lane(largest).max(TINY);
                let codes = &mut out.codes[r * width..][..width];
                out.sums[r] = code_bytes(x, QUERY_LARGEST / largest, codes) as f32;
                let finite = sum_lanes(total).is_finite();
                out.scales[r] = if finite { largest / QUERY_LARGEST } else { f32::NAN };
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn attend_coded(
            page: &CodedPage,
            queries: &CodedQueries,
            gathered: &mut Gathered,
            scratch: &mut CodedScratch,
        ) {
            let rows = queries.scales.len();
            let width = queries.codes.len() / rows;
            for first in (0..CODED_POSITIONS).step_by(2 * SIDE) {
                let tile = &mut scratch.tile[..2 * SIDE * width];
                unpack_units(&page.keys, first / SIDE * width / 4, tile);
                let scales = &page.keys.scales[first..][..2 * SIDE];
                // Streams end with a page: its values are asked for while its keys are at work.
                let half = page.values.codes.len() / 2;
                let ahead = if first == 0 { 0..half } else { half..2 * half };
                for line in page.values.codes[ahead].chunks(UNIT) {
                    floats::prefetch(line.as_ptr());
                }
                score_units(queries, tile, scales, &mut scratch.scores[first..]);
            }
            let (hi, lo) = scratch.weights.split_at_mut(rows * CODED_POSITIONS);
            let (steps, offsets) = scratch.steps.split_at_mut(rows);
            let lines = scratch.scores.as_chunks_mut::<CODED_POSITIONS>().0.iter_mut();
            let planes = hi.as_chunks_mut::<CODED_POSITIONS>().0.iter_mut();
            let planes = planes.zip(lo.as_chunks_mut::<CODED_POSITIONS>().0);
            for (r, (scores, planes)) in lines.zip(planes).enumerate() {
                let (factor, new) = floats::weigh(scores, &mut gathered.max[r]);
                gathered.sum[r] = gathered.sum[r] * factor + new;
                if factor != 1.0 {
                    floats::scale(factor, &mut gathered.mix[r * width..][..width]);
                }
                (steps[r], offsets[r]) = code_weights(scores, page.values.scales, planes);
            }
            let weights = (&*hi, &*lo);
            for column in (0..width).step_by(2 * SIDE) {
                let tile = &mut scratch.tile[..2 * SIDE * CODED_POSITIONS];
                unpack_units(&page.values, column, tile);
                mix_units(tile, weights, (steps, offsets), (width, column), gathered.mix);
            }
        }

        /// Levels of units from `first` on, as many as the tile holds.
        #[inline]
        #[target_feature(enable = $features)]
        fn unpack_units(rows: &CodedRows, first: usize, tile: &mut [u8]) {
            match rows.bits {
                CodeBits::Two => unpack_planes::<2, 4>(rows, first, tile),
                CodeBits::Three => unpack_third_bits(rows, first, tile),
                CodeBits::Four => unpack_planes::<4, 2>(rows, first, tile),
            }
        }

        #[target_feature(enable = $features)]
        fn unpack_planes<const BITS: usize, const PLANES: usize>(
            rows: &CodedRows,
            first: usize,
            tile: &mut [u8],
        ) {
            let table = &const { [CodeBits::Two.table(), CodeBits::Four.table()] }[BITS / 4];
            let packed = rows.codes.as_chunks::<UNIT>().0[first / PLANES..].iter();
            let units = tile.as_chunks_mut::<UNIT>().0.as_chunks_mut::<PLANES>().0;
            for (packed, units) in packed.zip(units) {
                for (i, packed) in packed.as_chunks::<{ 4 * LANES }>().0.iter().enumerate() {
                    let packed = load_bytes(packed);
                    for p in 0..PLANES {
                        let levels = look_up(table, plane::<BITS>(packed, p));
                        store_bytes(levels, &mut units[p].as_chunks_mut().0[i]);
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        fn unpack_third_bits(rows: &CodedRows, first: usize, tile: &mut [u8]) {
            let table = &const { CodeBits::Three.table() };
            let (low, top) = rows.codes.split_at(rows.codes.len() / 3 * 2);
            let low = low.as_chunks::<UNIT>().0[first / 4..].as_chunks::<2>().0.iter();
            let top = top.as_chunks::<UNIT>().0[first / 8..].iter();
            let units = tile.as_chunks_mut::<UNIT>().0.as_chunks_mut::<8>().0;
            for ((low, top), units) in low.zip(top).zip(units) {
                for i in 0..CODED_PARTS {
                    let top = load_bytes(&top.as_chunks().0[i]);
                    for half in 0..2 {
                        let low = load_bytes(&low[half].as_chunks().0[i]);
                        for p in 0..4 {
                            let codes = with_third_bit(plane::<2>(low, p), top, 4 * half + p);
                            let to = &mut units[4 * half + p].as_chunks_mut().0[i];
                            store_bytes(look_up(table, codes), to);
                        }
                    }
                }
            }
        }

        /// Scores of two blocks of positions, from the start of each row of `scores [rows][CODED_POSITIONS]`.
        #[target_feature(enable = $features)]
        fn score_units(queries: &CodedQueries, tile: &[u8], scales: &[f32], scores: &mut [f32]) {
            let rows = queries.scales.len();
            let width = queries.codes.len() / rows;
            let scales = scales.as_chunks::<LANES>().0;
            for first in (0..rows).step_by(CODED_ROWS) {
                let row = |r: usize| (first + r).min(rows - 1);
                let mut planes: [&[i8]; CODED_ROWS] = [&[]; CODED_ROWS];
                for (r, plane) in planes.iter_mut().enumerate() {
                    *plane = &queries.codes[row(r) * width..][..width];
                }
                let zero = [[[zero_ints(); CODED_PARTS]; 2]; CODED_ROWS];
                let sums = add_units(tile, planes, zero);
                for (r, sums) in sums.into_iter().enumerate() {
                    let scale = queries.scales[row(r)];
                    let offset = splat(-f32::from(LEVEL_ZERO) * scale * queries.sums[row(r)]);
                    let to = scores[row(r) * CODED_POSITIONS..].as_chunks_mut::<LANES>().0;
                    let sums = sums.as_flattened();
                    for p in 0..2 * CODED_PARTS {
                        let score = fma(to_floats(sums[p]), splat(scale), offset);
                        store(mul_lanes(score, load(&scales[p])), &mut to[p]);
                    }
                }
            }
        }

        /// Adds the mix of two blocks of elements from `column` on to each row of `mix [rows][width]`.
        #[target_feature(enable = $features)]
        fn mix_units(
            tile: &[u8],
            (hi, lo): (&[i8], &[i8]),
            (steps, offsets): (&[f32], &[f32]),
            (width, column): (usize, usize),
            mix: &mut [f32],
        ) {
            let rows = steps.len();
            for first in (0..rows).step_by(CODED_ROWS) {
                let row = |r: usize| (first + r).min(rows - 1);
                let mut planes: [[&[i8]; CODED_ROWS]; 2] = [[&[]; CODED_ROWS]; 2];
                for r in 0..CODED_ROWS {
                    planes[0][r] = &hi[row(r) * CODED_POSITIONS..][..CODED_POSITIONS];
                    planes[1][r] = &lo[row(r) * CODED_POSITIONS..][..CODED_POSITIONS];
                }
                let zero = [[[zero_ints(); CODED_PARTS]; 2]; CODED_ROWS];
                let mut sums = add_units(tile, planes[0], zero);
                for sums in sums.as_flattened_mut().as_flattened_mut() {
                    *sums = times_256(*sums);
                }
                let sums = add_units(tile, planes[1], sums);
                for r in 0..CODED_ROWS.min(rows - first) {
                    let (step, offset) = (splat(steps[first + r]), splat(offsets[first + r]));
                    let to = &mut mix[(first + r) * width + column..][..2 * SIDE];
                    let sums = sums[r].as_flattened();
                    for (p, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                        let added = fma(to_floats(sums[p]), step, offset);
                        store(add_lanes(load(to), added), to);
                    }
                }
            }
        }

        /// Adds the products of a tile's levels, of which the second half is the second block's, and a
        /// few rows of bytes, four bytes a unit.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_units(tile: &[u8], rows: [&[i8]; CODED_ROWS], mut sums: CodedSums) -> CodedSums {
            let (one, two) = tile.split_at(tile.len() / 2);
            let one = one.as_chunks::<UNIT>().0;
            let two = &two.as_chunks::<UNIT>().0[..one.len()];
            let mut words: [&[[i8; 4]]; CODED_ROWS] = [&[]; CODED_ROWS];
            for (words, row) in words.iter_mut().zip(rows) {
                *words = &row.as_chunks().0[..one.len()];
            }
            for u in 0..one.len() {
                let mut levels = [[zero_bytes(); CODED_PARTS]; 2];
                for p in 0..CODED_PARTS {
                    levels[0][p] = load_bytes(&one[u].as_chunks().0[p]);
                    levels[1][p] = load_bytes(&two[u].as_chunks().0[p]);
                }
                for r in 0..CODED_ROWS {
                    let word = broadcast(words[r][u]);
                    for p in 0..CODED_PARTS {
                        sums[r][0][p] = dot::<4>(sums[r][0][p], levels[0][p], word);
                        sums[r][1][p] = dot::<4>(sums[r][1][p], levels[1][p], word);
                    }
                }
            }
            sums
        }

        /// Weights times scales as integers: their step, and what the level zeros add up to.
        #[inline]
        #[target_feature(enable = $features)]
        fn code_weights(
            weights: &[f32; CODED_POSITIONS],
            scales: &[f32],
            (hi, lo): (&mut [i8; CODED_POSITIONS], &mut [i8; CODED_POSITIONS]),
        ) -> (f32, f32) {
            let mut products = [0.0; CODED_POSITIONS];
            let (mut largest, mut total) = (splat(0.0), splat(0.0));
            let pairs = weights.as_chunks::<LANES>().0.iter().zip(scales.as_chunks::<LANES>().0);
            for ((weight, scale), to) in pairs.zip(products.as_chunks_mut::<LANES>().0) {
                let product = mul_lanes(load(weight), load(scale));
                store(product, to);
                largest = floats::max_lanes(product, largest);
                total = add_lanes(total, product);
            }
            if !sum_lanes(total).is_finite() {
                return (f32::NAN, f32::NAN);
            }
            let largest = floats::largest_lane(largest).max(TINY);
            let step = largest / WEIGHT_LARGEST;
            let sum = code_words(&products, WEIGHT_LARGEST / largest, hi, lo);
            (step, -f32::from(LEVEL_ZERO) * step * sum as f32)
        }
    };
}
pub(crate) use coded_operations;
