//! A client of any server that speaks OpenAI's chat completions.
//!
//! One connection for each request, on one thread with a small runtime; an answer is read as
//! server-sent events and told in the terms of the engine. The progress that our own server tells in
//! comments is understood, what another server adds is passed over. An error is the server's own
//! words, and a connection that breaks is an answer that failed.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use flash_moe_engine::reply::Part;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

use super::tls::Tls;
use super::url::Address;
use super::{Done, Event, Question, Tool};
use crate::chat::conversation::{Arguments, End};
use crate::chat::line::harmless;

/// A server that cannot be reached in this time is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// A server that does not list its models in this time does not answer.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);
/// How often a wait for the server looks at whether the user has stopped it.
const STOP_INTERVAL: Duration = Duration::from_millis(30);
/// Most of an error's body that is shown.
const ERROR_BYTES_MAX: usize = 2000;
/// Longest line of a stream, and longest body that is read whole.
const BODY_BYTES_MAX: usize = 16 << 20;

/// The server, and the model that is asked for.
pub struct Remote {
    server: Server,
    key: Option<String>,
    model: String,
    runtime: Runtime,
}

/// Where it is, and how it is spoken to.
#[derive(Clone)]
struct Server {
    address: Address,
    tls: Option<Tls>,
}

impl Remote {
    /// Asks the server for its models.
    ///
    /// # Errors
    /// The address is none, or nobody answers there; its certificate does not hold; it has no model of
    /// that name.
    pub fn open(address: &str, key: Option<String>, model: Option<String>) -> Result<Self> {
        let address = Address::parse(address)?;
        let tls = address.is_secure.then(|| Tls::new(address.socket_host())).transpose()?;
        let server = Server { address, tls };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("client")
            .enable_all()
            .build()
            .context("the client's runtime")?;
        let mut remote = Self { server, key, model: String::new(), runtime };
        match model {
            Some(name) => remote.model = name,
            None => {
                let models = remote.models(LIST_TIMEOUT)?;
                let first = models.into_iter().next();
                remote.model =
                    first.context("the server lists no models; name one with --model")?;
            }
        }
        Ok(remote)
    }

    pub fn model(&self) -> &str {
        &self.model
    }

    pub fn place(&self) -> String {
        let Address { is_secure, base, .. } = &self.server.address;
        let scheme = if *is_secure { "https" } else { "http" };
        format!("{scheme}://{}{base}", self.server.address.authority())
    }

    /// Asks for another model from here on.
    ///
    /// # Errors
    /// The server lists models, and none of this name.
    pub fn switch(&mut self, name: &str) -> Result<()> {
        let models = self.models(LIST_TIMEOUT)?;
        ensure!(
            models.is_empty() || models.iter().any(|model| model == name),
            "the server has no model {name:?}; it has {}",
            models.join(", ")
        );
        self.model = name.into();
        Ok(())
    }

    /// The names of its models, waited for so long.
    fn models(&self, patience: Duration) -> Result<Vec<String>> {
        let listed = async {
            let response = self.request(Method::GET, "/models", String::new()).await?;
            whole(response).await
        };
        let listed = self.runtime.block_on(async { tokio::time::timeout(patience, listed).await });
        let listed = listed.unwrap_or_else(|_| Err(anyhow!("the server does not answer")));
        let listed: Json = listed.with_context(|| self.place())?;
        let names = listed["data"].as_array().into_iter().flatten();
        let names = names.filter_map(|model| model["id"].as_str());
        // A name that cannot be shown as it is cannot be chosen either.
        Ok(names.filter(|name| harmless(name) == **name).map(String::from).collect())
    }

    /// Sends the conversation; the events come as the server sends them.
    pub fn ask(&self, question: &Question, stop: &Arc<AtomicBool>) -> UnboundedReceiver<Event> {
        let body = self.body(question);
        let (sender, receiver) = unbounded_channel();
        let request = self.prepared(Method::POST, "/chat/completions", body.to_string());
        let (server, stop) = (self.server.clone(), Arc::clone(stop));
        self.runtime.spawn(async move {
            let answered = match request {
                Ok(request) => answer(&server, request, &sender, &stop).await,
                Err(error) => Err(error),
            };
            if let Err(error) = answered {
                // Nobody may be listening any more.
                sender.send(Event::Failed(format!("{error:#}"))).unwrap_or(());
            }
        });
        receiver
    }

