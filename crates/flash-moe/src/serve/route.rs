//! From a request to the interface it is for, and who may make it.
//!
//! Every request gets an id, which its answer and its line in the log carry. A key is compared in
//! constant time. A web page of another origin may not use the server unless a flag says so or it is
//! this machine's own: without that rule any page a user visits could.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Path, Request, State};
use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use futures_util::StreamExt;
use serde_json::{Value as Json, json};
use subtle::ConstantTimeEq;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

use super::api::message::{new_id, whole};
use super::api::messages as anthropic;
use super::api::refusal::{Dialect, Parsed, Refusal};
use super::api::request::{Conversation, Prepared, Wishes};
use super::api::response_store::ResponseStore;
use super::api::{chat, completions, responses as responding, tokens};
use super::metrics::Metrics;
use super::model::Model;
use super::panel;
use super::schedule::{Event, Failure, Origin, Refused, Schedule};
use super::sse;

/// Everything a request needs.
pub struct Server {
    /// The model.
    pub model: Arc<Model>,
    /// Its queue.
    pub schedule: Schedule,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Responses that may be continued.
    pub responses: Arc<ResponseStore>,
    /// Who may use it.
    pub access: Access,
    /// Largest body.
    pub body_max: usize,
    /// How long a client may be silent in the middle of a body.
    pub client_timeout: Duration,
    /// How long a request may take.
    pub request_limit: Option<Duration>,
}

/// Who may use the server.
pub struct Access {
    /// The key, if one is needed.
    pub key: Option<String>,
    /// Origins of web pages, or `*`.
    pub cors: Vec<String>,
}

/// What belongs to one request.
#[derive(Clone)]
pub struct Ticket {
    id: String,
    received: Instant,
}

type Texts = UnboundedReceiver<(usize, Event)>;

/// Paths that are counted by name, and answered without a key where the flag says so.
const ROUTES: [(&str, bool); 14] = [
    ("/", true),
    ("/health", true),
    ("/metrics", false),
    ("/live", false),
    ("/v1/models", false),
    ("/v1/chat/completions", false),
    ("/v1/completions", false),
    ("/v1/responses", false),
    ("/v1/messages", false),
    ("/v1/messages/count_tokens", false),
    ("/tokenize", false),
    ("/detokenize", false),
    ("/v1/models/", false),
    ("/v1/responses/", false),
];

/// All routes.
pub fn router(server: &Arc<Server>) -> Router {
    Router::new()
        .route("/", get(panel::page))
        .route("/health", get(panel::health))
        .route("/metrics", get(panel::metrics))
        .route("/live", get(panel::live))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*name}", get(one_model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/responses", post(responses))
        .route("/v1/responses/{id}", get(kept_response).delete(forget_response))
        .route("/v1/messages", post(messages))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(server), admit))
        .with_state(Arc::clone(server))
}

/// What every request goes through: an id, the origin, the key, the count.
async fn admit(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let id = new_id("req_");
    let route = route_name(request.uri().path());
    let dialect = dialect(request.uri(), request.headers());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let host = request.headers().get(header::HOST).cloned();
    let ticket = Ticket { id: id.clone(), received: Instant::now() };
    request.extensions_mut().insert(ticket);
    let allowed = origin.as_ref().filter(|origin| server.access.allows(origin, host.as_ref()));
    let refusal = match &origin {
        Some(_) if allowed.is_none() => Some(Refusal::new(
            403,
            "web pages of this origin may not use the server; --cors lets them",
        )),
        _ if request.method() == Method::OPTIONS => None,
        _ => server.access.check(route, request.headers()),
    };
    let mut response = match refusal {
        Some(refusal) => refused(&refusal, dialect, &id),
        None if request.method() == Method::OPTIONS => preflight(request.headers()),
        None => next.run(request).await,
    };
    server.metrics.answered(route, response.status().as_u16());
    let headers = response.headers_mut();
    let id = HeaderValue::from_str(&id).expect("ids are ASCII");
    headers.insert("x-request-id", id.clone());
    headers.insert("request-id", id);
    if let Some(origin) = allowed {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
        let exposed = HeaderValue::from_static("x-request-id, retry-after");
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
    response
}

fn route_name(path: &str) -> &'static str {
    let exact = ROUTES.iter().find(|(name, _)| *name == path);
    let below = || {
        ROUTES
            .iter()
            .find(|(name, _)| name.len() > 1 && name.ends_with('/') && path.starts_with(name))
    };
    exact.or_else(below).map_or("other", |(name, _)| name)
}

