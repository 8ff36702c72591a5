//! The flash-moe engine.
//!
//! Knows the model; opens no socket, prints nothing, reads no environment, never exits. Modules
//! stand in the order in which a token meets them.

pub mod error;
pub mod machine;
pub mod memory;

pub mod container;
pub mod shape;

pub mod chat_template;
pub mod tokenizer;

pub mod budget;
pub mod engine;
pub mod pool;
pub mod weights;

pub mod session;

#[cfg_attr(not(feature = "gpu"), path = "no_gpu.rs")]
pub mod gpu;

mod compute;
mod layer;

pub use compute::Arithmetic;
pub use layer::lookahead::Lookahead;

pub mod kv_cache;
pub mod store;

pub mod generation;
pub mod logprobs;
pub mod reply;
pub mod sampler;

pub mod timing;
pub mod trace;

pub use error::{Error, Result};
