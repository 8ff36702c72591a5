//! Keys and values of the positions seen so far, one cache for each attention layer.
//!
//! Grows by pages of positions, so that memory follows the conversation and not the context limit.
//! Keys are stored after norm and rotation. Within a page each KV head's rows are contiguous. A
//! clone shares its pages: a page is copied only when a cache appends to one that another holds, so
//! a prefix of several timelines is stored once.
//!
//! With codes there are wide pages, in halves and already in the codes' basis, and coded ones. A
//! token sees in codes what is older than the window of its own position: pages that were wide for
//! an earlier token of a chunk and coded for a later one are kept in both forms until
//! [`KvCache::settle`], so that the cut of a prompt into chunks changes nothing.

mod format;

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use flash_moe_kernels::{
    CODED_POSITIONS, CodeBits, CodedPage, CodedRows, Isa, KvRows, NarrowPage, NarrowRows, Order,
    decode, encode, encode_int8, narrow_bf16, narrow_f16, rotate, rotate_back,
};

use format::{Half, coded_half, wide_half};
pub use format::{KvCodes, KvFormat};

use crate::compute::with_scratch;
use crate::shape::Attention;

/// Positions a page holds.
pub const PAGE_POSITIONS: usize = CODED_POSITIONS;

/// Bytes that start at a cache line, since attention loads whole registers of them.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

type Page = Arc<[Line]>;

/// What decides the size of a cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvShape {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head; one that the format can keep.
    pub head_dim: usize,
    /// How they are kept.
    pub format: KvFormat,
}

/// Keys and values of one attention layer.
#[derive(Clone)]
pub struct KvCache {
    shape: KvShape,
    positions: usize,
    wide: Vec<Page>,  // the first pages, then those after the `dropped` ones
    coded: Vec<Page>, // those after the first ones
    dropped: usize,   // coded pages whose wide form is gone
}