/// Anthropic's clients are known by the path or the header that all of them send.
fn dialect(uri: &Uri, headers: &HeaderMap) -> Dialect {
    let anthropic =
        uri.path().starts_with("/v1/messages") || headers.contains_key("anthropic-version");
    if anthropic { Dialect::Anthropic } else { Dialect::OpenAi }
}

/// The answer to a browser that asks whether it may.
fn preflight(headers: &HeaderMap) -> Response {
    let mut response = empty(StatusCode::NO_CONTENT);
    let asked: HeaderName = header::ACCESS_CONTROL_REQUEST_HEADERS;
    let wanted = headers.get(asked).cloned();
    let wanted =
        wanted.unwrap_or(HeaderValue::from_static("authorization, content-type, x-api-key"));
    let answer = response.headers_mut();
    answer.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted);
    let methods = HeaderValue::from_static("GET, POST, DELETE, OPTIONS");
    answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    answer.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    response
}

impl Access {
    /// Whether a page of this origin may use the server that it calls `host`.
    fn allows(&self, origin: &HeaderValue, host: Option<&HeaderValue>) -> bool {
        let Ok(origin) = origin.to_str() else { return false };
        if self.cors.iter().any(|allowed| allowed == "*" || allowed == origin) {
            return true;
        }
        let Some((_, place)) = origin.split_once("://") else { return false };
        let name = host_name(place);
        let local = name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        // A page that the server itself has sent; a name of another's making is no proof of that.
        let own = host.is_some_and(|host| host.as_bytes() == place.as_bytes());
        local || (own && (self.key.is_some() || name.parse::<IpAddr>().is_ok()))
    }

    /// Whether the key is there and right.
    fn check(&self, route: &str, headers: &HeaderMap) -> Option<Refusal> {
        let key = self.key.as_ref()?;
        let open = ROUTES.iter().any(|&(name, open)| name == route && open);
        if open { None } else { Self::compare(key, headers) }
    }

    fn compare(key: &str, headers: &HeaderMap) -> Option<Refusal> {
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let bearer = bearer.and_then(|value| value.strip_prefix("Bearer "));
        let given = bearer.or_else(|| headers.get("x-api-key")?.to_str().ok());
        match given {
            Some(given) if bool::from(given.as_bytes().ct_eq(key.as_bytes())) => None,
            Some(_) => Some(Refusal::new(401, "the API key is wrong")),
            None => {
                let why = "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY";
                Some(Refusal::new(401, why))
            }
        }
    }
}

/// A host without its port.
fn host_name(place: &str) -> &str {
    match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => place.split(':').next().unwrap_or(place),
    }
}

impl Server {
    /// The body of a request as JSON.
    ///
    /// # Errors
    /// It is too large, too slow, or not JSON.
    pub async fn body(&self, body: Body) -> Parsed<Json> {
        let too_large = || {
            let why = format!("the body is above {} bytes; --max-body raises it", self.body_max);
            Refusal::new(413, why)
        };
        if body.size_hint().lower() > self.body_max as u64 {
            return Err(too_large());
        }
        let mut bytes: Vec<u8> = Vec::new();
        let mut pieces = body.into_data_stream();
        loop {
            let piece = timeout(self.client_timeout, pieces.next()).await;
            let piece =
                piece.map_err(|_| Refusal::new(408, "the rest of the body did not come"))?;
            let Some(piece) = piece else { break };
            let piece: Bytes = piece.map_err(|_| Refusal::new(400, "the body broke off"))?;
            if bytes.len() + piece.len() > self.body_max {
                return Err(too_large());
            }
            bytes.extend_from_slice(&piece);
        }
        serde_json::from_slice(&bytes)
            .map_err(|e| Refusal::new(400, format!("the body is not JSON: {e}")))
    }

    /// Queues the texts of a conversation.
    ///
    /// # Errors
    /// See [`Prepared::conversation`]; the queue is full.
    pub async fn converse(
        self: &Arc<Self>,
        ticket: &Ticket,
        api: &'static str,
        conversation: Conversation,
        wishes: Wishes,
    ) -> Parsed<Texts> {
        let deadline = self.deadline(ticket);
        let (server, session) = (Arc::clone(self), wishes.session.clone());
        let work = move || Prepared::conversation(&server.model, &conversation, &wishes, deadline);
        let prepared = blocking(work).await?;
        self.submit(ticket.origin(api, session), vec![prepared])
    }

