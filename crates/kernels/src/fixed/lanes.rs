//! The products in fixed point written once over the registers of an instruction set.
//!
//! Owns the loops. A variant file owns the primitives that differ: `Bytes` and `Ints` (a register of
//! bytes and one of i32), `codes` (64 columns of packed weights as bytes), `widen` (scales as floats), `dot` (adds the products
//! of four bytes to each i32) and `step` (one row's next 64 columns). A macro for the reason given
//! in `crate::lanes`.
//!
//! A tile holds `TILE_ROWS` rows as panels of `LANES` rows, `[panel][cols / 4][LANES][4]`: one
//! register is four columns of `LANES` rows, and meets four bytes of a vector in every lane.

/// Calls the instance of an operation for a format's bits and activation group.
macro_rules! by_width {
    ($format:expr, $operation:ident($($argument:expr),*)) => {
        match $format {
            Format::Affine { bits: 2, group: 32, .. } => $operation::<2, 32>($($argument),*),
            Format::Affine { bits: 3, group: 32, .. } => $operation::<3, 32>($($argument),*),
            Format::Affine { bits: 4, group: 32, .. } => $operation::<4, 32>($($argument),*),
            Format::Affine { bits: 5, group: 32, .. } => $operation::<5, 32>($($argument),*),
            Format::Affine { bits: 6, group: 32, .. } => $operation::<6, 32>($($argument),*),
            Format::Affine { bits: 8, group: 32, .. } => $operation::<8, 32>($($argument),*),
            Format::Affine { bits: 2, .. } => $operation::<2, 64>($($argument),*),
            Format::Affine { bits: 3, .. } => $operation::<3, 64>($($argument),*),
            Format::Affine { bits: 4, .. } => $operation::<4, 64>($($argument),*),
            Format::Affine { bits: 5, .. } => $operation::<5, 64>($($argument),*),
            Format::Affine { bits: 6, .. } => $operation::<6, 64>($($argument),*),
            _ => $operation::<8, 64>($($argument),*),
        }
    };
}
pub(super) use by_width;