/// One head of a page that is not coded.
pub enum WidePage<'a> {
    /// In f32.
    Plain(KvRows<'a>),
    /// In anything else.
    Narrow(NarrowPage<'a>),
}

impl KvShape {
    /// That of a layer of these dimensions.
    pub fn of(attention: &Attention, format: KvFormat) -> Self {
        Self { kv_heads: attention.kv_heads, head_dim: attention.head_dim, format }
    }

    /// Bytes a cache of `positions` takes between two chunks, whole pages.
    pub fn bytes(&self, positions: usize) -> u64 {
        let pages = positions.div_ceil(PAGE_POSITIONS);
        let coded = self.format.coded_pages(pages);
        ((pages - coded) * memory(self.wide_bytes()) + coded * memory(self.coded_bytes())) as u64
    }

    /// Bytes that it takes beside that while a chunk of `tokens` passes.
    pub fn chunk_bytes(&self, tokens: usize) -> u64 {
        let pages = tokens.div_ceil(PAGE_POSITIONS) + 1;
        self.format.codes().map_or(0, |_| (pages * memory(self.wide_bytes())) as u64)
    }

    /// Bytes of a page that is not coded.
    pub fn page_bytes(&self) -> u64 {
        self.wide_bytes().next_multiple_of(size_of::<Line>()) as u64
    }

    fn wide_bytes(&self) -> usize {
        2 * wide_half(self.format, self.head_dim).bytes(self.kv_heads)
    }

    fn coded_bytes(&self) -> usize {
        let half = |bits: CodeBits| coded_half(bits, self.head_dim).bytes(self.kv_heads);
        self.format.codes().map_or(0, |codes| half(codes.keys) + half(codes.values))
    }
}

/// Memory of a page: whole lines, and one for the count of who shares it.
fn memory(bytes: usize) -> usize {
    (bytes.div_ceil(size_of::<Line>()) + 1) * size_of::<Line>()
}

fn zero_page(bytes: usize) -> Page {
    std::iter::repeat_n(Line::zeroed(), bytes.div_ceil(size_of::<Line>())).collect()
}

/// Elements or codes, and scales, of one head; `first` is 0 for keys, their size for values.
fn places(half: Half, (kv_heads, head): (usize, usize), first: usize) -> [Range<usize>; 2] {
    let start = first + head * half.head_bytes;
    let scales = first + kv_heads * half.head_bytes + head * half.scale_bytes;
    [start..start + half.head_bytes, scales..scales + half.scale_bytes]
}

impl KvCache {
    /// An empty cache.
    pub fn new(shape: KvShape) -> Self {
        Self::zeroed(shape, 0)
    }

    /// A cache of so many positions, as it is between two chunks, whose bytes are zero.
    pub fn zeroed(shape: KvShape, positions: usize) -> Self {
        let pages = positions.div_ceil(PAGE_POSITIONS);
        let coded = shape.format.coded_pages(pages);
        let zeros = |count, bytes| (0..count).map(|_| zero_page(bytes)).collect();
        Self {
            shape,
            positions,
            wide: zeros(pages - coded, shape.wide_bytes()),
            coded: zeros(coded, shape.coded_bytes()),
            dropped: coded,
        }
    }

    /// Positions stored.
    pub fn len(&self) -> usize {
        self.positions
    }

    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.positions == 0
    }

    /// Whether keys and values are in the codes' basis, in which queries are to be as well, and from
    /// which the mix is to be brought back.
    pub fn is_rotated(&self) -> bool {
        self.shape.format.codes().is_some()
    }

    /// Bytes stored.
    pub fn bytes(&self) -> u64 {
        self.pages().map(|page| size_of_val(&**page) as u64).sum()
    }

    /// Appends positions: `keys` and `values` are `[positions][kv_heads][head_dim]`.
    pub fn append(&mut self, keys: &[f32], values: &[f32]) {
        let width = self.shape.kv_heads * self.shape.head_dim;
        for (key, value) in keys.chunks_exact(width).zip(values.chunks_exact(width)) {
            self.push(key, value);
        }
        self.encode_old();
    }

    fn push(&mut self, key: &[f32], value: &[f32]) {
        let KvShape { kv_heads, head_dim, format } = self.shape;
        let position = self.positions % PAGE_POSITIONS;
        if position == 0 {
            self.wide.push(zero_page(self.shape.wide_bytes()));
        }
        let page = self.wide.last_mut().expect("a page was just made or is not full");
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(Arc::make_mut(page));
        let half = wide_half(format, head_dim);
        for (rows, first) in [(key, 0), (value, half.bytes(kv_heads))] {
            for (head, row) in rows.chunks_exact(head_dim).enumerate() {
                let [elements, scales] = places(half, (kv_heads, head), first);
                let size = half.head_bytes / PAGE_POSITIONS;
                let to = elements.start + position * size;
                let scale = write_row(format, row, &mut bytes[to..to + size]);
                if let (Some(scale), false) = (scale, scales.is_empty()) {
                    bytemuck::cast_slice_mut::<u8, f32>(&mut bytes[scales])[position] = scale;
                }
            }
        }
        self.positions += 1;
    }

    /// Gives the wide form of coded pages up. Called between two chunks.
    pub fn settle(&mut self) {
        if let Some(codes) = self.shape.format.codes() {
            let done = self.coded.len() - self.dropped;
            if done > 0 {
                self.wide.drain(codes.sink_pages..codes.sink_pages + done);
                self.dropped = self.coded.len();
            }
        }
    }

    /// Position from which on tokens see a page in codes, if they ever do.
    pub fn coded_from(&self, page: usize) -> Option<usize> {
        let codes = self.shape.format.codes()?;
        let sees = (page + codes.recent_pages + 1) * PAGE_POSITIONS;
        (page >= codes.sink_pages).then_some(sees)
    }

    /// Codes the pages that the last position sees in codes.
    fn encode_old(&mut self) {
        let Some(codes) = self.shape.format.codes().copied() else { return };
        let pages = self.positions.div_ceil(PAGE_POSITIONS);
        for page in
            codes.sink_pages + self.coded.len()..pages.saturating_sub(codes.recent_pages + 1)
        {
            let mut coded = zero_page(self.shape.coded_bytes());
            let to = Arc::get_mut(&mut coded).expect("a page that was just made is not shared");
            self.encode_page(&codes, page, bytemuck::cast_slice_mut(to));
            self.coded.push(coded);
        }
    }

    fn encode_page(&self, codes: &KvCodes, page: usize, to: &mut [u8]) {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let mut first = 0;
        for (bits, order) in [(codes.keys, Order::Keys), (codes.values, Order::Values)] {
            let half = coded_half(bits, head_dim);
            for head in 0..kv_heads {
                let WidePage::Narrow(wide) = self.wide(head, page, PAGE_POSITIONS) else {
                    unreachable!("pages that will be coded are narrow")
                };
                let rows = if order == Order::Keys { wide.keys } else { wide.values };
                let [elements, scales] = places(half, (kv_heads, head), first);
                let mut of_page = [0.0; PAGE_POSITIONS];
                with_scratch(PAGE_POSITIONS * head_dim, |floats| {
                    // One instruction set for all: codes are not to depend on it.
                    Isa::scalar().widen_rows(&rows, head_dim, floats);
                    encode(bits, order, floats, &mut to[elements], &mut of_page);
                });
                to[scales].copy_from_slice(bytemuck::cast_slice(&of_page));
            }
            first += half.bytes(kv_heads);
        }
    }

    /// Keys and values of one head in a page that some token sees wide, its first `positions`.
    pub fn wide(&self, head: usize, page: usize, positions: usize) -> WidePage<'_> {
        let KvShape { kv_heads, head_dim, format } = self.shape;
        let sink = format.codes().map_or(usize::MAX, |codes| codes.sink_pages);
        let at = if page < sink { page } else { page - self.dropped };
        let bytes: &[u8] = bytemuck::cast_slice(&self.wide[at]);
        let half = wide_half(format, head_dim);
        let rows = |first| {
            let [elements, scales] = places(half, (kv_heads, head), first);
            let elements = &bytes[elements][..half.head_bytes / PAGE_POSITIONS * positions];
            (elements, &bytes[scales])
        };
        let (keys, values) = (rows(0), rows(half.bytes(kv_heads)));
        if format == KvFormat::F32 {
            let (keys, values) = (bytemuck::cast_slice(keys.0), bytemuck::cast_slice(values.0));
            return WidePage::Plain(KvRows { keys, values });
        }
        let narrow = |(elements, scales)| match format {
            KvFormat::Bf16 => NarrowRows::Bf16(elements),
            KvFormat::Int8 => {
                let scales = &bytemuck::cast_slice(scales)[..positions];
                NarrowRows::Int8 { codes: bytemuck::cast_slice(elements), scales }
            }
            _ => NarrowRows::F16(elements),
        };
        WidePage::Narrow(NarrowPage { keys: narrow(keys), values: narrow(values) })
    }

    /// Keys and values of one head in a page that some token sees in codes.
    pub fn coded(&self, head: usize, page: usize) -> CodedPage<'_> {
        let KvShape { kv_heads, head_dim, format } = self.shape;
        let codes = format.codes().expect("a page in codes");
        let bytes: &[u8] = bytemuck::cast_slice(&self.coded[page - codes.sink_pages]);
        let rows = |bits, first| {
            let [elements, scales] = places(coded_half(bits, head_dim), (kv_heads, head), first);
            let scales = bytemuck::cast_slice(&bytes[scales]);
            CodedRows { bits, codes: &bytes[elements], scales }
        };
        let values = coded_half(codes.keys, head_dim).bytes(kv_heads);
        CodedPage { keys: rows(codes.keys, 0), values: rows(codes.values, values) }
    }

    /// The pages, in an order that depends on the number of positions alone.
    pub fn pages(&self) -> impl Iterator<Item = &Page> {
        self.wide.iter().chain(&self.coded)
    }

    /// The bytes of the pages, in the same order; one that is shared is copied first.
    pub fn pages_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let pages = self.wide.iter_mut().chain(&mut self.coded);
        pages.map(|page| bytemuck::cast_slice_mut(Arc::make_mut(page)))
    }

    /// What all keys and all values stand for, `[kv_heads][positions][head_dim]`.
    pub fn rows(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in 0..self.shape.kv_heads {
            for page in 0..self.positions.div_ceil(PAGE_POSITIONS) {
                let positions = PAGE_POSITIONS.min(self.positions - page * PAGE_POSITIONS);
                let [k, v] = self.page_rows(head, page, positions);
                keys.extend(k);
                values.extend(v);
            }
        }
        (keys, values)
    }

    /// Keys and values of one head in one page as the latest position sees them.
    fn page_rows(&self, head: usize, page: usize, positions: usize) -> [Vec<f32>; 2] {
        let width = self.shape.head_dim;
        let is_coded = self.coded_from(page).is_some_and(|from| self.positions > from);
        let mut rows = [(); 2].map(|()| vec![0.0; positions * width]);
        let [keys, values] = &mut rows;
        if is_coded {
            let coded = self.coded(head, page);
            decode(&coded.keys, Order::Keys, keys);
            decode(&coded.values, Order::Values, values);
        } else {
            match self.wide(head, page, positions) {
                WidePage::Plain(plain) => {
                    keys.copy_from_slice(plain.keys);
                    values.copy_from_slice(plain.values);
                }
                WidePage::Narrow(narrow) => {
                    Isa::scalar().widen_rows(&narrow.keys, width, keys);
                    Isa::scalar().widen_rows(&narrow.values, width, values);
                }
            }
        }
        if self.is_rotated() {
            rows.iter_mut().flat_map(|rows| rows.chunks_exact_mut(width)).for_each(rotate_back);
        }
        rows
    }
}