    /// What is sent: settings only as far as the user gave them.
    fn body(&self, question: &Question) -> Json {
        let Question { conversation, tools, settings } = question;
        let mut body = json!({
            "model": self.model,
            "messages": conversation.to_json(Arguments::Text),
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let s = &settings.sampling;
        let temperature = if s.greedy { Some(0.0) } else { s.temperature };
        let given = [
            ("temperature", temperature.map(|value| json!(value))),
            ("top_p", s.top_p.map(|value| json!(value))),
            ("top_k", s.top_k.map(|value| json!(value))),
            ("min_p", s.min_p.map(|value| json!(value))),
            ("repetition_penalty", s.repetition_penalty.map(|value| json!(value))),
            ("presence_penalty", s.presence_penalty.map(|value| json!(value))),
            ("frequency_penalty", s.frequency_penalty.map(|value| json!(value))),
            ("seed", s.seed.map(|value| json!(value))),
            ("max_tokens", settings.max_tokens.map(|value| json!(value))),
            (
                "chat_template_kwargs",
                settings.thinking.map(|value| json!({ "enable_thinking": value })),
            ),
        ];
        for (name, value) in given {
            value.into_iter().for_each(|value| body[name] = value);
        }
        if !tools.is_empty() {
            body["tools"] = tools.iter().map(described).collect();
        }
        body
    }

    async fn request(
        &self,
        method: Method,
        route: &str,
        body: String,
    ) -> Result<Response<Incoming>> {
        send(&self.server, self.prepared(method, route, body)?).await
    }

    fn prepared(&self, method: Method, route: &str, body: String) -> Result<Request<String>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{route}", self.server.address.base))
            .header("host", self.server.address.authority())
            .header("user-agent", concat!("flash-moe/", env!("CARGO_PKG_VERSION")))
            .header("connection", "close");
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        Ok(request.body(body)?)
    }
}

fn described(tool: &Tool) -> Json {
    json!({ "type": "function", "function": {
        "name": tool.name, "description": tool.description, "parameters": tool.parameters,
    } })
}

async fn send(server: &Server, request: Request<String>) -> Result<Response<Incoming>> {
    let mut sender = match timeout(CONNECT_TIMEOUT, connect(server)).await {
        Ok(connected) => connected?,
        Err(_) => bail!("{} does not answer", server.address.authority()),
    };
    sender.send_request(request).await.context("the connection broke")
}

async fn connect(Server { address, tls }: &Server) -> Result<SendRequest<String>> {
    let stream = TcpStream::connect((address.socket_host(), address.port)).await;
    let stream = stream.with_context(|| format!("cannot connect to {}", address.authority()))?;
    stream.set_nodelay(true)?;
    match tls {
        Some(tls) => begin(tls.connect(stream).await?).await,
        None => begin(stream).await,
    }
}

async fn begin(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<SendRequest<String>> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the answer, and what goes wrong with it the answer says.
    tokio::spawn(async move { connection.await.unwrap_or(()) });
    Ok(sender)
}

/// The next piece of a body; `None` at its end.
async fn piece(body: &mut Incoming) -> Result<Option<Vec<u8>>> {
    loop {
        let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await;
        match frame {
            None => return Ok(None),
            Some(Err(error)) => return Err(anyhow!(error).context("the connection broke")),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data.to_vec()));
                }
            }
        }
    }
}

/// A body of JSON, or the words of an error.
async fn whole(mut response: Response<Incoming>) -> Result<Json> {
    let status = response.status();
    let mut bytes = Vec::new();
    while let Some(more) = piece(response.body_mut()).await? {
        bytes.extend(more);
        ensure!(bytes.len() <= BODY_BYTES_MAX, "the server's answer does not end");
    }
    if status.is_success() {
        return serde_json::from_slice(&bytes).context("the server's answer is not JSON");
    }
    let text = String::from_utf8_lossy(&bytes);
    // What is not JSON is shown as it stands.
    let told = serde_json::from_str::<Json>(&text).ok();
    let told = told.as_ref().and_then(|told| {
        let error = &told["error"];
        error["message"].as_str().or(error.as_str()).or(told["message"].as_str())
    });
    let words: String = told.unwrap_or(text.trim()).chars().take(ERROR_BYTES_MAX).collect();
    bail!("the server refuses with status {}: {}", status.as_u16(), harmless(&words));
}

