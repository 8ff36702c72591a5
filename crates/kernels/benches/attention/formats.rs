//! One token's attention over a long context in each format of keys and values.
//!
//! Owns the pages of a format and the pass over them. Before a format is timed its answer is held to
//! that of the f32 kernels on the numbers that its pages stand for; queries on codes are integers of
//! 8 bits, hence the wider bound.

use std::hint::black_box;

use flash_moe_kernels::{
    CodeBits, CodedPage, CodedQueries, CodedRows, CodedScratch, Gathered, Isa, KvRows,
    NARROW_POSITIONS, NarrowPage, NarrowRows, Order, Queries, decode, encode, encode_int8,
    narrow_f16,
};

use super::{Aligned, GROUP, HEAD_DIM, KV_HEADS, PAGE, floats, seconds};

/// Formats and their names.
const FORMATS: [(Format, &str); 7] = [
    (Format::F32, "f32"),
    (Format::F16, "f16"),
    (Format::Int8, "int8"),
    (Format::Codes(CodeBits::Four, CodeBits::Four), "tq4"),
    (Format::Codes(CodeBits::Three, CodeBits::Three), "tq3"),
    (Format::Codes(CodeBits::Four, CodeBits::Two), "k4v2"),
    (Format::Codes(CodeBits::Two, CodeBits::Two), "tq2"),
];

#[derive(Clone, Copy, PartialEq)]
enum Format {
    F32,
    F16,
    Int8,
    Codes(CodeBits, CodeBits),
}

/// Keys or values of one head in one page.
struct Half {
    wide: Aligned, // what it stands for, [PAGE][HEAD_DIM]; for f32 the page itself
    bytes: Aligned,
    scales: Vec<f32>,
    bits: CodeBits,
}

impl Half {
    fn new(format: Format, order: Order, seed: u64) -> Self {
        let rows = floats(seed, PAGE * HEAD_DIM);
        let (mut wide, mut bytes, mut scales) = (rows.clone(), Vec::new(), vec![0.0; PAGE]);
        let bits = match (format, order) {
            (Format::Codes(bits, _), Order::Keys) | (Format::Codes(_, bits), Order::Values) => bits,
            _ => CodeBits::Two,
        };
        match format {
            Format::F32 => {}
            Format::F16 => {
                bytes.resize(2 * rows.len(), 0);
                narrow_f16(&rows, &mut bytes);
                Isa::scalar().widen_rows(&NarrowRows::F16(&bytes), HEAD_DIM, &mut wide);
            }
            Format::Int8 => {
                for (row, scale) in rows.chunks(HEAD_DIM).zip(&mut scales) {
                    let mut codes = vec![0; HEAD_DIM];
                    *scale = encode_int8(row, &mut codes);
                    bytes.extend(codes.iter().map(|code| *code as u8));
                }
                let codes: Vec<i8> = bytes.iter().map(|byte| *byte as i8).collect();
                let narrow = NarrowRows::Int8 { codes: &codes, scales: &scales };
                Isa::scalar().widen_rows(&narrow, HEAD_DIM, &mut wide);
            }
            Format::Codes(..) => {
                bytes.resize(bits.page_bytes(HEAD_DIM), 0);
                encode(bits, order, &rows, &mut bytes, &mut scales);
                decode(&CodedRows { bits, codes: &bytes, scales: &scales }, order, &mut wide);
            }
        }
        // Only the check and f32 need the wide form; the page's own bytes start at a line.
        let words: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Self { wide: Aligned::of(&wide), bytes: Aligned::of(&words), scales, bits }
    }

    fn bytes(&self) -> &[u8] {
        let words = self.bytes.floats();
        // SAFETY: four bytes for each float, which any pattern of bits is.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), 4 * words.len()) }
    }

    fn coded(&self) -> CodedRows<'_> {
        CodedRows { bits: self.bits, codes: self.bytes(), scales: &self.scales }
    }

    fn narrow(&self, format: Format) -> NarrowRows<'_> {
        let bytes = self.bytes();
        match format {
            Format::F16 => NarrowRows::F16(bytes),
            // SAFETY: a signed byte is a byte.
            _ => unsafe {
                let codes = std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len());
                NarrowRows::Int8 { codes, scales: &self.scales }
            },
        }
    }

    fn size(&self, format: Format) -> usize {
        match format {
            Format::F32 => 4 * PAGE * HEAD_DIM,
            Format::F16 => self.bytes().len(),
            _ => self.bytes().len() + 4 * PAGE,
        }
    }
}