    /// When a request is given up.
    fn deadline(&self, ticket: &Ticket) -> Option<Instant> {
        self.request_limit.map(|limit| ticket.received + limit)
    }

    fn submit(&self, origin: Origin, prepared: Vec<Prepared>) -> Parsed<Texts> {
        let (events, texts) = unbounded_channel();
        let mut jobs = Vec::new();
        for prepared in prepared {
            let first = jobs.len();
            jobs.extend(prepared.jobs(first, &events, &origin));
        }
        if jobs.len() > self.schedule.capacity() {
            let why =
                format!("asks for more texts than the queue holds, {}", self.schedule.capacity());
            return Err(Refusal::field("n", why));
        }
        match self.schedule.submit(jobs) {
            Ok(()) => Ok(texts),
            Err(Refused::Full) => {
                let why = "the queue is full; try again, or start the server with a larger --queue";
                Err(Refusal { retry_after: Some(5), ..Refusal::new(429, why) })
            }
            Err(Refused::Closed) => Err(Refusal::new(503, "the server is shutting down")),
        }
    }
}

impl Ticket {
    fn origin(&self, api: &'static str, session: Option<String>) -> Origin {
        Origin { request: self.id.clone(), api, session, received: self.received }
    }
}

/// Work that takes long enough to hold other connections up.
///
/// # Errors
/// The work's own.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Parsed<T> + Send + 'static,
) -> Parsed<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(Refusal::new(500, "internal error: see the server's log")))
}

/// An answer, or the refusal in its dialect.
pub fn settled(outcome: Parsed<Response>, dialect: Dialect, ticket: &Ticket) -> Response {
    outcome.unwrap_or_else(|refusal| refused(&refusal, dialect, &ticket.id))
}

