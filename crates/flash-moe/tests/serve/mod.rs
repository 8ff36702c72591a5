//! The server as its clients see it: the built program on a free port, and a small HTTP client.
//!
//! `client` starts the program and speaks HTTP/1.1 with it; the other modules hold the claims, by
//! what they are about.

pub mod client;

mod agents;
mod answers;
mod prefix;
mod protocols;
mod shapes;
mod unfriendly;

mod operation;
