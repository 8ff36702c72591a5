//! The products in fixed point written once over the registers of an instruction set.
//!
//! Owns the loops. A variant file owns the primitives that differ: `Bytes` and `Ints` (a register of
//! bytes and one of i32), `codes` (64 columns of packed weights as bytes), `plane` (one
//! code of each byte), `widen` (scales as floats), `dot` (adds the products
//! of four bytes to each i32) and `step` (one row's next 64 columns). A macro for the reason given
//! in `crate::lanes`.
//!
//! `STEP_COLS` columns of `TILE_ROWS` rows are unpacked at a time, as panels of `LANES` rows,
//! `[panel][STEP_COLS / 4][LANES][4]`: one register is four columns of `LANES` rows, and meets four
//! bytes of a vector in every lane. They stay in the first-level cache for all vectors.

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
            let range = first_row..w.rows().min(first_row + TILE_ROWS);
            fill_factors(w, range.clone(), tile.factors);
            let (scales, rest) =
                tile.factors.split_at(w.cols() / xs.layout.sum_group() * TILE_ROWS);
            let biases = &rest[..scales.len()];
            // Loads that cross cache lines take twice the time.
            let start = tile.codes.as_ptr().align_offset(64);
            let codes = &mut tile.codes[start..][..STEP_COLS * TILE_ROWS];
            // Rows that are missing repeat the last one.
            let rows = std::array::from_fn(|i| w.row((range.start + i).min(range.end - 1)).weight);
            let group = xs.layout.scale_group();
            let mut step = Step {
                rows: range.len(),
                cols: w.cols(),
                group,
                row_groups: w.cols() / group,
                sum_shift: (xs.layout.sum_group() / group).trailing_zeros(),
                groups: 0..0,
                codes,
                scales,
                biases,
                xs,
            };
            y.fill(0.0);
            for first in (0..w.cols()).step_by(STEP_COLS) {
                let cols = first..w.cols().min(first + STEP_COLS);
                by_width!(w.format(), fill_codes(&rows, range.len(), cols.clone(), step.codes));
                step.groups = cols.start / group..cols.end / group;
                // Bytes of a tile are alike but for those that use all of their bits.
                match w.format() {
                    Format::Affine { bits: 8, .. } => multiply_step::<8>(&step, y),
                    _ => multiply_step::<4>(&step, y),
                }
            }
        }

        /// Unpacks columns of the first `count` rows of a tile into panels.
        #[target_feature(enable = $features)]
        fn fill_codes<const BITS: usize, const GROUP: usize>(
            rows: &[&[u8]; TILE_ROWS],
            count: usize,
            cols: Range<usize>,
            codes: &mut [u8],
        ) {
            let bytes = cols.start * BITS / 8..cols.end * BITS / 8;
            let panels = codes.chunks_exact_mut(LANES * STEP_COLS).take(count.div_ceil(LANES));
            for (panel, rows) in panels.zip(rows.as_chunks::<LANES>().0) {
                let mut packed = [&[][..]; LANES];
                for (packed, row) in packed.iter_mut().zip(rows) {
                    *packed = &row[bytes.clone()];
                    // What the next step unpacks.
                    floats::prefetch(packed.as_ptr().wrapping_add(packed.len()));
                }
                if BITS == 2 || BITS == 4 || BITS == 8 {
                    interleave_packed::<BITS, GROUP>(&packed, panel);
                    continue;
                }
                for (step, codes) in panel.chunks_mut(64 * LANES).enumerate() {
                    if step * 8 * BITS < bytes.len() {
                        interleave::<BITS, GROUP>(&packed, step * 8 * BITS, codes);
                    }
                }
            }
        }

        /// Columns of `LANES` rows whose weights do not straddle bytes. Four bytes of each row are
        /// brought together before they are unpacked: a plane of them is one register of the panel.
        #[inline]
        #[target_feature(enable = $features)]
        fn interleave_packed<const BITS: usize, const GROUP: usize>(
            rows: &[&[u8]; LANES],
            codes: &mut [u8],
        ) {
            // Registers of the panel in a group, and of them in one plane.
            let (in_group, in_plane) = (GROUP / 4, GROUP * BITS / 32);
            let steps = codes.as_chunks_mut::<{ 4 * LANES }>().0;
            let words = rows[0].len() / 4;
            let mut keep = |word: usize, register: Bytes| {
                let (group, place) = (word / in_plane, word % in_plane);
                for p in 0..8 / BITS {
                    let at = group * in_group + p * in_plane + place;
                    store_bytes(plane::<BITS>(register, p), &mut steps[at]);
                }
            };
            for first in (0..words).step_by(LANES) {
                let mut registers = [zero_bytes(); LANES];
                if words - first >= LANES {
                    for (register, row) in registers.iter_mut().zip(rows) {
                        let packed = row[4 * first..].first_chunk();
                        *register = packed.map_or(zero_bytes(), |packed| load_bytes(packed));
                    }
                    let registers = transpose(registers);
                    for i in 0..LANES {
                        keep(first + i, registers[i]);
                    }
                } else {
                    for (register, row) in registers.iter_mut().zip(rows) {
                        let packed = padded(&row[4 * first..]);
                        *register = packed.first_chunk().map_or(zero_bytes(), |p| load_bytes(p));
                    }
                    let registers = transpose(registers);
                    for i in 0..words - first {
                        keep(first + i, registers[i]);
                    }
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

        // A tile is whole blocks of panels.
        const _: () = assert!(TILE_ROWS % (LANES * BLOCK_PANELS) == 0);

        /// Adds the products of a step's columns and all vectors to `y [tokens][TILE_ROWS]`.
        #[target_feature(enable = $features)]
        fn multiply_step<const BITS: usize>(step: &Step, y: &mut [f32]) {
            for panel in (0..step.rows.div_ceil(LANES)).step_by(BLOCK_PANELS) {
                for (i, y) in y.chunks_mut(BLOCK_TOKENS * TILE_ROWS).enumerate() {
                    let at = (panel, BLOCK_TOKENS * i);
                    match y.len() / TILE_ROWS {
                        1 => multiply_block::<BITS, 1>(step, at, y),
                        2 => multiply_block::<BITS, 2>(step, at, y),
                        3 => multiply_block::<BITS, 3>(step, at, y),
                        _ => multiply_block::<BITS, 4>(step, at, y),
                    }
                }
            }
        }

        /// `BLOCK_PANELS` panels times `N` vectors, a row a lane.
        #[target_feature(enable = $features)]
        fn multiply_block<const BITS: usize, const N: usize>(
            step: &Step,
            (first_panel, first_token): (usize, usize),
            y: &mut [f32],
        ) {
            let (all, group, xs) = (step.cols, step.group, step.xs);
            let steps = step.codes.as_chunks::<{ 4 * LANES }>().0;
            let (rows, _) = y.as_chunks_mut::<TILE_ROWS>();
            for (i, g) in step.groups.clone().enumerate() {
                let mut codes = [steps; BLOCK_PANELS];
                for (p, codes) in codes.iter_mut().enumerate() {
                    let start = ((first_panel + p) * STEP_COLS + i * group) / 4;
                    *codes = &steps[start..][..group / 4];
                }
                let first = first_token * all + g * group;
                let mut sums = [[zero_ints(); N]; BLOCK_PANELS];
                sums = add_dots::<BITS, N>(codes, &xs.hi[first..], all, sums);
                if !xs.lo.is_empty() {
                    for p in 0..BLOCK_PANELS {
                        for n in 0..N {
                            sums[p][n] = times_256(sums[p][n]);
                        }
                    }
                    sums = add_dots::<BITS, N>(codes, &xs.lo[first..], all, sums);
                }
                let ends_sum = (g + 1).trailing_zeros() >= step.sum_shift;
                let mut factors = [[0.0; 2]; N];
                for (n, factors) in factors.iter_mut().enumerate() {
                    let group = (first_token + n) * step.row_groups + g;
                    let sum = if ends_sum { xs.sums[group >> step.sum_shift] } else { 0.0 };
                    *factors = [xs.scales[group], sum];
                }
                let at = (g >> step.sum_shift) * TILE_ROWS + first_panel * LANES;
                let panels = (&step.scales[at..], &step.biases[at..]);
                add_sums(&sums, panels, &factors, (first_panel, rows));
            }
        }

        /// `y[n] += scale * factors[n][0] * sums + bias * factors[n][1]` of `N` vectors.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_sums<const N: usize>(
            sums: &[[Ints; N]; BLOCK_PANELS],
            (scales, biases): (&[f32], &[f32]),
            factors: &[[f32; 2]; N],
            (first_panel, y): (usize, &mut [[f32; TILE_ROWS]]),
        ) {
            let (scales, biases) = (scales.as_chunks::<LANES>().0, biases.as_chunks::<LANES>().0);
            let (Some(scales), Some(biases)) = (scales.first_chunk(), biases.first_chunk()) else {
                return;
            };
            let (scales, biases): (&[_; BLOCK_PANELS], &[_; BLOCK_PANELS]) = (scales, biases);
            for (n, y) in y.iter_mut().enumerate().take(N) {
                let (a, sum) = (splat(factors[n][0]), splat(factors[n][1]));
                let y = y.as_chunks_mut::<LANES>().0;
                let Some(y) = y[first_panel..].first_chunk_mut::<BLOCK_PANELS>() else { return };
                for p in 0..BLOCK_PANELS {
                    let total =
                        fma(to_floats(sums[p][n]), mul_lanes(load(&scales[p]), a), load(&y[p]));
                    store(fma(load(&biases[p]), sum, total), &mut y[p]);
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
    };
}
pub(super) use fixed_operations;
