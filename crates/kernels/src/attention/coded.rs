//! Keys and values as codes of two to four bits, and attention on the codes themselves.
//!
//! Owns the code books, the order of codes in a page, their making, and the form in which queries
//! and weights meet them. A page is [`CODED_POSITIONS`] positions of one KV head, in a basis in which
//! the elements of a vector are near to normally distributed ([`rotate`]); each vector has one scale.
//! Levels are integers below 64 in magnitude, so the inner loops are sums of byte products: queries
//! are 8-bit integers with a scale for each row, weights 16-bit ones, since most of them are small
//! beside the largest. Refuses pages that are not full: they are kept in wider numbers.
//!
//! The one idea: 16 positions (of keys) or 16 elements (of values) lie side by side, four bytes of
//! the summed dimension each, so that a register of sums is a register of results.

use crate::isa::{Isa, Kind, dispatch_fixed};

use super::Gathered;

/// Positions of a coded page.
pub const CODED_POSITIONS: usize = 64;
/// Positions or elements side by side.
pub(crate) const SIDE: usize = 16;
/// Bytes of a unit: four bytes for each of those side by side.
pub(crate) const UNIT: usize = 4 * SIDE;
/// Levels are stored with this added, so that they are unsigned; no sum of two products with a
/// signed byte then leaves an i16.
pub(crate) const LEVEL_ZERO: u8 = 64;
/// The largest integer of a weight: its upper byte stays below 128.
pub(crate) const WEIGHT_LARGEST: f32 = 32_512.0;
/// The largest integer of a query.
pub(crate) const QUERY_LARGEST: f32 = 127.0;
/// Below this the reciprocal of a scale may overflow.
pub(crate) const TINY: f32 = 1e-30;

/// Bits of a code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodeBits {
    /// Four levels.
    Two,
    /// Eight levels.
    Three,
    /// Sixteen levels.
    Four,
}

impl CodeBits {
    /// Their number.
    pub const fn bits(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Three => 3,
            Self::Four => 4,
        }
    }

    /// Levels of the codes, ascending: the optimal ones of a normal distribution (Max, "Quantizing
    /// for minimum distortion", 1960) times the factor at which rounding them costs least.
    pub(crate) const fn levels(self) -> &'static [i8] {
        match self {
            Self::Two => &[-60, -18, 18, 60],
            Self::Three => &[-62, -39, -22, -7, 7, 22, 39, 62],
            Self::Four => &[-63, -48, -37, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 37, 48, 63],
        }
    }

    /// What a standard deviation of one is in units of the levels.
    const fn deviation(self) -> f32 {
        match self {
            Self::Two => 39.74,
            Self::Three => 28.9,
            Self::Four => 23.15,
        }
    }

    /// The levels with [`LEVEL_ZERO`] added, repeated to 16.
    pub(crate) const fn table(self) -> [u8; 16] {
        let levels = self.levels();
        let mut out = [0; 16];
        let mut i = 0;
        while i < 16 {
            out[i] = (levels[i % levels.len()] + LEVEL_ZERO as i8) as u8;
            i += 1;
        }
        out
    }

    /// Bytes of the codes of a page of one head.
    pub const fn page_bytes(self, head_dim: usize) -> usize {
        CODED_POSITIONS * head_dim * self.bits() / 8
    }
}

/// Keys or values of one KV head at the positions of a page: an element is `scale * level`.
#[derive(Clone, Copy)]
pub struct CodedRows<'a> {
    /// Bits of a code.
    pub bits: CodeBits,
    /// [`CodeBits::page_bytes`], in the order of [`Order`].
    pub codes: &'a [u8],
    /// `[CODED_POSITIONS]`.
    pub scales: &'a [f32],
}

/// One KV head of a coded page.
#[derive(Clone, Copy)]
pub struct CodedPage<'a> {
    /// In the order [`Order::Keys`].
    pub keys: CodedRows<'a>,
    /// In the order [`Order::Values`].
    pub values: CodedRows<'a>,
}

/// Which dimension is summed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Elements are summed: a unit is 16 positions of four elements, `[positions / 16][head_dim / 4]`.
    Keys,
    /// Positions are summed: a unit is 16 elements at four positions, `[head_dim / 16][positions / 4]`.
    Values,
}

impl Order {
    /// Unit and byte in it of an element.
    pub(crate) const fn place(
        self,
        position: usize,
        element: usize,
        head_dim: usize,
    ) -> (usize, usize) {
        match self {
            Self::Keys => {
                let unit = position / SIDE * (head_dim / 4) + element / 4;
                (unit, position % SIDE * 4 + element % 4)
            }
            Self::Values => {
                let unit = element / SIDE * (CODED_POSITIONS / 4) + position / 4;
                (unit, element % SIDE * 4 + position % 4)
            }
        }
    }
}

/// Query rows as integers: an element is `scale * code`.
pub struct CodedQueries<'a> {
    /// `[rows][head_dim]`.
    pub codes: &'a mut [i8],
    /// `[rows]`.
    pub scales: &'a mut [f32],
    /// Sums of each row's codes, `[rows]`.
    pub sums: &'a mut [f32],
}