/// Reads one answer to its end.
async fn answer(
    server: &Server,
    request: Request<String>,
    events: &UnboundedSender<Event>,
    stop: &AtomicBool,
) -> Result<()> {
    let mut reader = Reader::new();
    let mut response = tokio::select! {
        response = send(server, request) => response?,
        () = stopped(stop, events) => return reader.end(events, Some(End::Stopped)),
    };
    if !response.status().is_success() {
        return whole(response).await.map(drop);
    }
    loop {
        let more = tokio::select! {
            more = piece(response.body_mut()) => more?,
            () = stopped(stop, events) => return reader.end(events, Some(End::Stopped)),
        };
        let Some(bytes) = more else { break };
        if reader.take(&bytes, events)? {
            break;
        }
    }
    reader.end(events, None)
}

/// Returns when the user has stopped the answer, or given it up.
async fn stopped(stop: &AtomicBool, events: &UnboundedSender<Event>) {
    while !stop.load(Ordering::Relaxed) && !events.is_closed() {
        tokio::time::sleep(STOP_INTERVAL).await;
    }
}

/// What of a stream has been understood.
struct Reader {
    held: Vec<u8>, // of a line that is not whole
    started: Instant,
    first: Option<Instant>,
    tokens: usize,
    open_call: Option<u64>,
    done: Done,
    is_over: bool,
}

impl Reader {
    fn new() -> Self {
        Self {
            held: Vec::new(),
            started: Instant::now(),
            first: None,
            tokens: 0,
            open_call: None,
            done: Done::default(),
            is_over: false,
        }
    }

    /// Takes bytes of the stream; says whether it is over.
    fn take(&mut self, bytes: &[u8], events: &UnboundedSender<Event>) -> Result<bool> {
        self.held.extend_from_slice(bytes);
        ensure!(self.held.len() <= BODY_BYTES_MAX, "the server's line does not end");
        while let Some(end) = self.held.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.held.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if let Some(progress) = line.strip_prefix(": prompt ") {
                tell_progress(progress, events);
            } else if let Some(data) = line.strip_prefix("data:") {
                if data.trim() == "[DONE]" {
                    return Ok(true);
                }
                self.chunk(data.trim(), events)?;
            }
        }
        Ok(false)
    }

    fn chunk(&mut self, data: &str, events: &UnboundedSender<Event>) -> Result<()> {
        let chunk: Json = serde_json::from_str(data).context("the server's stream is not JSON")?;
        if let Some(error) = chunk.get("error").filter(|error| !error.is_null()) {
            let words = error["message"].as_str().unwrap_or("an error without words");
            bail!("the server: {}", harmless(words));
        }
        self.usage(&chunk["usage"]);
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        let mut parts = Vec::new();
        let thinking = delta["reasoning_content"].as_str().or(delta["reasoning"].as_str());
        let texts = [(thinking, Part::Thinking as fn(String) -> Part)];
        let texts = texts
            .into_iter()
            .chain([(delta["content"].as_str(), Part::Content as fn(String) -> Part)]);
        for (text, kind) in texts {
            text.filter(|text| !text.is_empty())
                .into_iter()
                .for_each(|text| parts.push(kind(text.into())));
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            self.call(call, &mut parts);
        }
        if !parts.is_empty() {
            self.first.get_or_insert_with(Instant::now);
            self.tokens += 1;
            // Nobody may be listening any more; `stopped` sees that.
            events.send(Event::Token(parts)).unwrap_or(());
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.is_over = true;
            self.done.end = if reason == "length" { End::Length } else { End::Stop };
        }
        Ok(())
    }

    fn call(&mut self, call: &Json, parts: &mut Vec<Part>) {
        let index = call["index"].as_u64().unwrap_or(0);
        if self.open_call != Some(index) {
            parts.extend(self.open_call.map(|_| Part::CallEnds));
            self.open_call = Some(index);
            let name = call["function"]["name"].as_str().unwrap_or("");
            parts.push(Part::CallBegins(name.into()));
        }
        let arguments = call["function"]["arguments"].as_str().filter(|text| !text.is_empty());
        parts.extend(arguments.map(|text| Part::Arguments(text.into())));
    }

    fn usage(&mut self, usage: &Json) {
        let count = |value: &Json| value.as_u64().map(|count| count as usize);
        let done = &mut self.done;
        done.prompt = count(&usage["prompt_tokens"]).or(done.prompt);
        done.generated = count(&usage["completion_tokens"]).or(done.generated);
        done.cached = count(&usage["prompt_tokens_details"]["cached_tokens"]).or(done.cached);
    }

    fn end(mut self, events: &UnboundedSender<Event>, end: Option<End>) -> Result<()> {
        ensure!(self.is_over || end.is_some(), "the server's answer broke off");
        if self.open_call.is_some() && end.is_none() {
            events.send(Event::Token(vec![Part::CallEnds])).unwrap_or(());
        }
        if let Some(end) = end {
            self.done.end = end;
        }
        self.done.generated.get_or_insert(self.tokens);
        let first = self.first.unwrap_or_else(Instant::now);
        self.done.first_token = first - self.started;
        self.done.decode = first.elapsed();
        events.send(Event::Done(Box::new(self.done))).unwrap_or(());
        Ok(())
    }
}