/// One vector in a wide page's numbers, and its scale where the format has one.
fn write_row(format: KvFormat, row: &[f32], to: &mut [u8]) -> Option<f32> {
    match format {
        KvFormat::F32 => to.copy_from_slice(bytemuck::cast_slice(row)),
        KvFormat::F16 => narrow_f16(row, to),
        KvFormat::Bf16 => narrow_bf16(row, to),
        KvFormat::Int8 => return Some(encode_int8(row, bytemuck::cast_slice_mut(to))),
        KvFormat::Codes(_) => with_scratch(row.len(), |rotated| {
            rotated.copy_from_slice(row);
            rotate(rotated);
            narrow_f16(rotated, to);
        }),
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(name: &str, head_dim: usize, positions: usize) -> (KvCache, Vec<f32>) {
        let format = name.parse::<KvFormat>().expect("a format").with_window(1, 1);
        let mut cache = KvCache::new(KvShape { kv_heads: 2, head_dim, format });
        let number = |i: usize| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32;
        let all: Vec<f32> =
            (0..positions * 2 * head_dim).map(|i| number(i) / (1 << 23) as f32 - 1.0).collect();
        let values: Vec<f32> = all.iter().map(|x| -x).collect();
        cache.append(&all, &values);
        (cache, all)
    }

    #[test]
    fn rows_come_back_across_page_borders() {
        let positions = 2 * PAGE_POSITIONS + 1;
        let (cache, all) = cache("f32", 3, positions);
        let (keys, values) = cache.rows();
        for head in 0..2 {
            for position in 0..positions {
                let want = &all[(position * 2 + head) * 3..][..3];
                let at = (head * positions + position) * 3;
                assert_eq!(keys[at..at + 3], *want);
                assert_eq!(values[at..at + 3], [-want[0], -want[1], -want[2]]);
            }
        }
        let WidePage::Plain(first) = cache.wide(0, 1, 1) else { panic!("f32 is plain") };
        for rows in [first.keys, first.values] {
            assert!(rows.as_ptr().addr().is_multiple_of(64));
        }
    }

    #[test]
    fn every_format_keeps_what_it_says_it_keeps() {
        // Relative error of a whole cache, of which codes leave 3 of 5 pages in halves.
        for (name, bound) in [
            ("f32", 0.0),
            ("f16", 5e-4),
            ("bf16", 3e-3),
            ("int8", 6e-3),
            ("tq4", 0.075),
            ("tq3", 0.13),
            ("tq2", 0.23),
        ] {
            let positions = 4 * PAGE_POSITIONS + 10;
            let (mut cache, all) = cache(name, 64, positions);
            cache.settle();
            let (keys, values) = cache.rows();
            let (mut error, mut size) = (0.0, 0.0);
            for head in 0..2 {
                for (i, want) in
                    (0..positions * 64).map(|i| (i, all[(i / 64 * 2 + head) * 64 + i % 64]))
                {
                    let at = head * positions * 64 + i;
                    error += (keys[at] - want).powi(2) + (values[at] + want).powi(2);
                    size += 2.0 * want * want;
                }
            }
            let error = f32::sqrt(error / size);
            assert!(error <= bound && error >= bound / 3.0, "{name}: {error}");
        }
    }

    #[test]
    fn memory_is_that_of_the_arithmetic() {
        let a = |format: &str| KvShape {
            kv_heads: 2,
            head_dim: 256,
            format: format.parse().expect("a format"),
        };
        for (name, vector) in
            [("f32", 1024), ("f16", 512), ("int8", 260), ("tq2", 68), ("tq4", 132)]
        {
            let (bytes, plain) = (a(name).bytes(131_072), 131_072 * 4 * vector);
            assert!(bytes >= plain && bytes <= plain + plain / 20, "{name}: {bytes} for {plain}");
        }
        assert_eq!(a("f32").chunk_bytes(512), 0);
    }
}
