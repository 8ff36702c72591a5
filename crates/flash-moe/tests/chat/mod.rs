//! The chat as its users run it: with pipes, in a terminal, killed and taken up again.
//!
//! `client` has what depends on a server's words, `terminal` is a pseudo-terminal with an emulator behind
//! it, `server` a server that says what a test tells it to. The screens that the unit tests compare are in
//! `screens`.

#[cfg(unix)]
mod mcp;
#[cfg(unix)]
mod mcp_server;
mod plain;

#[cfg(unix)]
mod client;
#[cfg(unix)]
mod screen;
#[cfg(unix)]
mod server;
#[cfg(unix)]
mod terminal;
#[cfg(unix)]
mod tls;
