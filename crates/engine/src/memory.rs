//! Page-aligned owned bytes.
//!
//! Expert slots and dense weights live in blocks of 4096-byte pages, because direct reads need the
//! memory, the offset and the length aligned to that. A block is zero when made and never grows. The
//! system hands out zero pages as they are touched, so making a block costs nothing: an allocator
//! that is asked for the alignment itself would write zeros first.

/// Alignment of record strides, direct reads and blocks, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// An owned, page-aligned run of bytes.
pub struct Block {
    memory: Vec<u8>, // never grows, so it stays where it is
    start: usize,
    bytes: usize,
}

impl Block {
    /// A block of zeros, rounded up to whole pages in memory.
    pub fn zeroed(bytes: usize) -> Self {
        let memory = vec![0; Self::memory_bytes(bytes)];
        let start = memory.as_ptr().align_offset(PAGE_BYTES);
        Self { memory, start, bytes }
    }

    /// Memory that a block of `bytes` takes: whole pages, and one for its alignment.
    pub const fn memory_bytes(bytes: usize) -> usize {
        bytes.next_multiple_of(PAGE_BYTES) + PAGE_BYTES
    }

    /// The bytes asked for.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.bytes]
    }

    /// The bytes asked for, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.bytes]
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