/// Expands to all operations of `scalar.rs`, under the same names, with these CPU features.
macro_rules! fixed_operations {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        pub(crate) fn fix(layout: FixedLayout, x: &[f32], out: &mut FixedMut) {
            super::fix_groups(layout, x, out);
        }

        #[target_feature(enable = $features)]
        pub(crate) fn mat_vec(w: &Rows, first_row: usize, x: &Fixed, y: &mut [f32]) {
            by_width!(w.format(), rows(w, first_row, x, y));
        }

        #[target_feature(enable = $features)]
        pub(crate) fn gate_up(
            (gate, up): (&Rows, &Rows),
            first_row: usize,
            x: (&Fixed, &Fixed),
            out: &mut [f32],
        ) {
            // Products go to the stack in blocks, so that nothing is allocated.
            let mut products = [0.0; 64];
            for (i, out) in out.chunks_mut(64).enumerate() {
                let products = &mut products[..out.len()];
                mat_vec(gate, first_row + 64 * i, x.0, products);
                mat_vec(up, first_row + 64 * i, x.1, out);
                floats::multiply_by_silu(products, out);
            }
        }

        /// Rows of one bit width and one activation group.
        #[target_feature(enable = $features)]
        fn rows<const BITS: usize, const GROUP: usize>(
            w: &Rows,
            first_row: usize,
            x: &Fixed,
            y: &mut [f32],
        ) {
            let Format::Affine { scales, .. } = w.format() else { return };
            match (x.lo.is_empty(), scales) {
                (true, _) => row_blocks::<BITS, GROUP, true, false>(w, first_row, x, y),
                (_, ScaleType::Bf16) => row_blocks::<BITS, GROUP, false, true>(w, first_row, x, y),
                _ => row_blocks::<BITS, GROUP, false, false>(w, first_row, x, y),
            }
        }

        /// Rows in blocks, which share the loads of the vector. A block that is not full repeats its
        /// last row.
        #[inline]
        #[target_feature(enable = $features)]
        fn row_blocks<const BITS: usize, const GROUP: usize, const FAST: bool, const BF16: bool>(
            w: &Rows,
            first_row: usize,
            x: &Fixed,
            y: &mut [f32],
        ) {
            let mut factors = [[0.0; FACTORS]; ROW_BLOCK];
            let mut rows = [Row::default(); ROW_BLOCK];
            for (i, y) in y.chunks_mut(ROW_BLOCK).enumerate() {
                for (n, row) in rows.iter_mut().enumerate() {
                    *row = w.row(first_row + ROW_BLOCK * i + n.min(y.len() - 1));
                }
                let mut totals = [[splat(0.0); 2]; ROW_BLOCK];
                add_biases::<BF16>(w.format(), &rows, x.sums, &mut totals);
                for first in (0..x.scales.len()).step_by(FACTORS) {
                    multiply_scales::<BF16>(w.format(), &rows, (x, first), &mut factors);
                    add_groups::<BITS, GROUP, FAST>(&rows, (x, first), &factors, &mut totals);
                }
                for (y, [even, odd]) in y.iter_mut().zip(totals) {
                    *y = sum_lanes(add_lanes(even, odd));
                }
            }
        }

        /// Adds `(scale * a) * sum(q * v)` of up to `FACTORS` groups from `first` on to each row's
        /// totals: in turns to one and the other, since one would wait for each multiply-add.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_groups<const BITS: usize, const GROUP: usize, const FAST: bool>(
            rows: &[Row; ROW_BLOCK],
            (x, first): (&Fixed, usize),
            factors: &[[f32; FACTORS]; ROW_BLOCK],
            totals: &mut [[Lanes; 2]; ROW_BLOCK],
        ) {
            let count = FACTORS.min(x.scales.len() - first);
            let range = first * GROUP * BITS / 8..(first + count) * GROUP * BITS / 8;
            let mut ahead = rows[0].weight.as_ptr().wrapping_add(AHEAD_BYTES + range.start);
            let mut packed = [&[][..]; ROW_BLOCK];
            for (packed, row) in packed.iter_mut().zip(rows) {
                *packed = &row.weight[range.clone()];
            }
            let hi = &x.hi[first * GROUP..][..count * GROUP];
            let lo = if FAST { hi } else { &x.lo[first * GROUP..][..count * GROUP] };
            let (hi, hi_rest) = hi.as_chunks::<64>();
            let (lo, lo_rest) = lo.as_chunks::<64>();
            for (pair, (hi, lo)) in hi.chunks(2).zip(lo.chunks(2)).enumerate() {
                for line in 0..(16 * BITS * ROW_BLOCK).div_ceil(64) {
                    floats::prefetch(ahead.wrapping_add(64 * line));
                }
                ahead = ahead.wrapping_add(16 * BITS * ROW_BLOCK);
                for (chain, x) in hi.iter().zip(lo).enumerate() {
                    let at = (2 * pair + chain) * 64 / GROUP % FACTORS;
                    for n in 0..ROW_BLOCK {
                        let (next, rest) = packed[n].split_at(8 * BITS);
                        let total = &mut totals[n][chain];
                        *total = step::<BITS, GROUP, FAST>(next, x, &factors[n][at..], *total);
                        packed[n] = rest;
                    }
                }
            }
            if !hi_rest.is_empty() {
                let x = (&padded(hi_rest), &padded(lo_rest));
                for n in 0..ROW_BLOCK {
                    let packed = &padded(packed[n])[..8 * BITS];
                    let factors = [factors[n][count - 1], 0.0];
                    let total = &mut totals[n][hi.len() % 2];
                    *total = step::<BITS, GROUP, FAST>(packed, x, &factors, *total);
                }
            }
        }

        /// `factors[n][i] = scale * a` of the activation groups from `first` on. Asks for the scales
        /// of rows `AHEAD_BYTES` after these.
        #[target_feature(enable = $features)]
        fn multiply_scales<const BF16: bool>(
            format: Format,
            rows: &[Row; ROW_BLOCK],
            (x, first): (&Fixed, usize),
            factors: &mut [[f32; FACTORS]; ROW_BLOCK],
        ) {
            let Format::Affine { scales, .. } = format else { return };
            let scales = if BF16 { ScaleType::Bf16 } else { scales };
            let count = FACTORS.min(x.scales.len() - first);
            let a = &x.scales[first..][..count];
            for (factors, row) in factors.iter_mut().zip(rows) {
                floats::prefetch(scales_ahead(row, row.scales));
                if x.layout.sum_group() != x.layout.scale_group() {
                    for (i, (to, a)) in factors.iter_mut().zip(a).enumerate() {
                        *to = scale_at(scales, row.scales, (first + i) / 2) * a;
                    }
                    continue;
                }
                let row = &row.scales[first * scales.bytes()..][..count * scales.bytes()];
                let (to, _) = factors.as_chunks_mut::<LANES>();
                let (a, rest) = a.as_chunks::<LANES>();
                let (row, row_rest) = row.split_at(a.len() * LANES * scales.bytes());
                let whole = row.chunks_exact(LANES * scales.bytes()).zip(a);
                for (to, (row, a)) in to.iter_mut().zip(whole) {
                    store(mul_lanes(widen(scales, row), load(a)), to);
                }
                if let (Some(to), false) = (to.get_mut(a.len()), rest.is_empty()) {
                    store(mul_lanes(widen(scales, row_rest), first_floats(rest)), to);
                }
            }
        }

        /// Adds the products of biases and sums to the second of each row's totals, spread over the
        /// lanes. Asks for the biases of rows `AHEAD_BYTES` after these.
        #[target_feature(enable = $features)]
        fn add_biases<const BF16: bool>(
            format: Format,
            rows: &[Row; ROW_BLOCK],
            sums: &[f32],
            totals: &mut [[Lanes; 2]; ROW_BLOCK],
        ) {
            let Format::Affine { scales, .. } = format else { return };
            let scales = if BF16 { ScaleType::Bf16 } else { scales };
            let (sums, rest) = sums.as_chunks::<LANES>();
            for (total, row) in totals.iter_mut().zip(rows) {
                floats::prefetch(scales_ahead(row, row.biases));
                let mut sum = splat(0.0);
                let (row, row_rest) = row.biases.split_at(sums.len() * LANES * scales.bytes());
                for (row, sums) in row.chunks_exact(LANES * scales.bytes()).zip(sums) {
                    sum = fma(widen(scales, row), load(sums), sum);
                }
                if !rest.is_empty() {
                    sum = fma(widen(scales, row_rest), first_floats(rest), sum);
                }
                total[1] = sum;
            }
        }

        /// Where the scales or biases of a row lie that is `AHEAD_BYTES` after this one, if any is.
        #[inline]
        #[target_feature(enable = $features)]
        fn scales_ahead(row: &Row, scales: &[u8]) -> *const u8 {
            let rows = AHEAD_BYTES / row.weight.len().max(1);
            scales.as_ptr().wrapping_add(rows * scales.len())
        }

        #[target_feature(enable = $features)]
        pub(crate) fn mat_mul(
            w: &Rows,
            first_row: usize,
            xs: &Fixed,
            y: &mut [f32],
            tile: &mut TileMut,
        ) {
            let tokens = xs.hi.len() / w.cols();
            for (i, y) in y.chunks_mut(TILE_ROWS * tokens).enumerate() {
                let range = first_row + TILE_ROWS * i..first_row + TILE_ROWS * i + y.len() / tokens;
                by_width!(w.format(), fill_codes(w, range.clone(), tile.codes));
                fill_factors(w, range, tile.factors);
                let groups = w.cols() / xs.layout.sum_group();
                let (scales, biases) = tile.factors.split_at(groups * TILE_ROWS);
                let tile = Tile { cols: w.cols(), codes: tile.codes, scales, biases, xs, tokens };
                // Bytes of a tile are alike but for those that use all of their bits.
                match w.format() {
                    Format::Affine { bits: 8, .. } => multiply_tile::<8>(&tile, y),
                    _ => multiply_tile::<4>(&tile, y),
                }
            }
        }

        /// Unpacks rows into the panels of a tile. Rows that are missing repeat the last one.
        #[target_feature(enable = $features)]
        fn fill_codes<const BITS: usize, const GROUP: usize>(
            w: &Rows,
            range: Range<usize>,
            tile: &mut [u8],
        ) {
            let cols = w.cols();
            for (panel, tile) in tile[..TILE_ROWS * cols].chunks_exact_mut(LANES * cols).enumerate()
            {
                if panel > 0 && panel * LANES >= range.len() {
                    break;
                }
                let mut rows = [&[][..]; LANES];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = w.row((range.start + panel * LANES + i).min(range.end - 1)).weight;
                }
                for (step, tile) in tile.chunks_mut(64 * LANES).enumerate() {
                    interleave::<BITS, GROUP>(&rows, step * 8 * BITS, tile);
                }
            }
        }

        /// The next 64 columns of `LANES` rows, from byte `start` on, as 16 registers of a panel, or
        /// as the first eight of them where only 32 columns are left.
        #[inline]
        #[target_feature(enable = $features)]
        fn interleave<const BITS: usize, const GROUP: usize>(
            rows: &[&[u8]; LANES],
            start: usize,
            tile: &mut [u8],
        ) {
            let mut registers = [[zero_bytes(); LANES]; 64 / (4 * LANES)];
            for (i, row) in rows.iter().enumerate() {
                let packed = &row[start..];
                let codes = if packed.len() >= 8 * BITS {
                    codes::<BITS, GROUP>(&packed[..8 * BITS])
                } else {
                    codes::<BITS, GROUP>(&padded(packed)[..8 * BITS])
                };
                for (registers, codes) in registers.iter_mut().zip(codes) {
                    registers[i] = codes;
                }
            }
            let mut out = tile.as_chunks_mut::<{ 4 * LANES }>().0.iter_mut();
            for registers in registers {
                for (register, out) in transpose(registers).into_iter().zip(out.by_ref()) {
                    store_bytes(register, out);
                }
            }
        }

        /// Scales, then biases of rows, `[cols / group][TILE_ROWS]` each.
        #[target_feature(enable = $features)]
        fn fill_factors(w: &Rows, range: Range<usize>, factors: &mut [f32]) {
            let Format::Affine { group, scales, .. } = w.format() else { return };
            let groups = w.cols() / usize::from(group);
            let (to_scales, to_biases) = factors.split_at_mut(groups * TILE_ROWS);
            for first_row in (0..range.len()).step_by(LANES) {
                let row = |i: usize| w.row((range.start + first_row + i).min(range.end - 1));
                for first in (0..groups).step_by(LANES) {
                    let count = LANES.min(groups - first);
                    let mut block = [[zero_bytes(); LANES]; 2];
                    for i in 0..LANES {
                        let (row, start) = (row(i), first * scales.bytes());
                        block[0][i] = as_bytes(widen(scales, &row.scales[start..]));
                        block[1][i] = as_bytes(widen(scales, &row.biases[start..]));
                    }
                    let (scales, biases) = (transpose(block[0]), transpose(block[1]));
                    for g in 0..count {
                        let at = (first + g) * TILE_ROWS + first_row;
                        if let Some(to) = to_scales[at..].first_chunk_mut() {
                            store(as_lanes(scales[g]), to);
                        }
                        if let Some(to) = to_biases[at..].first_chunk_mut() {
                            store(as_lanes(biases[g]), to);
                        }
                    }
                }
            }
        }

        /// A tile times all vectors, `y [rows][tokens]`.
        #[target_feature(enable = $features)]
        fn multiply_tile<const BITS: usize>(tile: &Tile, y: &mut [f32]) {
            let mut first = 0;
            while first < tile.tokens {
                let count = (tile.tokens - first).min(BLOCK_TOKENS);
                match count {
                    1 => multiply_tokens::<BITS, 1>(tile, first, y),
                    2 => multiply_tokens::<BITS, 2>(tile, first, y),
                    3 => multiply_tokens::<BITS, 3>(tile, first, y),
                    4 => multiply_tokens::<BITS, 4>(tile, first, y),
                    5 => multiply_tokens::<BITS, 5>(tile, first, y),
                    _ => multiply_tokens::<BITS, 6>(tile, first, y),
                }
                first += count;
            }
        }

        /// A tile times `N` vectors.
        #[target_feature(enable = $features)]
        fn multiply_tokens<const BITS: usize, const N: usize>(
            tile: &Tile,
            first_token: usize,
            y: &mut [f32],
        ) {
            let rows = y.len() / tile.tokens;
            for first_row in (0..rows).step_by(BLOCK_PANELS * LANES) {
                let mut totals = [[[0.0; LANES]; N]; BLOCK_PANELS];
                multiply_panels::<BITS, N>(tile, (first_row, first_token), &mut totals);
                for (panel, totals) in totals.iter().enumerate() {
                    for (n, lanes) in totals.iter().enumerate() {
                        let first = (first_row + panel * LANES) * tile.tokens + first_token + n;
                        for (lane, value) in lanes.iter().enumerate() {
                            // Rows that are missing have no place in the result.
                            if let Some(y) = y.get_mut(first + lane * tile.tokens) {
                                *y = *value;
                            }
                        }
                    }
                }
            }
        }

        /// `BLOCK_PANELS` panels times `N` vectors, a row a lane.
        #[inline]
        #[target_feature(enable = $features)]
        fn multiply_panels<const BITS: usize, const N: usize>(
            tile: &Tile,
            (first_row, first_token): (usize, usize),
            out: &mut [[[f32; LANES]; N]; BLOCK_PANELS],
        ) {
            let Tile { cols, xs, .. } = *tile;
            // The group is a variable here: unrolled, its steps would not fit the registers.
            let group = xs.layout.scale_group();
            let ratio = xs.layout.sum_group() / group;
            let steps = tile.codes[first_row * cols..].as_chunks::<{ 4 * LANES }>().0;
            let mut totals = [[splat(0.0); N]; BLOCK_PANELS];
            for g in 0..cols / group {
                let mut codes = [steps; BLOCK_PANELS];
                for (p, codes) in codes.iter_mut().enumerate() {
                    *codes = &steps[(p * cols + g * group) / 4..][..group / 4];
                }
                let first = first_token * cols + g * group;
                let mut sums = [[zero_ints(); N]; BLOCK_PANELS];
                sums = add_dots::<BITS, N>(codes, &xs.hi[first..], cols, sums);
                if !xs.lo.is_empty() {
                    for p in 0..BLOCK_PANELS {
                        for n in 0..N {
                            sums[p][n] = times_256(sums[p][n]);
                        }
                    }
                    sums = add_dots::<BITS, N>(codes, &xs.lo[first..], cols, sums);
                }
                let at = g / ratio * TILE_ROWS + first_row;
                let a = &xs.scales[first / group..];
                for p in 0..BLOCK_PANELS {
                    let scale = load_at(tile.scales, at + p * LANES);
                    for n in 0..N {
                        let factor = mul_lanes(scale, splat(a[n * (cols / group)]));
                        totals[p][n] = fma(to_floats(sums[p][n]), factor, totals[p][n]);
                    }
                }
                if (g + 1).is_multiple_of(ratio) {
                    let sums = &xs.sums[first / (group * ratio)..];
                    for p in 0..BLOCK_PANELS {
                        let bias = load_at(tile.biases, at + p * LANES);
                        for n in 0..N {
                            let sum = splat(sums[n * (cols / (group * ratio))]);
                            totals[p][n] = fma(bias, sum, totals[p][n]);
                        }
                    }
                }
            }
            for p in 0..BLOCK_PANELS {
                for n in 0..N {
                    store(totals[p][n], &mut out[p][n]);
                }
            }
        }

        /// Adds one group's products: `codes [panels][group / 4]`, and of `N` vectors, `cols` apart,
        /// as many bytes of a plane.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_dots<const BITS: usize, const N: usize>(
            codes: [&[[u8; 4 * LANES]]; BLOCK_PANELS],
            plane: &[i8],
            cols: usize,
            mut sums: [[Ints; N]; BLOCK_PANELS],
        ) -> [[Ints; N]; BLOCK_PANELS] {
            // Four steps at a time: their addresses are then computed once.
            let turns = codes[0].len() / 4;
            let mut xs: [&[[[i8; 4]; 4]]; N] = [&[]; N];
            for (n, x) in xs.iter_mut().enumerate() {
                *x = &plane[n * cols..].as_chunks().0.as_chunks().0[..turns];
            }
            let mut panels: [&[[[u8; 4 * LANES]; 4]]; BLOCK_PANELS] = [&[]; BLOCK_PANELS];
            for (panel, codes) in panels.iter_mut().zip(codes) {
                *panel = &codes.as_chunks().0[..turns];
            }
            let mut registers = [zero_bytes(); BLOCK_PANELS];
            for turn in 0..turns {
                for step in 0..4 {
                    for p in 0..BLOCK_PANELS {
                        registers[p] = load_bytes(&panels[p][turn][step]);
                    }
                    for n in 0..N {
                        let x = broadcast(xs[n][turn][step]);
                        for p in 0..BLOCK_PANELS {
                            sums[p][n] = dot::<BITS>(sums[p][n], registers[p], x);
                        }
                    }
                }
            }
            sums
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn load_at(x: &[f32], at: usize) -> Lanes {
            match x[at..].first_chunk() {
                Some(x) => load(x),
                None => splat(0.0),
            }
        }
    };
}
pub(super) use fixed_operations;
