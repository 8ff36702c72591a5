//! The address of a server, as far as a client of one interface needs it.
//!
//! Takes `http://HOST[:PORT][/PATH]` and `https://` alike, with or without the `/v1` that OpenAI's
//! interface begins with. Refuses anything else, with what was expected.

use anyhow::{Result, bail, ensure};

/// Where a server is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    pub is_secure: bool,
    pub host: String,
    pub port: u16,
    /// The path that all routes begin with, without a slash at its end.
    pub base: String,
}

impl Address {
    /// Reads an address.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self> {
        let expected = "expected http://HOST:PORT or https://HOST, and perhaps a path";
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let is_secure = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            other => bail!("--connect: {other}:// is not spoken here; {expected}"),
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        ensure!(
            !authority.contains('@') && !path.contains(['?', '#', ' ']),
            "--connect {text:?}: {expected}; a key goes into --api-key-file"
        );
        let (host, port) = split_port(authority);
        let port = match port {
            None => {
                if is_secure {
                    443
                } else {
                    80
                }
            }
            Some(port) => match port.parse() {
                Ok(port) if port > 0 => port,
                _ => bail!("--connect {text:?}: {port:?} is no port; {expected}"),
            },
        };
        let is_name = !host.is_empty() && host.chars().all(|c| c.is_ascii_graphic() && c != '/');
        ensure!(is_name, "--connect {text:?}: no host; {expected}");
        let path = path.trim_end_matches('/');
        let base = if path.ends_with("/v1") { path.into() } else { format!("{path}/v1") };
        Ok(Self { is_secure, host: host.into(), port, base })
    }

    /// The value of the `host` header.
    pub fn authority(&self) -> String {
        match (self.is_secure, self.port) {
            (true, 443) | (false, 80) => self.host.clone(),
            (_, port) => format!("{}:{port}", self.host),
        }
    }

    /// What a socket connects to: an IPv6 address without its brackets.
    pub fn socket_host(&self) -> &str {
        self.host.trim_start_matches('[').trim_end_matches(']')
    }
}

/// The port behind the last colon, unless that is part of a bracketed address.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_their_parts() {
        for (text, secure, authority, base) in [
            ("http://127.0.0.1:8080", false, "127.0.0.1:8080", "/v1"),
            ("localhost:8080/v1/", false, "localhost:8080", "/v1"),
            ("https://example.org", true, "example.org", "/v1"),
            ("https://example.org/api/v1", true, "example.org", "/api/v1"),
            ("HTTP://[::1]:9000/x", false, "[::1]:9000", "/x/v1"),
            ("http://[::1]", false, "[::1]", "/v1"),
        ] {
            let address = Address::parse(text).unwrap();
            let got = (address.is_secure, address.authority(), address.base.clone());
            assert_eq!(got, (secure, authority.into(), base.into()), "{text}");
        }
        assert_eq!(Address::parse("http://[::1]:1").unwrap().socket_host(), "::1");
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "http://",
            "ftp://x",
            "http://x:0",
            "http://x:99999",
            "http://k@x",
            "http://x/?a",
            "http://a b",
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
