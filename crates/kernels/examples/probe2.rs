#![allow(missing_docs, unsafe_code)]
use flash_moe_kernels::*;
use std::hint::black_box;
fn t() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn peak() {
    use std::arch::x86_64::*;
    let (q, x) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(-5)));
    let mut s = [_mm512_setzero_si512(); 12];
    for _ in 0..20000 {
        for s in &mut s {
            *s = _mm512_dpbusd_epi32(*s, q, x);
        }
    }
    black_box(s);
}
fn main() {
    let isa = std::env::args().nth(1).map_or(Isa::detect(), |n| Isa::parse(&n).unwrap());
    for (bits, rows, cols) in [(4u8, 64usize, 2048usize), (4, 64, 512), (8, 64, 2048)] {
        let format = Format::Affine { bits, group: 64, scales: ScaleType::Bf16 };
        let w = vec![0x35u8; format.row_bytes(cols) * rows];
        let s = vec![0x3fu8; format.scale_row_bytes(cols) * rows];
        let m = Rows::new(format, rows, cols, &w, &s, &s).unwrap();
        for tokens in [1usize, 4, 6, 16, 64, 512] {
            let x = vec![0.5f32; cols * tokens];
            let layout = FixedLayout::of(format).unwrap();
            let mut hi = vec![0i8; cols * tokens];
            let mut lo = vec![0i8; cols * tokens];
            let (mut sc, mut su) = (vec![0f32; tokens * cols / 64], vec![0f32; tokens * cols / 64]);
            isa.fix(
                layout,
                &x,
                &mut FixedMut { hi: &mut hi, lo: &mut lo, scales: &mut sc, sums: &mut su },
            );
            let f = Fixed { layout, hi: &hi, lo: &lo, scales: &sc, sums: &su };
            let mut y = vec![0f32; rows * tokens];
            let mut codes = vec![0u8; TILE_ROWS * cols];
            let mut fac = vec![0f32; 2 * TILE_ROWS * cols / 64];
            let mut best = f64::MAX;
            let mut pk = f64::MAX;
            for _ in 0..(6000 / tokens).clamp(30, 300) {
                let a = t();
                isa.mat_mul_fixed(
                    &m,
                    0,
                    &f,
                    black_box(&mut y),
                    &mut TileMut { codes: &mut codes, factors: &mut fac },
                );
                let b = t();
                best = best.min(b - a);
                let a = t();
                unsafe {
                    peak();
                }
                pk = pk.min(t() - a);
            }
            let dots = (rows * cols * tokens * 2 / 64) as f64 / best / 1e9;
            let peak = 240000.0 / pk / 1e9;
            println!(
                "{isa:?} bits {bits} {rows}x{cols} tokens {tokens}: {:.1} ns a row-token, {dots:.2} of {peak:.2} G dpbusd/s = {:.2}",
                best * 1e9 / (rows * tokens) as f64,
                dots / peak
            );
        }
    }
}
