//! `https://` servers: one whose certificate holds is spoken to, any other is refused with the reason.
//!
//! The certificates are `certificates/`, made by the script there; `SSL_CERT_FILE` says what is trusted.

use std::io::Write;
use std::process::{Output, Stdio};

use serde_json::json;

use super::screen::answer;
use super::server::{Scripted, certificate};
use crate::program::{Home, stderr};

/// What a chat with a server at this address says to one message, with these authorities.
fn hello(url: &str, trusted: &str) -> Output {
    let home = Home::new();
    let mut command = home.command(&["chat", "--connect", url, "-m", "scripted"]);
    command.env("SSL_CERT_FILE", trusted).env_remove("SSL_CERT_DIR");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let mut input = child.stdin.take().expect("a pipe");
    // It may have ended before it reads.
    input.write_all(b"Hello\n").unwrap_or(());
    drop(input);
    child.wait_with_output().expect("the program ends")
}

fn server(name: &str) -> Scripted {
    let answers = vec![answer(json!({ "content": "Hello yourself." }), "stop")];
    match name {
        "plain" => Scripted::start(answers),
        name => Scripted::start_secure(answers, name),
    }
}

#[test]
fn a_certificate_that_holds_is_spoken_to_by_name_and_by_address() {
    for host in ["localhost", "127.0.0.1"] {
        let server = server("server.pem");
        let output = hello(&server.url_of("https", host), &certificate("authority.pem"));
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(output.stdout, b"Hello yourself.\n");
        assert_eq!(server.request()["messages"][0]["content"], "Hello");
    }
}

#[test]
fn any_other_server_is_refused_with_the_host_and_the_reason() {
    let trusted = certificate("authority.pem");
    let nobody = Home::new().write("nobody.pem", "");
    for (name, scheme, trusted, why) in [
        ("server.pem", "https", &certificate("other.pem"), "localhost does not hold: nobody whom"),
        ("other.pem", "https", &trusted, "localhost does not hold: certificate not valid for name"),
        ("plain", "https", &trusted, "localhost does not speak TLS on this port"),
        ("server.pem", "http", &trusted, "the connection broke"),
        ("server.pem", "https", &nobody, "this system trusts no authority"),
    ] {
        let server = server(name);
        let output = hello(&server.url_of(scheme, "localhost"), trusted);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{name} {scheme}: {said}");
        assert!(said.contains(why), "{name} {scheme}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}
