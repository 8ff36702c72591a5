//! The blocks of a decoder layer, each a function over token rows.
//!
//! `attention`, by way of `attend`, and `delta_net` mix positions; `router` chooses experts; `experts`
//! computes them. All take `[tokens][hidden]` rows, for one token as for a chunk of a prompt, and keep
//! no state of their own: what lasts lives in the session.

pub mod attend;
pub mod attention;
pub mod delta_net;

pub mod router;

pub mod experts;
pub mod lookahead;
