//! A server that answers chat completions with what a test wrote, in order, with or without TLS.
//!
//! Remembers every request, so that a test sees what the program sent back.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use serde_json::Value;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig, ServerConnection};

/// The path of a file of `certificates/`.
pub fn certificate(name: &str) -> String {
    format!("{}/tests/chat/certificates/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The server.
pub struct Scripted {
    address: String,
    requests: Receiver<Value>,
}

impl Scripted {
    /// Answers one question after the other with these events. One that does not end with `[DONE]`
    /// breaks off.
    pub fn start(answers: Vec<Vec<Value>>) -> Self {
        Self::listen(answers, None)
    }

    /// The same with TLS and this certificate.
    pub fn start_secure(answers: Vec<Vec<Value>>, name: &str) -> Self {
        let chain = CertificateDer::pem_file_iter(certificate(name)).expect("a certificate");
        let chain = chain.map(|one| one.expect("a certificate")).collect();
        let key = PrivateKeyDer::from_pem_file(certificate("server.key")).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("a certificate of this key");
        Self::listen(answers, Some(Arc::new(config)))
    }

    fn listen(answers: Vec<Vec<Value>>, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let (sender, requests) = channel();
        thread::spawn(move || {
            for answer in answers {
                let (stream, _) = listener.accept().expect("a connection");
                match &tls {
                    None => serve(stream, &answer, &sender),
                    Some(tls) => {
                        let mut stream = stream;
                        let connection = ServerConnection::new(Arc::clone(tls));
                        let mut connection = connection.expect("a connection");
                        // A client may refuse the certificate.
                        if connection.complete_io(&mut stream).is_ok() {
                            let stream = rustls::StreamOwned::new(connection, stream);
                            serve(stream, &answer, &sender);
                        }
                    }
                }
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

    /// Its address with another scheme and another name of this machine.
    pub fn url_of(&self, scheme: &str, host: &str) -> String {
        let (_, port) = self.address.rsplit_once(':').expect("a port");
        format!("{scheme}://{host}:{port}")
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

fn serve(stream: impl Read + Write, answer: &[Value], requests: &Sender<Value>) {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).is_err() {
            // What is no text is no request.
            reader.get_mut().write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").expect("a client");
            return;
        }
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
    let stream = reader.get_mut();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("a client");
    for event in answer {
        let data = event.as_str().map_or_else(|| event.to_string(), str::to_string);
        stream.write_all(format!("data: {data}\n\n").as_bytes()).expect("a client");
    }
}
