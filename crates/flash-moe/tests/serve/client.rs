//! A server of our own and the requests that tests make of it.
//!
//! The client is a few calls on a socket: a request, its whole answer, or a stream that is read as it
//! comes. The server's port is the one it prints.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::program::Home;

/// A template that knows tools and thinking, which the built-in model's own does not.
pub const TEMPLATE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/template/qwen3.5.jinja");

/// A running server.
pub struct Server {
    child: Child,
    address: String,
    log: Option<std::thread::JoinHandle<String>>,
    _home: Home,
}

/// An answer.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The data of a stream's events, the final mark left out.
    pub fn events(&self) -> Vec<Value> {
        let lines = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        let data = lines.filter(|data| *data != "[DONE]");
        data.map(|data| serde_json::from_str(data).unwrap_or_else(|e| panic!("{e}: {data}")))
            .collect()
    }
}

impl Server {
    /// A server with the built-in model, a template with tools, and these flags.
    pub fn start(flags: &[&str]) -> Self {
        let home = Home::new();
        let mut all = vec!["serve", "--port", "0", "--memory", "600MiB", "--threads", "1"];
        if !flags.contains(&"--chat-template") {
            all.extend(["--chat-template", TEMPLATE]);
        }
        all.extend_from_slice(flags);
        let mut command = home.command(&all);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut seen = String::new();
        let address = loop {
            let mut line = String::new();
            let bytes = lines.read_line(&mut line).expect("standard error");
            assert!(bytes > 0, "the server ended: {seen}");
            seen += &line;
            if let Some((_, rest)) = line.split_once("listening on http://") {
                break rest.split(' ').next().expect("an address").to_string();
            }
        };
        let log = std::thread::spawn(move || {
            let mut rest = seen;
            lines.read_to_string(&mut rest).expect("standard error");
            rest
        });
        Self { child, address, log: Some(log), _home: home }
    }

    /// Where it listens: a host and a port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A connection.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        stream
    }

    /// Sends a request and gives the connection on which its answer comes.
    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> TcpStream {
        let mut stream = self.connect();
        let mut head =
            format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.address);
        for header in headers {
            head += &format!("{header}\r\n");
        }
        if !body.is_empty() {
            head +=
                &format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
        }
        stream.write_all(format!("{head}\r\n{body}").as_bytes()).expect("sending");
        stream
    }

    /// A whole exchange.
    pub fn request(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
        read_answer(self.send(method, path, headers, body))
    }

    /// `GET`.
    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], "")
    }

    /// `POST` of JSON.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, &[], &body.to_string())
    }

    /// `POST` of JSON that must be answered, and its JSON.
    pub fn ask(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.body);
        answer.json()
    }

    /// `POST` of JSON that must be refused, with this status, and what is said.
    pub fn refuse(&self, path: &str, body: &Value, status: u16) -> String {
        let answer = self.post(path, body);
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        answer.json()["error"]["message"].as_str().expect("a message").to_string()
    }

    /// Waits until no text is being generated.
    pub fn wait_until_idle(&self) {
        self.wait_until(|health| health["live"] == 0 && health["waiting"] == 0);
    }

    /// Waits until the server's health is as wanted, for 30 seconds at least.
    pub fn wait_until(&self, wanted: impl Fn(&Value) -> bool) {
        for _ in 0..3000 {
            if wanted(&self.get("/health").json()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("waited in vain: {}", self.get("/health").body);
    }

    /// Asks the server to end.
    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-TERM", &pid]).status().expect("kill");
        assert!(status.success());
    }

    /// Waits for the server's end; gives its status and its log.
    pub fn ended(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().expect("the server");
        let log = self.log.take().expect("a log").join().expect("the log");
        (status, log)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended already is what is wanted.
        self.child.kill().unwrap_or(());
        self.child.wait().expect("the server");
    }
}

/// Reads an answer to its end.
pub fn read_answer(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("an answer");
    let text = String::from_utf8(bytes).expect("text");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text:?}"));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status");
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect();
    let chunked =
        headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
    let body = if chunked { unchunked(body) } else { body.to_string() };
    Answer { status: status.parse().expect("a number"), headers, body }
}

fn unchunked(body: &str) -> String {
    let (mut rest, mut text) = (body, String::new());
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("the size of a chunk");
        if size == 0 {
            return text;
        }
        text += &after[..size];
        rest = &after[size + 2..];
    }
    panic!("the last chunk is missing: {body:?}");
}

/// Reads a stream until a line contains `wanted`.
pub fn read_until(stream: &TcpStream, wanted: &str) {
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        assert!(lines.read_line(&mut line).expect("a line") > 0, "no {wanted:?} in the stream");
        if line.contains(wanted) {
            return;
        }
    }
}
