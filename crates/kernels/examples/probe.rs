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
fn spin() {
    let mut a = 1u64;
    for i in 0..200000u64 {
        a = black_box(a.wrapping_mul(3).wrapping_add(i));
    }
    black_box(a);
}
fn main() {
    let isa = Isa::detect();
    for (bits, cols) in [(4u8, 2048usize), (4, 8192), (8, 2048), (4, 512)]
        .into_iter()
        .skip(std::env::args().nth(1).map_or(0, |a| a.parse().unwrap()))
    {
        let format = Format::Affine { bits, group: 64, scales: ScaleType::Bf16 };
        for rows in [64usize] {
            let w = vec![0x35u8; format.row_bytes(cols) * rows + 64];
            let s = vec![0x3fu8; format.scale_row_bytes(cols) * rows + 64];
            let off = |v: &Vec<u8>| (64 - v.as_ptr() as usize % 64) % 64;
            let w = &w[off(&w)..][..format.row_bytes(cols) * rows];
            let s = &s[off(&s)..][..format.scale_row_bytes(cols) * rows];
            let m = Rows::new(format, rows, cols, w, s, s).unwrap();
            let x = vec![0.5f32; cols];
            for align in [0, 16] {
                let layout = FixedLayout::of(format).unwrap();
                let mut hi = vec![0i8; cols + 128];
                let mut lo = vec![0i8; cols + 128];
                let ho = (64 - hi.as_ptr() as usize % 64) % 64 + align;
                let l = (64 - lo.as_ptr() as usize % 64) % 64 + align;
                let (mut sc, mut su) = (vec![0f32; cols / 64], vec![0f32; cols / 64]);
                isa.fix(
                    layout,
                    &x,
                    &mut FixedMut {
                        hi: &mut hi[ho..][..cols],
                        lo: &mut lo[l..][..cols],
                        scales: &mut sc,
                        sums: &mut su,
                    },
                );
                let f = Fixed {
                    layout,
                    hi: &hi[ho..][..cols],
                    lo: &lo[l..][..cols],
                    scales: &sc,
                    sums: &su,
                };
                let mut y = vec![0f32; rows];
                let mut best = f64::MAX;
                let mut pk = f64::MAX;
                let mut sp = f64::MAX;
                let mut fb = f64::MAX;
                for _ in 0..200 {
                    let a = t();
                    for _ in 0..8 {
                        isa.mat_vec_fixed(&m, 0, &f, black_box(&mut y));
                    }
                    let b = t();
                    best = best.min(b - a);
                    let a = t();
                    unsafe {
                        peak();
                    }
                    pk = pk.min(t() - a);
                    let a = t();
                    spin();
                    sp = sp.min(t() - a);
                    let a = t();
                    isa.mat_vec(&m, 0, &x, &su, black_box(&mut y));
                    fb = fb.min(t() - a);
                }
                let ns = best * 1e9 / 8.0 / rows as f64;
                println!(
                    "bits {bits} cols {cols} rows {rows} align {align}: {ns:.1} ns a row, {:.1} GB/s; f32 {:.1} GB/s; peak {:.2} G dpbusd/s; spin {:.2} G/s",
                    format.matrix_bytes(1, cols) as f64 / ns,
                    format.matrix_bytes(1, cols) as f64 / (fb * 1e9 / rows as f64),
                    240000.0 / pk / 1e9,
                    200000.0 / sp / 1e9
                );
            }
        }
    }
}
