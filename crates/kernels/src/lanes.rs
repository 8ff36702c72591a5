//! Every operation written once over "lanes", the f32 vector register of an instruction set.
//!
//! Owns the vector form of `scalar.rs`. A variant file (`avx2`, `avx512`, `neon`) owns the handful
//! of primitives that differ (`Lanes`, `LANES`, `load`, `fma`, `unpack` and so on) and expands
//! `operations!` over them. A macro and not a generic: the compiler inlines an intrinsic only into
//! a function that enables the same CPU features, and the feature list must be a literal.
//!
//! Tails are computed by the same instructions on padded registers wherever callers may cut a
//! slice at any place, so that an element does not depend on its position.

/// Expands to all operations of `scalar.rs`, under the same names, with these CPU features.
macro_rules! operations {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        pub(crate) fn group_sums(x: &[f32], group: usize, sums: &mut [f32]) {
            for (sum, x) in sums.iter_mut().zip(x.chunks_exact(group)) {
                let (whole, rest) = x.as_chunks::<LANES>();
                let mut total = load_part(rest);
                for x in whole {
                    total = add_lanes(total, load(x));
                }
                *sum = sum_lanes(total);
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn mat_vec(w: &Rows, first_row: usize, x: &[f32], sums: &[f32], y: &mut [f32]) {
            match w.format() {
                Format::Affine { bits: 2, .. } => affine::<2>(w, first_row, x, sums, y),
                Format::Affine { bits: 3, .. } => affine::<3>(w, first_row, x, sums, y),
                Format::Affine { bits: 4, .. } => affine::<4>(w, first_row, x, sums, y),
                Format::Affine { bits: 5, .. } => affine::<5>(w, first_row, x, sums, y),
                Format::Affine { bits: 6, .. } => affine::<6>(w, first_row, x, sums, y),
                Format::Affine { .. } => affine::<8>(w, first_row, x, sums, y),
                Format::Bf16 | Format::F16 | Format::F32 => {
                    for (i, y) in y.iter_mut().enumerate() {
                        *y = plain_dot(w.format(), w.row(first_row + i).weight, x);
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn gate_up(
            gate: &Rows,
            up: &Rows,
            first_row: usize,
            x: &[f32],
            sums: (&[f32], &[f32]),
            out: &mut [f32],
        ) {
            // Products go to the stack in blocks, so that nothing is allocated.
            let mut products = [0.0; 64];
            for (i, out) in out.chunks_mut(64).enumerate() {
                let products = &mut products[..out.len()];
                mat_vec(gate, first_row + 64 * i, x, sums.0, products);
                mat_vec(up, first_row + 64 * i, x, sums.1, out);
                multiply_by_silu(products, out);
            }
        }

        /// `out *= silu(gate)`.
        #[inline]
        #[target_feature(enable = $features)]
        pub(crate) fn multiply_by_silu(gate: &[f32], out: &mut [f32]) {
            map([gate], out, |[gate], up| mul_lanes(silu_lanes(gate), up));
        }

        /// Rows of one bit width.
        #[target_feature(enable = $features)]
        fn affine<const BITS: usize>(
            w: &Rows,
            first_row: usize,
            x: &[f32],
            sums: &[f32],
            y: &mut [f32],
        ) {
            let Format::Affine { group, scales, .. } = w.format() else { return };
            for (i, y) in y.iter_mut().enumerate() {
                let row = w.row(first_row + i);
                let scaled = match group {
                    32 => affine_dot::<BITS, 32>(row, scales, x),
                    64 => affine_dot::<BITS, 64>(row, scales, x),
                    _ => affine_dot::<BITS, 128>(row, scales, x),
                };
                *y = scaled + plain_dot(scales.as_format(), row.biases, sums);
            }
        }

        /// Sum over the groups of `scale * sum(q * x)`.
        #[inline]
        #[target_feature(enable = $features)]
        fn affine_dot<const BITS: usize, const GROUP: usize>(
            row: Row,
            scales: ScaleType,
            x: &[f32],
        ) -> f32 {
            // Scales are widened many at a time: a broadcast from the stack then costs a load.
            const BATCH: usize = 64;
            let mut wide = [0.0; BATCH];
            let mut total = splat(0.0);
            let packed = row.weight.chunks(BATCH * GROUP * BITS / 8);
            let bytes = row.scales.chunks(BATCH * scales.bytes());
            for ((packed, bytes), x) in packed.zip(bytes).zip(x.chunks(BATCH * GROUP)) {
                let x = x.as_chunks::<GROUP>().0;
                let wide = &mut wide[..x.len()];
                unpack_plain(scales.as_format(), bytes, wide);
                let groups = packed.chunks_exact(GROUP * BITS / 8).zip(x).zip(wide);
                for ((packed, x), scale) in groups {
                    total = fma(group_dot::<BITS, GROUP>(packed, x), splat(*scale), total);
                }
            }
            sum_lanes(mul_lanes(total, unscale::<BITS>()))
        }

        /// Sum of `q * x` over one group, spread over the lanes and not yet unscaled.
        #[inline]
        #[target_feature(enable = $features)]
        fn group_dot<const BITS: usize, const GROUP: usize>(
            packed: &[u8],
            x: &[f32; GROUP],
        ) -> Lanes {
            // Two chains: one would wait for the latency of each multiply-add.
            let mut chains = [splat(0.0); 2];
            let x = x.as_chunks::<32>().0;
            for step in 0..GROUP / 32 {
                let q = unpack::<BITS>(&packed[4 * BITS * step..][..4 * BITS]);
                let x = x[step].as_chunks::<LANES>().0;
                for i in 0..32 / LANES {
                    chains[i % 2] = fma(q[i], load(&x[i]), chains[i % 2]);
                }
            }
            add_lanes(chains[0], chains[1])
        }

        /// Plain floats in f32.
        #[inline]
        #[target_feature(enable = $features)]
        pub(crate) fn unpack_plain(format: Format, bytes: &[u8], out: &mut [f32]) {
            let (whole, rest) = out.as_chunks_mut::<LANES>();
            let done = whole.len() * LANES;
            macro_rules! widened {
                ($bytes:expr, $widen:ident, $one:expr) => {{
                    let (registers, _) = bytes.as_chunks::<{ $bytes * LANES }>();
                    for (out, bytes) in whole.iter_mut().zip(registers) {
                        store($widen(bytes), out);
                    }
                    for (k, out) in rest.iter_mut().enumerate() {
                        *out = $one(done + k);
                    }
                }};
            }
            match format {
                Format::Bf16 => widened!(2, widen_bf16, |k| bf16_to_f32(u16_at(bytes, k))),
                Format::F16 => widened!(2, widen_f16, |k| f16_to_f32(u16_at(bytes, k))),
                Format::F32 => widened!(4, widen_f32, |k| f32_at(bytes, k)),
                Format::Affine { .. } => {}
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn unpack_scaled(codes: &[i8], scales: &[f32], out: &mut [f32]) {
            let width = codes.len() / scales.len();
            let rows = codes.chunks_exact(width).zip(out.chunks_exact_mut(width));
            for ((codes, out), scale) in rows.zip(scales) {
                for (code, out) in codes.iter().zip(out) {
                    *out = f32::from(*code) * scale;
                }
            }
        }

        /// A row of plain floats, as little-endian bytes, times `x`.
        #[inline]
        #[target_feature(enable = $features)]
        fn plain_dot(format: Format, row: &[u8], x: &[f32]) -> f32 {
            let (whole, rest) = x.as_chunks::<LANES>();
            let done = whole.len() * LANES;
            let mut chains = [splat(0.0); 4];
            macro_rules! products {
                ($bytes:expr, $widen:ident, $one:expr) => {{
                    let (row, _) = row.as_chunks::<{ $bytes * LANES }>();
                    for (row, x) in row.as_chunks::<4>().0.iter().zip(whole.as_chunks::<4>().0) {
                        for j in 0..4 {
                            chains[j] = fma($widen(&row[j]), load(&x[j]), chains[j]);
                        }
                    }
                    let row = row.as_chunks::<4>().1;
                    for (row, x) in row.iter().zip(whole.as_chunks::<4>().1) {
                        chains[0] = fma($widen(row), load(x), chains[0]);
                    }
                    rest.iter().enumerate().map(|(k, x)| $one(done + k) * x).sum::<f32>()
                }};
            }
            let tail = match format {
                Format::Bf16 => products!(2, widen_bf16, |k| bf16_to_f32(u16_at(row, k))),
                Format::F16 => products!(2, widen_f16, |k| f16_to_f32(u16_at(row, k))),
                Format::F32 => products!(4, widen_f32, |k| f32_at(row, k)),
                Format::Affine { .. } => 0.0,
            };
            let [a, b, c, d] = chains;
            sum_lanes(add_lanes(add_lanes(a, b), add_lanes(c, d))) + tail
        }

        #[target_feature(enable = $features)]
        pub(crate) fn unpack_row(w: &Rows, row: usize, out: &mut [f32]) {
            let bytes = w.row(row);
            match w.format() {
                Format::Affine { bits: 2, group, scales } => {
                    unpack_affine::<2>(bytes, usize::from(group), scales, out);
                }
                Format::Affine { bits: 3, group, scales } => {
                    unpack_affine::<3>(bytes, usize::from(group), scales, out);
                }
                Format::Affine { bits: 4, group, scales } => {
                    unpack_affine::<4>(bytes, usize::from(group), scales, out);
                }
                Format::Affine { bits: 5, group, scales } => {
                    unpack_affine::<5>(bytes, usize::from(group), scales, out);
                }
                Format::Affine { bits: 6, group, scales } => {
                    unpack_affine::<6>(bytes, usize::from(group), scales, out);
                }
                Format::Affine { group, scales, .. } => {
                    unpack_affine::<8>(bytes, usize::from(group), scales, out);
                }
                plain => unpack_plain(plain, bytes.weight, out),
            }
        }

        #[target_feature(enable = $features)]
        fn unpack_affine<const BITS: usize>(
            row: Row,
            group: usize,
            scales: ScaleType,
            out: &mut [f32],
        ) {
            let groups = row.weight.chunks_exact(group * BITS / 8);
            for (g, (packed, out)) in groups.zip(out.chunks_exact_mut(group)).enumerate() {
                let scale = splat(scale_at(scales, row.scales, g));
                let bias = splat(scale_at(scales, row.biases, g));
                let steps = packed.chunks_exact(4 * BITS).zip(out.as_chunks_mut::<32>().0);
                for (packed, out) in steps {
                    let q = unpack::<BITS>(packed);
                    for (q, out) in q.iter().zip(out.as_chunks_mut::<LANES>().0) {
                        // Not fused: the product is rounded, as in the specification.
                        let q = mul_lanes(*q, unscale::<BITS>());
                        store(add_lanes(mul_lanes(scale, q), bias), out);
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
            let (whole_a, rest_a) = a.as_chunks::<{ 4 * LANES }>();
            let (whole_b, rest_b) = b.as_chunks::<{ 4 * LANES }>();
            let mut chains = [splat(0.0); 4];
            for (a, b) in whole_a.iter().zip(whole_b) {
                let (a, b) = (a.as_chunks::<LANES>().0, b.as_chunks::<LANES>().0);
                for j in 0..4 {
                    chains[j] = fma(load(&a[j]), load(&b[j]), chains[j]);
                }
            }
            for (a, b) in rest_a.chunks(LANES).zip(rest_b.chunks(LANES)) {
                chains[0] = fma(load_part(a), load_part(b), chains[0]);
            }
            let [a, b, c, d] = chains;
            sum_lanes(add_lanes(add_lanes(a, b), add_lanes(c, d)))
        }

        #[target_feature(enable = $features)]
        pub(crate) fn dots(row: &[f32], xs: &[f32], out: &mut [f32]) {
            multiply_rows(row, row.len(), xs, out);
        }

        #[target_feature(enable = $features)]
        pub(crate) fn add_product(
            (a, stride): (&[f32], usize),
            (b, width): (&[f32], usize),
            c: &mut [f32],
        ) {
            // A panel of sums stays in the nearest cache while the rows of `b` pass.
            let panels = a.chunks(PANEL_ROWS * stride).zip(c.chunks_mut(PANEL_ROWS * width));
            for (a, c) in panels {
                mix_panel(b, (width, stride), a, c);
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn mat_mul(
            w: &Rows,
            first_row: usize,
            xs: &[f32],
            y: &mut [f32],
            scratch: &mut [f32],
        ) {
            let (cols, held) = (w.cols(), scratch.len() / w.cols());
            let tokens = xs.len() / cols;
            for (i, y) in y.chunks_mut(held * tokens).enumerate() {
                let rows = y.len() / tokens;
                for (r, row) in scratch.chunks_exact_mut(cols).take(rows).enumerate() {
                    unpack_row(w, first_row + i * held + r, row);
                }
                multiply_rows(&scratch[..rows * cols], cols, xs, y);
            }
        }

        /// `rows [n][cols]` times `xs [tokens][cols]` to `y [n][tokens]`. Vectors come first: a few
        /// of them stay in the nearest cache while all rows pass.
        #[target_feature(enable = $features)]
        fn multiply_rows(rows: &[f32], cols: usize, xs: &[f32], y: &mut [f32]) {
            if cols == 0 {
                return y.fill(0.0);
            }
            let (count, tokens) = (rows.len() / cols, xs.len() / cols);
            for token in (0..tokens).step_by(BLOCK_TOKENS) {
                for row in (0..count).step_by(BLOCK_ROWS) {
                    let block = Block { rows: &rows[row * cols..], xs, cols, row, tokens };
                    let few_tokens = token + BLOCK_TOKENS > tokens;
                    match (row + BLOCK_ROWS > count, few_tokens) {
                        (false, false) => {
                            multiply_block::<BLOCK_ROWS, BLOCK_TOKENS>(&block, token, y);
                        }
                        (false, true) => {
                            (token..tokens).for_each(|token| {
                                multiply_block::<BLOCK_ROWS, 1>(&block, token, y)
                            });
                        }
                        (true, false) => {
                            for row in row..count {
                                let block = Block { rows: &rows[row * cols..], row, ..block };
                                multiply_block::<1, BLOCK_TOKENS>(&block, token, y);
                            }
                        }
                        (true, true) => {
                            for row in row..count {
                                let block = Block { rows: &rows[row * cols..], row, ..block };
                                (token..tokens)
                                    .for_each(|token| multiply_block::<1, 1>(&block, token, y));
                            }
                        }
                    }
                }
            }
        }

        /// `R` rows times `N` vectors, each pair summed in the same order whatever `R` and `N` are.
        #[inline]
        #[target_feature(enable = $features)]
        fn multiply_block<const R: usize, const N: usize>(
            block: &Block,
            token: usize,
            y: &mut [f32],
        ) {
            let Block { cols, row, tokens, .. } = *block;
            let mut rows: [&[[f32; 2 * LANES]]; R] = [&[]; R];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = block.rows[r * cols..][..cols].as_chunks().0;
            }
            // Cut to the count of a row, so that the loop below needs no bounds checks.
            let turns = cols / (2 * LANES);
            let mut xs: [&[[f32; 2 * LANES]]; N] = [&[]; N];
            for (n, x) in xs.iter_mut().enumerate() {
                *x = &block.xs[(token + n) * cols..].as_chunks().0[..turns];
            }
            for row in &mut rows {
                *row = &row[..turns];
            }
            let mut chains = [[[splat(0.0); 2]; N]; R];
            let mut registers = [splat(0.0); R];
            for turn in 0..turns {
                for half in 0..2 {
                    for r in 0..R {
                        registers[r] = load(&rows[r][turn].as_chunks().0[half]);
                    }
                    for n in 0..N {
                        let x = load(&xs[n][turn].as_chunks().0[half]);
                        for r in 0..R {
                            chains[r][n][half] = fma(registers[r], x, chains[r][n][half]);
                        }
                    }
                }
            }
            let done = turns * 2 * LANES;
            for r in 0..R {
                for n in 0..N {
                    let [mut a, b] = chains[r][n];
                    let rest_row = &block.rows[r * cols + done..(r + 1) * cols];
                    let rest_x = &block.xs[(token + n) * cols + done..(token + n + 1) * cols];
                    for (row, x) in rest_row.chunks(LANES).zip(rest_x.chunks(LANES)) {
                        a = fma(load_part(row), load_part(x), a);
                    }
                    y[(row + r) * tokens + token + n] = sum_lanes(add_lanes(a, b));
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
            let a = splat(a);
            map([x], y, |[x], y| fma(a, x, y));
        }

        #[target_feature(enable = $features)]
        pub(crate) fn scale(a: f32, x: &mut [f32]) {
            let a = splat(a);
            map([], x, |[], x| mul_lanes(a, x));
        }

        #[target_feature(enable = $features)]
        pub(crate) fn add(x: &[f32], y: &mut [f32]) {
            map([x], y, |[x], y| add_lanes(x, y));
        }

        #[target_feature(enable = $features)]
        pub(crate) fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
            let factor = splat(rms_factor(x, eps));
            map([x, w], out, |[x, w], _| mul_lanes(mul_lanes(x, factor), w));
        }

        #[target_feature(enable = $features)]
        pub(crate) fn l2_norm(x: &mut [f32], eps: f32, factor: f32) {
            scale(factor / (dot(x, x) + eps).sqrt(), x);
        }

        #[target_feature(enable = $features)]
        pub(crate) fn gated_norm(x: &mut [f32], w: &[f32], z: &[f32], eps: f32) {
            let factor = splat(rms_factor(x, eps));
            map([w, z], x, |[w, z], x| {
                mul_lanes(mul_lanes(mul_lanes(x, factor), w), silu_lanes(z))
            });
        }

        /// `1 / sqrt(mean(x^2) + eps)`.
        #[target_feature(enable = $features)]
        fn rms_factor(x: &[f32], eps: f32) -> f32 {
            1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
        }

        #[target_feature(enable = $features)]
        pub(crate) fn softmax(x: &mut [f32]) {
            let (whole, rest) = x.as_chunks::<LANES>();
            let mut maxima = splat(f32::NEG_INFINITY);
            for x in whole {
                maxima = max_lanes(load(x), maxima);
            }
            let max = rest.iter().copied().fold(largest_lane(maxima), f32::max);
            let max = splat(max);
            map([], x, |[], x| exp_lanes(sub_lanes(x, max)));
            let mut total = [0.0];
            group_sums(x, x.len().max(1), &mut total[..usize::from(!x.is_empty())]);
            scale(1.0 / total[0], x);
        }

        #[target_feature(enable = $features)]
        pub(crate) fn silu(x: &mut [f32]) {
            map([], x, |[], x| silu_lanes(x));
        }

        #[target_feature(enable = $features)]
        pub(crate) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
            map([gate, up], out, |[gate, up], _| mul_lanes(silu_lanes(gate), up));
        }

        #[target_feature(enable = $features)]
        pub(crate) fn sigmoid_mul(gate: &[f32], x: &mut [f32]) {
            map([gate], x, |[gate], x| divide_by_one_plus_exp(x, gate));
        }

        #[target_feature(enable = $features)]
        pub(crate) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
            let half = cos.len();
            let (a, b) = x[..2 * half].split_at_mut(half);
            for start in (0..half).step_by(LANES) {
                let end = half.min(start + LANES);
                let (a, b) = (&mut a[start..end], &mut b[start..end]);
                let (cos, sin) = (load_part(&cos[start..end]), load_part(&sin[start..end]));
                let (x, y) = (load_part(a), load_part(b));
                store_part(sub_lanes(mul_lanes(x, cos), mul_lanes(y, sin)), a);
                store_part(fma(x, sin, mul_lanes(y, cos)), b);
            }
        }

        #[target_feature(enable = $features)]
        pub(crate) fn conv4(w: [&[f32]; 4], u: [&[f32]; 4], out: &mut [f32]) {
            let inputs = [w[0], w[1], w[2], w[3], u[0], u[1], u[2], u[3]];
            map(inputs, out, |[w0, w1, w2, w3, u0, u1, u2, u3], _| {
                silu_lanes(fma(w3, u3, fma(w2, u2, fma(w1, u1, mul_lanes(w0, u0)))))
            });
        }

        /// Columns go in blocks whose sums stay in registers. The first pass reads the state as it
        /// was and fades the sum instead; the second fades and updates it in one go.
        #[target_feature(enable = $features)]
        pub(crate) fn delta_step(head: &mut DeltaHead) {
            let dv = head.v.len();
            let mut column = 0;
            while column + STATE_LANES * LANES <= dv {
                delta_columns::<STATE_LANES>(head, column);
                column += STATE_LANES * LANES;
            }
            while column + LANES <= dv {
                delta_columns::<1>(head, column);
                column += LANES;
            }
            for column in column..dv {
                delta_column(head, column);
            }
        }

        /// The `N * LANES` columns from `column` on.
        #[inline]
        #[target_feature(enable = $features)]
        fn delta_columns<const N: usize>(head: &mut DeltaHead, column: usize) {
            let dv = head.v.len();
            let columns = column..column + N * LANES;
            let mut delta = [splat(0.0); N];
            for (s, k) in head.state.chunks_exact(dv).zip(head.k) {
                let k = splat(*k);
                let s = s[columns.clone()].as_chunks::<LANES>().0;
                for i in 0..N {
                    delta[i] = fma(k, load(&s[i]), delta[i]);
                }
            }
            let (decay, beta) = (splat(head.decay), splat(head.beta));
            let v = head.v[columns.clone()].as_chunks::<LANES>().0;
            let to = head.delta[columns.clone()].as_chunks_mut::<LANES>().0;
            for i in 0..N {
                let missing = sub_lanes(load(&v[i]), mul_lanes(decay, delta[i]));
                delta[i] = mul_lanes(beta, missing);
                store(delta[i], &mut to[i]);
            }
            let mut out = [splat(0.0); N];
            for ((s, k), q) in head.state.chunks_exact_mut(dv).zip(head.k).zip(head.q) {
                let (k, q) = (splat(*k), splat(*q));
                let s = s[columns.clone()].as_chunks_mut::<LANES>().0;
                for i in 0..N {
                    let updated = fma(k, delta[i], mul_lanes(decay, load(&s[i])));
                    store(updated, &mut s[i]);
                    out[i] = fma(q, updated, out[i]);
                }
            }
            let to = head.out[columns].as_chunks_mut::<LANES>().0;
            for i in 0..N {
                store(out[i], &mut to[i]);
            }
        }

        /// One column of those that fill no register.
        #[target_feature(enable = $features)]
        fn delta_column(head: &mut DeltaHead, column: usize) {
            let dv = head.v.len();
            let mut sum = 0.0;
            for (s, k) in head.state.chunks_exact(dv).zip(head.k) {
                sum += k * s[column];
            }
            let delta = head.beta * (head.v[column] - head.decay * sum);
            let mut out = 0.0;
            for ((s, k), q) in head.state.chunks_exact_mut(dv).zip(head.k).zip(head.q) {
                s[column] = head.decay * s[column] + k * delta;
                out += q * s[column];
            }
            head.delta[column] = delta;
            head.out[column] = out;
        }

        /// `out = f(inputs, out)` on whole registers, then once more on a padded one.
        #[inline]
        #[target_feature(enable = $features)]
        fn map<const N: usize>(
            inputs: [&[f32]; N],
            out: &mut [f32],
            f: impl Fn([Lanes; N], Lanes) -> Lanes,
        ) {
            let (whole_out, rest_out) = out.as_chunks_mut::<LANES>();
            // Cut to the length of the result, so that the loop below needs no bounds checks.
            let mut whole: [&[[f32; LANES]]; N] = [&[]; N];
            let mut rest: [&[f32]; N] = [&[]; N];
            for j in 0..N {
                let (whole_input, rest_input) = inputs[j].as_chunks();
                whole[j] = &whole_input[..whole_out.len()];
                rest[j] = rest_input;
            }
            let mut registers = [splat(0.0); N];
            for (i, out) in whole_out.iter_mut().enumerate() {
                for j in 0..N {
                    registers[j] = load(&whole[j][i]);
                }
                store(f(registers, load(out)), out);
            }
            if !rest_out.is_empty() {
                for j in 0..N {
                    registers[j] = load_part(rest[j]);
                }
                store_part(f(registers, load_part(rest_out)), rest_out);
            }
        }

        /// The first elements, as many as there are lanes, padded with zeros.
        #[inline]
        #[target_feature(enable = $features)]
        pub(crate) fn load_part(x: &[f32]) -> Lanes {
            if let Some(whole) = x.first_chunk() {
                return load(whole);
            }
            let mut padded = [0.0; LANES];
            padded[..x.len()].copy_from_slice(x);
            load(&padded)
        }

        /// Stores as many of the first lanes as there are elements.
        #[inline]
        #[target_feature(enable = $features)]
        fn store_part(x: Lanes, to: &mut [f32]) {
            if let Some(whole) = to.first_chunk_mut() {
                return store(x, whole);
            }
            let mut padded = [0.0; LANES];
            store(x, &mut padded);
            to.copy_from_slice(&padded[..to.len()]);
        }

        /// `x / (1 + exp(-x))`.
        #[inline]
        #[target_feature(enable = $features)]
        fn silu_lanes(x: Lanes) -> Lanes {
            divide_by_one_plus_exp(x, x)
        }

        /// `x / (1 + exp(-y))`.
        #[inline]
        #[target_feature(enable = $features)]
        fn divide_by_one_plus_exp(x: Lanes, y: Lanes) -> Lanes {
            let denominator = add_lanes(splat(1.0), exp_lanes(sub_lanes(splat(0.0), y)));
            divide_lanes(x, denominator)
        }

        /// exp within 2e-7 relative: `2^n * exp(r)` with r in half a step of ln 2, and the
        /// polynomial of Cephes' `expf` for exp(r). Overflow is infinity, underflow 0, NaN is NaN.
        #[inline]
        #[target_feature(enable = $features)]
        fn exp_lanes(x: Lanes) -> Lanes {
            // Beyond these the result is 0 or infinity whatever x is. The clamp keeps a NaN.
            let x = min_lanes(splat(89.0), max_lanes(splat(-104.0), x));
            let n = round_lanes(mul_lanes(x, splat(std::f32::consts::LOG2_E)));
            // ln 2 in two parts: the first has few bits, so that its product with n is exact.
            let r = fma(n, splat(-0.693_359_4), x);
            let r = fma(n, splat(2.121_944_4e-4), r);
            let mut p = splat(1.987_569_1e-4);
            for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = fma(p, r, splat(coefficient));
            }
            let p = add_lanes(fma(p, mul_lanes(r, r), r), splat(1.0));
            multiply_by_power_of_two(p, n)
        }
    };
}
pub(crate) use operations;