/// Scratch of [`Isa::attend_coded`].
pub struct CodedScratch<'a> {
    /// `[rows][CODED_POSITIONS]`.
    pub scores: &'a mut [f32],
    /// The upper, then the lower bytes of the weights: `[2][rows][CODED_POSITIONS]`.
    pub weights: &'a mut [i8],
    /// Step of each row's weights and what their sum is in level zeros: `[2][rows]`.
    pub steps: &'a mut [f32],
    /// Levels of some units: [`CodedScratch::tile_bytes`].
    pub tile: &'a mut [u8],
}

impl CodedScratch<'_> {
    /// Bytes of the tile.
    pub const fn tile_bytes(head_dim: usize) -> usize {
        let keys = 2 * SIDE * head_dim;
        let values = 2 * SIDE * CODED_POSITIONS;
        if keys > values { keys } else { values }
    }
}

/// Whether heads of this width can be coded: a power of two from 64 to 1024.
pub const fn can_code(head_dim: usize) -> bool {
    head_dim.is_power_of_two() && head_dim >= 64 && head_dim <= 1024
}

/// Turns a vector by a fixed orthonormal matrix, sign flips followed by a Walsh-Hadamard transform:
/// inner products stay, and what was large in one element is spread over all.
///
/// # Panics
/// If the length is no power of two.
pub fn rotate(x: &mut [f32]) {
    flip_signs(x);
    transform(x);
}

/// Undoes [`rotate`].
///
/// # Panics
/// If the length is no power of two.
pub fn rotate_back(x: &mut [f32]) {
    transform(x);
    flip_signs(x);
}

/// Flips the elements that a fixed sequence of bits names (SplitMix64 of the block's number).
fn flip_signs(x: &mut [f32]) {
    for (i, x) in x.chunks_mut(64).enumerate() {
        let mut bits = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        for (j, x) in x.iter_mut().enumerate() {
            *x = f32::from_bits(x.to_bits() ^ ((bits >> j & 1) as u32) << 31);
        }
    }
}

