//! Page-aligned owned bytes.
//!
//! Expert slots and dense weights live in blocks of 4096-byte pages, because direct reads need the
//! memory, the offset and the length aligned to that. A block is zeroed when made and never grows.

use bytemuck::{Pod, Zeroable};

/// Alignment of record strides, direct reads and blocks, in bytes.
pub const PAGE_BYTES: usize = 4096;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

const _: () = assert!(size_of::<Page>() == PAGE_BYTES && align_of::<Page>() == PAGE_BYTES);

/// An owned, page-aligned run of bytes.
pub struct Block {
    pages: Vec<Page>,
    bytes: usize,
}

impl Block {
    /// A zeroed block of `bytes`, rounded up to whole pages in memory.
    pub fn zeroed(bytes: usize) -> Self {
        Self { pages: bytemuck::zeroed_vec(bytes.div_ceil(PAGE_BYTES)), bytes }
    }

    /// The bytes asked for.
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.pages)[..self.bytes]
    }

    /// The bytes asked for, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.pages)[..self.bytes]
    }
}

/// `bytes` rounded up to whole pages.
pub fn page_multiple(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_aligned_zeroed_and_exactly_as_long_as_asked() {
        for bytes in [0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1] {
            let mut block = Block::zeroed(bytes);
            assert_eq!(block.bytes(), vec![0; bytes]);
            assert!(block.bytes_mut().as_ptr().addr().is_multiple_of(PAGE_BYTES));
        }
        assert_eq!(page_multiple(4097), 8192);
    }
}
