//! The interfaces: what each reads from a request and how it writes an answer.
//!
//! `fields` and `refusal` are how a request is read and refused, `request` what it becomes, `message`
//! what an answer is made of. One module for each interface stands on these.

pub mod fields;
pub mod refusal;

pub mod request;

pub mod message;

pub mod chat;
pub mod chat_messages;
pub mod completions;
pub mod messages;
pub mod response_store;
pub mod responses;
pub mod tokens;

#[cfg(test)]
mod round_trip;