/// Times all formats at so many positions, or only checks them.
pub fn run(isa: Isa, positions: usize, only_check: bool) {
    let mut f16_seconds = f64::NAN;
    for (format, name) in FORMATS {
        let context = Context::new(format, positions / PAGE);
        context.check(isa);
        if only_check {
            continue;
        }
        let rounds = 10.max(200_000 / positions);
        let best = (0..rounds).map(|_| context.time(isa)).fold(f64::INFINITY, f64::min);
        if format == Format::F16 {
            f16_seconds = best;
        }
        println!(
            "{name:5} 1 token of {positions:6} positions, {:6.1} MB: {:9.1} us ({:5.1} GB/s), {:.2} \
             of f16",
            context.bytes() as f64 / 1e6,
            best * 1e6,
            context.bytes() as f64 / best / 1e9,
            best / f16_seconds,
        );
    }
}

struct Context {
    format: Format,
    pages: Vec<[Half; 2]>, // [pages][KV_HEADS]
    queries: Aligned,      // [KV_HEADS][GROUP][HEAD_DIM], scaled
}

impl Context {
    fn new(format: Format, pages: usize) -> Self {
        let page = |i: usize| {
            [Order::Keys, Order::Values].map(|order| {
                // Few different pages: making them takes longer than reading them.
                Half::new(format, order, (i % 64) as u64 * 2 + u64::from(order == Order::Values))
            })
        };
        let mut queries = floats(1 << 40, KV_HEADS * GROUP * HEAD_DIM);
        Isa::detect().scale(1.0 / (HEAD_DIM as f32).sqrt(), &mut queries);
        let pages = (0..pages * KV_HEADS).map(page).collect();
        Self { format, pages, queries: Aligned::of(&queries) }
    }

    fn bytes(&self) -> usize {
        self.pages.iter().flatten().map(|half| half.size(self.format)).sum()
    }

    fn check(&self, isa: Isa) {
        let bound = if matches!(self.format, Format::Codes(..)) { 5e-3 } else { 1e-5 };
        let (got, want) = (self.pass(isa, self.format), self.pass(isa, Format::F32));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < bound, "{isa:?}: {got} for {want}");
        }
    }

    fn time(&self, isa: Isa) -> f64 {
        seconds(|| _ = black_box(self.pass(isa, self.format)))
    }

    /// The mixes of all heads.
    fn pass(&self, isa: Isa, format: Format) -> Vec<f32> {
        let mut scratch = vec![0.0; GROUP * PAGE + 2 * NARROW_POSITIONS * HEAD_DIM + 16];
        let start = scratch.as_ptr().align_offset(64);
        let (wide, scores) = scratch[start..].split_at_mut(2 * NARROW_POSITIONS * HEAD_DIM);
        let scores = &mut scores[..GROUP * PAGE];
        let (mut codes, mut scales) = (vec![0; GROUP * HEAD_DIM], vec![0.0; GROUP]);
        let (mut sums, mut steps) = (vec![0.0; GROUP], vec![0.0; 2 * GROUP]);
        let mut weights = vec![0; 2 * GROUP * PAGE];
        let mut tile = Aligned::default();
        let tile = tile.sized(CodedScratch::tile_bytes(HEAD_DIM) / 4);
        // SAFETY: four bytes for each float, which any pattern of bits is.
        let tile =
            unsafe { std::slice::from_raw_parts_mut(tile.as_mut_ptr().cast(), 4 * tile.len()) };
        let mut out = Vec::new();
        for (head, rows) in self.queries.floats().chunks(GROUP * HEAD_DIM).enumerate() {
            let (mut max, mut sum) = (vec![0.0; GROUP], vec![0.0; GROUP]);
            let mut mix = vec![0.0; GROUP * HEAD_DIM];
            let mut gathered = Gathered { max: &mut max, sum: &mut sum, mix: &mut mix };
            gathered.clear();
            let mut queries =
                CodedQueries { codes: &mut codes, scales: &mut scales, sums: &mut sums };
            isa.code_queries(rows, &mut queries);
            let visible = [PAGE; GROUP];
            let wide_queries = Queries { rows, visible: &visible };
            for [keys, values] in self.pages.iter().skip(head).step_by(KV_HEADS) {
                match format {
                    Format::F32 => {
                        let page =
                            KvRows { keys: keys.wide.floats(), values: values.wide.floats() };
                        isa.attend(&page, &wide_queries, &mut gathered, scores);
                    }
                    Format::Codes(..) => {
                        let page = CodedPage { keys: keys.coded(), values: values.coded() };
                        let mut scratch =
                            CodedScratch { scores, weights: &mut weights, steps: &mut steps, tile };
                        isa.attend_coded(&page, &queries, &mut gathered, &mut scratch);
                    }
                    _ => {
                        let page =
                            NarrowPage { keys: keys.narrow(format), values: values.narrow(format) };
                        let scratch = (&mut *wide, &mut *scores);
                        let here = &mut [0; GROUP];
                        isa.attend_narrow(&page, &wide_queries, &mut gathered, scratch, here);
                    }
                }
            }
            out.extend(mix.iter().enumerate().map(|(i, x)| x / sum[i / HEAD_DIM]));
        }
        out
    }
}