/// The response of a refusal.
fn refused(refusal: &Refusal, dialect: Dialect, request: &str) -> Response {
    let mut response = json_response(&refusal.body(dialect, request));
    let status = StatusCode::from_u16(refusal.status);
    *response.status_mut() = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if let Some(seconds) = refusal.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A response whose body is JSON.
pub fn json_response(value: &Json) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

type Own = State<Arc<Server>>;
type Id = axum::Extension<Ticket>;

async fn no_route(id: Id, uri: Uri, headers: HeaderMap) -> Response {
    let why = format!("there is nothing at {}; docs/server.md lists what there is", uri.path());
    settled(Err(Refusal::new(404, why)), dialect(&uri, &headers), &id)
}

async fn wrong_method(id: Id, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let why = format!("{} does not take {method}", uri.path());
    settled(Err(Refusal::new(405, why)), dialect(&uri, &headers), &id)
}

async fn list_models(State(server): Own) -> Response {
    json_response(&tokens::models(&server.model))
}

async fn one_model(State(server): Own, id: Id, Path(name): Path<String>) -> Response {
    let known = name == server.model.name;
    let why = format!("there is no model {name:?}, only {:?}", server.model.name);
    let outcome = known
        .then(|| json_response(&tokens::one_model(&server.model)))
        .ok_or_else(|| Refusal::new(404, why));
    settled(outcome, Dialect::OpenAi, &id)
}

async fn chat_completions(State(server): Own, id: Id, body: Body) -> Response {
    let answer = async {
        let chat::Request { conversation, wishes, usage } = chat::read(server.body(body).await?)?;
        let (stream, choices) = (wishes.stream, wishes.choices);
        let texts = server.converse(&id, "chat.completions", conversation, wishes).await?;
        let model = Arc::clone(&server.model);
        if stream {
            return Ok(sse::response(texts, choices, chat::Chunks::new(model, choices, usage)));
        }
        Ok(json_response(&chat::answer(&model, &whole(texts, choices).await?)))
    };
    settled(answer.await, Dialect::OpenAi, &id)
}

async fn text_completions(State(server): Own, id: Id, body: Body) -> Response {
    let answer = async {
        let completions::Request { prompts, wishes, usage } =
            completions::read(server.body(body).await?)?;
        let (stream, choices, texts) =
            (wishes.stream, wishes.choices, wishes.choices * prompts.len());
        let origin = id.origin("completions", wishes.session.clone());
        let (own, deadline) = (Arc::clone(&server), server.deadline(&id));
        let prepared = blocking(move || {
            let prompt = |prompt: completions::Prompt| {
                Prepared::raw(&own.model, prompt.tokens(&own.model)?, &wishes, deadline)
            };
            prompts.into_iter().map(prompt).collect::<Parsed<Vec<_>>>()
        });
        let events = server.submit(origin, prepared.await?)?;
        let model = Arc::clone(&server.model);
        if stream {
            let chunks = completions::Chunks::new(model, texts, choices, usage);
            return Ok(sse::response(events, texts, chunks));
        }
        let messages = whole(events, texts).await?;
        Ok(json_response(&completions::answer(&model, &messages, choices)))
    };
    settled(answer.await, Dialect::OpenAi, &id)
}

async fn responses(State(server): Own, id: Id, body: Body) -> Response {
    let answer = async {
        let body = server.body(body).await?;
        let responding::Request { conversation, wishes, echo } =
            responding::read(body, &server.responses)?;
        let stream = wishes.stream;
        let mut texts = server.converse(&id, "responses", conversation, wishes).await?;
        let (model, store) = (Arc::clone(&server.model), Arc::clone(&server.responses));
        let mut writer = responding::Writer::new(model, store, echo);
        if stream {
            return Ok(sse::response(texts, 1, writer));
        }
        while let Some((index, event)) = texts.recv().await {
            if let Event::Failed(failure) = event {
                return Err(failure.into());
            }
            sse::Translate::event(&mut writer, index, event);
        }
        let response = writer.response().ok_or_else(|| Refusal::from(Failure::Shutdown))?;
        Ok(json_response(&response))
    };
    settled(answer.await, Dialect::OpenAi, &id)
}

async fn kept_response(State(server): Own, id: Id, Path(name): Path<String>) -> Response {
    let kept = server.responses.find(&name, "response_id");
    settled(kept.map(|kept| json_response(&kept.response)), Dialect::OpenAi, &id)
}

async fn forget_response(State(server): Own, id: Id, Path(name): Path<String>) -> Response {
    let found = server.responses.find(&name, "response_id").map(|_| {
        let deleted = server.responses.remove(&name);
        json_response(&json!({ "id": name, "object": "response", "deleted": deleted }))
    });
    settled(found, Dialect::OpenAi, &id)
}

async fn messages(State(server): Own, id: Id, body: Body) -> Response {
    let answer = async {
        let anthropic::Request { conversation, wishes } =
            anthropic::read(server.body(body).await?, false)?;
        let stream = wishes.stream;
        let texts = server.converse(&id, "messages", conversation, wishes).await?;
        let model = Arc::clone(&server.model);
        if stream {
            return Ok(sse::response(texts, 1, anthropic::Events::new(model, id.id.clone())));
        }
        Ok(json_response(&anthropic::answer(&model, &whole(texts, 1).await?[0])))
    };
    settled(answer.await, Dialect::Anthropic, &id)
}

async fn count_tokens(State(server): Own, id: Id, body: Body) -> Response {
    let answer = async {
        let request = anthropic::read(server.body(body).await?, true)?;
        let own = Arc::clone(&server);
        let counted = blocking(move || request.conversation.prompt(&own.model));
        let prompt = counted.await?;
        Ok(json_response(&json!({ "input_tokens": prompt.tokens.len() })))
    };
    settled(answer.await, Dialect::Anthropic, &id)
}

async fn tokenize(State(server): Own, id: Id, body: Body) -> Response {
    let answer = async {
        let body = server.body(body).await?;
        let own = Arc::clone(&server);
        blocking(move || tokens::tokenize(&own.model, body)).await.map(|json| json_response(&json))
    };
    settled(answer.await, Dialect::OpenAi, &id)
}

async fn detokenize(State(server): Own, id: Id, body: Body) -> Response {
    let answer = async {
        let body = server.body(body).await?;
        tokens::detokenize(&server.model, body).map(|json| json_response(&json))
    };
    settled(answer.await, Dialect::OpenAi, &id)
}

/// A response of plain text.
pub fn text_response(kind: &'static str, text: String) -> Response {
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// What `/health` says.
pub fn health_json(server: &Server) -> Json {
    let (live, waiting) = server.schedule.load();
    json!({ "status": "ok", "model": server.model.name, "live": live, "waiting": waiting })
}
