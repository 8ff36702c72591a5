//! Experts on disk, in a bounded pool of slots.

pub mod read;