/// The Walsh-Hadamard transform scaled to be its own inverse.
fn transform(x: &mut [f32]) {
    assert!(x.len().is_power_of_two(), "rotate: {} elements", x.len());
    let mut half = 1;
    while half < x.len() {
        for block in x.chunks_exact_mut(2 * half) {
            let (a, b) = block.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let factor = 1.0 / (x.len() as f32).sqrt();
    x.iter_mut().for_each(|x| *x *= factor);
}

/// Codes of a page: `rows [CODED_POSITIONS][head_dim]`, `codes` of [`CodeBits::page_bytes`], `scales
/// [CODED_POSITIONS]`. Each vector is compared with the levels at its own deviation, and then gets
/// the scale with the least squared error, `x . level / level . level`.
///
/// # Panics
/// If the lengths differ from these shapes or the width cannot be coded.
pub fn encode(bits: CodeBits, order: Order, rows: &[f32], codes: &mut [u8], scales: &mut [f32]) {
    let head_dim = rows.len() / CODED_POSITIONS;
    assert!(can_code(head_dim) && rows.len() == head_dim * CODED_POSITIONS, "encode: rows");
    assert_eq!(codes.len(), bits.page_bytes(head_dim), "encode: codes");
    assert_eq!(scales.len(), CODED_POSITIONS, "encode: scales");
    codes.fill(0);
    let levels = bits.levels();
    for (position, (row, scale)) in rows.chunks_exact(head_dim).zip(scales).enumerate() {
        let squares: f32 = row.iter().map(|x| x * x).sum();
        let factor = bits.deviation() / (squares / head_dim as f32).sqrt().max(TINY);
        let (mut product, mut square) = (0.0, 0.0);
        for (element, x) in row.iter().enumerate() {
            let wanted = x * factor;
            let above = |pair: &&[i8]| wanted > (f32::from(pair[0]) + f32::from(pair[1])) / 2.0;
            let code = levels.windows(2).filter(above).count();
            let level = f32::from(levels[code]);
            product += x * level;
            square += level * level;
            put(bits, codes, order.place(position, element, head_dim), code as u8);
        }
        *scale = product / square;
    }
}

/// The vectors that codes stand for: `out [CODED_POSITIONS][head_dim]`.
///
/// # Panics
/// If the lengths differ from these shapes.
pub fn decode(rows: &CodedRows, order: Order, out: &mut [f32]) {
    let head_dim = out.len() / CODED_POSITIONS;
    check_rows(rows, head_dim);
    for (position, out) in out.chunks_exact_mut(head_dim).enumerate() {
        for (element, out) in out.iter_mut().enumerate() {
            let place = order.place(position, element, head_dim);
            *out = rows.scales[position] * f32::from(level_at(rows, place));
        }
    }
}

/// Byte and shift of the lower bits of a code, and of the third where there is one. Units are packed
/// into the planes of the bytes of one: four, two or, of third bits, eight neighbours.
fn packed_at(bits: CodeBits, len: usize, (unit, byte): (usize, usize)) -> [(usize, usize); 2] {
    match bits {
        CodeBits::Four => [(unit / 2 * UNIT + byte, unit % 2 * 4), (0, 0)],
        _ => {
            let top = len / 3 * 2 + unit / 8 * UNIT + byte;
            [(unit / 4 * UNIT + byte, unit % 4 * 2), (top, unit % 8)]
        }
    }
}

fn put(bits: CodeBits, codes: &mut [u8], place: (usize, usize), code: u8) {
    let [(low, shift), (top, top_shift)] = packed_at(bits, codes.len(), place);
    match bits {
        CodeBits::Three => {
            codes[low] |= (code & 3) << shift;
            codes[top] |= code >> 2 << top_shift;
        }
        _ => codes[low] |= code << shift,
    }
}

/// The level of one element.
pub(crate) fn level_at(rows: &CodedRows, place: (usize, usize)) -> i8 {
    let [(low, shift), (top, top_shift)] = packed_at(rows.bits, rows.codes.len(), place);
    let code = match rows.bits {
        CodeBits::Two => rows.codes[low] >> shift & 3,
        CodeBits::Three => rows.codes[low] >> shift & 3 | (rows.codes[top] >> top_shift & 1) << 2,
        CodeBits::Four => rows.codes[low] >> shift & 15,
    };
    rows.bits.levels()[usize::from(code)]
}

/// Added to a number below 2^22 in magnitude, it leaves the nearest integer in the lowest bits, the
/// even one of two: a conversion that saturates would be made element by element.
const INTEGERS: f32 = 12_582_912.0;

/// The nearest integer.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    (x + INTEGERS).to_bits().wrapping_sub(INTEGERS.to_bits()) as i32
}

/// Numbers times a factor as integers of 8 bits, and their sum.
#[inline(always)]
pub(crate) fn code_bytes(x: &[f32], factor: f32, codes: &mut [i8]) -> i32 {
    let mut sum = 0i32;
    for (x, code) in x.iter().zip(codes) {
        let integer = nearest(x * factor);
        *code = integer as i8;
        sum = sum.wrapping_add(integer);
    }
    sum
}

/// The same as integers of 16 bits in two planes, `256 * hi + lo`.
#[inline(always)]
pub(crate) fn code_words(x: &[f32], factor: f32, hi: &mut [i8], lo: &mut [i8]) -> i32 {
    let mut sum = 0i32;
    for ((x, hi), lo) in x.iter().zip(hi).zip(lo) {
        let integer = nearest(x * factor);
        *hi = ((integer + 128) >> 8) as i8;
        *lo = integer as i8;
        sum = sum.wrapping_add(integer);
    }
    sum
}

fn check_rows(rows: &CodedRows, head_dim: usize) {
    assert!(can_code(head_dim), "coded page: a head of {head_dim}");
    assert_eq!(rows.codes.len(), rows.bits.page_bytes(head_dim), "coded page: codes");
    assert_eq!(rows.scales.len(), CODED_POSITIONS, "coded page: scales");
}

/// Attention on codes.
impl Isa {
    /// Brings query rows to integers: `x [rows][head_dim]`, multiplied by the scale of the scores
    /// and in the basis of the page. A row that is not finite gets a scale that is not.
    ///
    /// # Panics
    /// If the lengths differ from these shapes.
    pub fn code_queries(self, x: &[f32], out: &mut CodedQueries) {
        let rows = out.scales.len();
        assert!(out.sums.len() == rows && out.codes.len() == x.len(), "code_queries: lengths");
        assert!(rows > 0 && x.len().is_multiple_of(64 * rows), "code_queries: rows");
        dispatch_fixed!(self, code_queries(x, out));
    }

    /// Adds all positions of a coded page to what the rows have gathered, as [`Isa::attend`] does.
    /// The error beside an attention on the decoded page is that of the queries' integers, 1/254 of
    /// a row's largest element, and 1/65024 of the page's largest weight times its scale.
    ///
    /// # Panics
    /// If the lengths differ from the shapes.
    pub fn attend_coded(
        self,
        page: &CodedPage,
        queries: &CodedQueries,
        gathered: &mut Gathered,
        scratch: &mut CodedScratch,
    ) {
        let rows = queries.scales.len();
        assert!(rows > 0 && queries.sums.len() == rows, "attend_coded: queries");
        let head_dim = queries.codes.len() / rows;
        assert_eq!(queries.codes.len(), rows * head_dim, "attend_coded: queries");
        check_rows(&page.keys, head_dim);
        check_rows(&page.values, head_dim);
        assert!(gathered.max.len() == rows && gathered.sum.len() == rows, "attend_coded: rows");
        assert_eq!(gathered.mix.len(), rows * head_dim, "attend_coded: mix");
        assert_eq!(scratch.scores.len(), rows * CODED_POSITIONS, "attend_coded: scores");
        assert_eq!(scratch.weights.len(), 2 * rows * CODED_POSITIONS, "attend_coded: weights");
        assert_eq!(scratch.steps.len(), 2 * rows, "attend_coded: steps");
        assert!(scratch.tile.len() >= CodedScratch::tile_bytes(head_dim), "attend_coded: tile");
        dispatch_fixed!(self, attend_coded(page, queries, gathered, scratch));
    }
}
