//! Every test of the whole program, in one binary.
//!
//! One binary links once and uses all of the shared modules. `fixture` makes the tiny models,
//! `program` runs the built program, `source` takes the repository's own code apart.

mod fixture;
mod program;
mod source;

mod tidy;

mod checkpoint;
mod convert;

mod invariance;
mod parity;

mod bench;
mod hot_set;
mod run;
