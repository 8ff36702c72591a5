//! Page-aligned owned bytes.
//!
//! Expert slots and dense weights live in blocks of 4096-byte pages, because direct reads need the
//! memory, the offset and the length aligned to that. A block is zero when made and never grows. It is
//! a mapping of its own: the system hands out zero pages as they are touched, and has them back when
//! the block is dropped, where an allocator keeps the memory of every thread that has ever asked.
//! A lent block is somebody else's memory, whatever that is aligned to.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::DerefMut;

use memmap2::MmapMut;

/// Alignment of record strides, direct reads and blocks, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// A run of bytes, page-aligned unless it is lent.
pub struct Block {
    memory: Memory,
    bytes: usize,
}

/// Bytes that another lends until they are dropped.
pub type LentBytes = Box<dyn DerefMut<Target = [u8]> + Send + Sync>;

enum Memory {
    Own(MmapMut),
    Lent(LentBytes),
}

impl Block {
    /// A block of zeros, rounded up to whole pages in memory.
    pub fn zeroed(bytes: usize) -> Self {
        let length = Self::memory_bytes(bytes).max(PAGE_BYTES);
        let memory = MmapMut::map_anon(length).unwrap_or_else(|_| {
            let layout = Layout::from_size_align(length, PAGE_BYTES);
            handle_alloc_error(layout.expect("less than half of the address space"))
        });
        Self { memory: Memory::Own(memory), bytes }
    }

    /// Memory that another lends.
    pub fn lent(memory: LentBytes) -> Self {
        Self { bytes: memory.len(), memory: Memory::Lent(memory) }
    }

    /// Memory that a block of `bytes` takes.
    pub const fn memory_bytes(bytes: usize) -> usize {
        bytes.next_multiple_of(PAGE_BYTES)
    }

    /// The bytes asked for.
    pub fn bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Own(memory) => &memory[..self.bytes],
            Memory::Lent(memory) => memory,
        }
    }

    /// The bytes asked for, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Own(memory) => &mut memory[..self.bytes],
            Memory::Lent(memory) => memory,
        }
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
