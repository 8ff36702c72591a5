//! A server that answers chat completions with what a test wrote, in order.
//!
//! Remembers every request, so that a test sees what the program sent back.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use serde_json::Value;

/// The server.
pub struct Scripted {
    address: String,
    requests: Receiver<Value>,
}

impl Scripted {
    /// Answers one question after the other with these events. One that does not end with `[DONE]`
    /// breaks off.
    pub fn start(answers: Vec<Vec<Value>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let (sender, requests) = channel();
        thread::spawn(move || {
            for answer in answers {
                let (stream, _) = listener.accept().expect("a connection");
                serve(stream, &answer, &sender);
            }
        });
        Self { address, requests }
    }

    /// Answers one request of any kind with these bytes.
    pub fn once(response: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let (_, requests) = channel();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let head = BufReader::new(stream.try_clone().expect("a copy")).lines();
            head.take_while(|line| line.as_ref().is_ok_and(|line| !line.is_empty())).for_each(drop);
            stream.write_all(response.as_bytes()).expect("a client");
        });
        Self { address, requests }
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next request.
    pub fn request(&self) -> Value {
        self.requests.recv().expect("a request")
    }

    /// Requests that were not looked at.
    pub fn requests(&self) -> Vec<Value> {
        self.requests.try_iter().collect()
    }
}

fn serve(mut stream: TcpStream, answer: &[Value], requests: &Sender<Value>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a copy"));
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a header");
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    requests.send(serde_json::from_slice(&body).expect("JSON")).expect("a test that listens");
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("a client");
    for event in answer {
        let data = event.as_str().map_or_else(|| event.to_string(), str::to_string);
        stream.write_all(format!("data: {data}\n\n").as_bytes()).expect("a client");
    }
}