/// `1024/14000`, as our own server tells.
fn tell_progress(progress: &str, events: &UnboundedSender<Event>) {
    let numbers = progress.split_once('/');
    let numbers = numbers.and_then(|(done, all)| Some((done.parse().ok()?, all.parse().ok()?)));
    if let Some((done, prompt)) = numbers {
        events.send(Event::Prompt { done, cached: 0, prompt }).unwrap_or(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is heard of a stream that arrives in pieces of so many bytes.
    fn heard(stream: &str, bytes: usize) -> Result<Vec<Event>> {
        let (sender, mut receiver) = unbounded_channel();
        let mut reader = Reader::new();
        for piece in stream.as_bytes().chunks(bytes) {
            if reader.take(piece, &sender)? {
                break;
            }
        }
        reader.end(&sender, None)?;
        let mut events = Vec::new();
        while let Ok(event) = receiver.try_recv() {
            events.push(event);
        }
        Ok(events)
    }

    fn delta(delta: Json) -> String {
        format!("data: {}\n\n", json!({ "choices": [{ "delta": delta, "finish_reason": null }] }))
    }

    #[test]
    fn a_stream_is_understood_however_it_is_cut() {
        let call = |index: u64, name: Option<&str>, arguments: &str| {
            json!({ "tool_calls": [{ "index": index, "id": "c", "function":
                { "name": name, "arguments": arguments } }] })
        };
        let stream = [
            ": prompt 512/900\n\n".to_string(),
            delta(json!({ "role": "assistant", "content": "" })),
            delta(json!({ "reasoning_content": "hm" })),
            delta(json!({ "content": "caf\u{e9}" })),
            delta(call(0, Some("shell"), "{\"comm")),
            delta(call(0, None, "and\":1}")),
            delta(call(1, Some("shell"), "{}")),
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"tool_calls\"}]}\r\n\r\n".into(),
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4}}\n\n"
                .into(),
            "data: [DONE]\n\ndata: rubbish\n".into(),
        ]
        .concat();
        for bytes in [1, 7, 4096] {
            let events = heard(&stream, bytes).unwrap();
            let parts: Vec<Part> = events
                .iter()
                .flat_map(|event| match event {
                    Event::Token(parts) => parts.clone(),
                    _ => Vec::new(),
                })
                .collect();
            let begins = || Part::CallBegins("shell".into());
            let expected = [
                Part::Thinking("hm".into()),
                Part::Content("caf\u{e9}".into()),
                begins(),
                Part::Arguments("{\"comm".into()),
                Part::Arguments("and\":1}".into()),
                Part::CallEnds,
                begins(),
                Part::Arguments("{}".into()),
                Part::CallEnds,
            ];
            assert_eq!(parts, expected);
            assert_eq!(events[0], Event::Prompt { done: 512, cached: 0, prompt: 900 });
            let Some(Event::Done(done)) = events.last() else { panic!("{events:?}") };
            assert_eq!((done.end, done.prompt, done.generated), (End::Stop, Some(9), Some(4)));
        }
    }

    #[test]
    fn a_server_that_is_silent_is_not_waited_for() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let remote = Remote::open(&address, None, Some("x".into())).unwrap();
        let error = format!("{:#}", remote.models(Duration::from_millis(100)).unwrap_err());
        assert!(error.contains("does not answer"), "{error}");
    }

    #[test]
    fn an_answer_that_breaks_off_or_fails_is_an_error() {
        let error = |stream: &str| format!("{:#}", heard(stream, 9).unwrap_err());
        assert!(error(&delta(json!({ "content": "x" }))).contains("broke off"));
        assert!(error("data: {\"error\":{\"message\":\"no memory\"}}\n").contains("no memory"));
        assert!(error("data: <html>\n").contains("not JSON"));
    }
}
