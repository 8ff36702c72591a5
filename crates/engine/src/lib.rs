//! The flash-moe engine.
//!
//! Knows the model; opens no socket, prints nothing, reads no environment, never exits. Modules
//! stand in the order in which a token meets them.

pub mod error;
pub mod memory;

pub mod container;
pub mod shape;

pub mod chat_template;
pub mod tokenizer;

pub mod store;

pub mod generation;
pub mod sampler;

pub use error::{Error, Result};
