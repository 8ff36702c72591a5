//! Every test of the whole program, in one binary.
//!
//! One binary links once and uses all of the shared modules. `fixture` makes the tiny models,
//! `program` runs the built program, `source` takes the repository's own code apart, `ledger` holds
//! the counts. Only `allocations.rs` is a program of its own, for the sake of its allocator.

mod fixture;
mod ledger;
mod program;
mod source;

mod tidy;

mod checkpoint;
mod convert;

mod invariance;
mod parity;

mod bench;
mod chat;
mod counts;
mod gpu;
mod hot_set;
mod run;
mod serve;
mod state;
mod together;
