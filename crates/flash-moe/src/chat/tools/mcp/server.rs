//! One MCP server: its process, what it offers, and calls of it.
//!
//! A task starts the process in a group of its own, speaks the protocol over its standard streams and
//! attends to it until it ends or is closed; whatever goes wrong becomes the state's words and one note.
//! What it writes to standard error is kept, the last of it, and never reaches the screen by itself.
//! Nothing here waits longer than the limit that a command of the shell has.

use std::collections::VecDeque;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rmcp::model::{
    CallToolRequestParams, CallToolResult, ClientCapabilities, ClientConfig, Implementation,
    JsonObject, PaginatedRequestParams, Tool,
};
use rmcp::service::{ClientInitializeError, NotificationContext, Peer, RoleClient, ServiceError};
use rmcp::transport::async_rw::AsyncRwTransport;
use rmcp::{ClientHandler, ServiceExt};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use super::answer;
use super::config::ServerConfig;
use super::offer::Offers;
use crate::chat::tools::group::Groups;
use crate::chat::tools::outcome::{Limits, Output, Ran, Why};

/// How long a server may take to end by itself once its input is closed.
pub const GRACE: Duration = Duration::from_secs(1);
/// Time between two looks at whether the user has stopped a call.
const STOP_INTERVAL: Duration = Duration::from_millis(30);
/// Tools are listed again at most this often, however often a server says that they have changed.
const LIST_INTERVAL: Duration = Duration::from_secs(1);
/// A list that is longer, or has more pages, is not read to its end.
const LISTED_MAX: usize = 10_000;
const PAGES_MAX: usize = 1000;
/// Bytes of its standard error that are kept.
const LOG_BYTES_MAX: usize = 16 << 10;
/// Letters of a server's own words in an error.
const WORDS_MAX: usize = 300;

/// A server.
pub struct Server {
    pub config: ServerConfig,
    state: watch::Sender<State>,
    log: Arc<Mutex<VecDeque<u8>>>,
    closed: Notify,
}

/// How a server is.
#[derive(Clone)]
pub enum State {
    Starting,
    Ready {
        peer: Peer<RoleClient>,
        offers: Arc<Offers>,
    },
    /// It is gone, for this reason.
    Ended(String),
}

/// Our end of the protocol: a client that offers nothing but to listen.
struct Client {
    changed: Arc<Notify>,
}

impl ClientHandler for Client {
    fn get_info(&self) -> ClientConfig {
        let own = Implementation::new("flash-moe", env!("CARGO_PKG_VERSION"));
        ClientConfig::new(ClientCapabilities::default(), own)
    }

    async fn on_tool_list_changed(&self, _context: NotificationContext<RoleClient>) {
        self.changed.notify_one();
    }
}

impl Server {
    /// One that is not started yet.
    pub fn new(config: ServerConfig) -> Self {
        let (state, _) = watch::channel(State::Starting);
        Self { config, state, log: Arc::default(), closed: Notify::new() }
    }

    /// How it is.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// The last lines of its standard error.
    pub fn log(&self) -> Vec<String> {
        let bytes: Vec<u8> = lock(&self.log).iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        text.lines().filter(|line| !line.trim().is_empty()).map(String::from).collect()
    }

    /// Asks it to end.
    pub fn close(&self) {
        self.closed.notify_one();
    }

    /// Starts it and attends to it until it ends or is closed.
    pub async fn attend(&self, patience: Duration, groups: &Groups, notes: &Sender<String>) {
        let why = match self.start() {
            Ok(child) => self.live(child, patience, groups, notes).await,
            Err(error) => Some(format!("cannot start {:?}: {error}", self.config.command)),
        };
        self.state.send_replace(State::Ended(why.clone().unwrap_or_else(|| "closed".into())));
        why.iter().for_each(|why| self.tell(notes, why));
    }

    fn start(&self) -> std::io::Result<Child> {
        let mut command = Command::new(&self.config.command);
        command.args(&self.config.args).envs(&self.config.env);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.kill_on_drop(true);
        if let Some(dir) = &self.config.cwd {
            command.current_dir(dir);
        }
        #[cfg(unix)]
        command.process_group(0);
        command.spawn()
    }

    /// Why it ended; `None` where that was asked for.
    async fn live(
        &self,
        mut child: Child,
        patience: Duration,
        groups: &Groups,
        notes: &Sender<String>,
    ) -> Option<String> {
        let leader = child.id().expect("a process that was not waited for has an id");
        groups.add(leader);
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let streams = output.zip(input).expect("both are pipes");
        let errors = child.stderr.take().expect("it is a pipe");
        let log = tokio::spawn(keep(errors, Arc::clone(&self.log)));
        let why = tokio::select! {
            why = self.talk(streams, patience, notes) => Some(why),
            () = self.closed.notified() => None,
        };
        let status = timeout(GRACE, child.wait()).await;
        groups.kill(leader);
        // What it said last may explain the rest. A process that left the group may hold the pipe.
        timeout(GRACE, log).await.map(drop).unwrap_or(());
        let status = status.ok().and_then(Result::ok);
        why.map(|why| why.unwrap_or_else(|| self.ended(status)))
    }

    /// Speaks with it until the connection ends; gives a reason where it is we who end it.
    async fn talk(
        &self,
        (output, input): (ChildStdout, ChildStdin),
        patience: Duration,
        notes: &Sender<String>,
    ) -> Option<String> {
        let changed = Arc::new(Notify::new());
        let client = Client { changed: Arc::clone(&changed) };
        let transport = AsyncRwTransport::new_client(output, input);
        let service = match timeout(patience, client.serve(transport)).await {
            Ok(Ok(service)) => service,
            Ok(Err(error)) => return not_begun(&error),
            Err(_) => return Some(silent("initialize", patience)),
        };
        let peer = service.peer().clone();
        let mut ended = std::pin::pin!(service.waiting());
        loop {
            match timeout(patience, listed(&peer)).await {
                Ok(Ok(tools)) => self.offer(tools, &peer, notes),
                Ok(Err(ServiceError::McpError(error))) => {
                    return Some(format!("does not list its tools: {}", cut(&error.message)));
                }
                Ok(Err(_)) => return None,
                Err(_) => return Some(silent("tools/list", patience)),
            }
            let again = async {
                changed.notified().await;
                sleep(LIST_INTERVAL).await;
            };
            tokio::select! {
                _ = &mut ended => return None,
                () = again => {}
            }
        }
    }

    fn offer(&self, tools: Vec<Tool>, peer: &Peer<RoleClient>, notes: &Sender<String>) {
        let offers = Arc::new(Offers::of(&self.config, tools));
        if let State::Ready { offers: before, .. } = &*self.state.borrow()
            && *before == offers
        {
            return;
        }
        let count = offers.offered.len();
        let mut told = format!("{count} tool{}", if count == 1 { "" } else { "s" });
        if !offers.left_out.is_empty() {
            let (left_out, name) = (offers.left_out.len(), &self.config.name);
            told += &format!("; {left_out} more are not offered, /tools {name} says why");
        }
        if !offers.unknown.is_empty() {
            told += &format!("; it has no {}, which the file names", offers.unknown.join(", "));
        }
        self.state.send_replace(State::Ready { peer: peer.clone(), offers });
        self.tell(notes, &told);
    }

    /// How a process ended by itself, with the last that it said.
    fn ended(&self, status: Option<ExitStatus>) -> String {
        let how = match status.map(|status| status.code()) {
            Some(Some(code)) => format!("ended with exit status {code}"),
            Some(None) => "was killed by a signal".into(),
            None => "closed its output, and was killed".into(),
        };
        match self.log().last() {
            Some(line) => format!("{how}: {}", cut(line.trim())),
            None => how,
        }
    }

    fn tell(&self, notes: &Sender<String>, what: &str) {
        // Nobody listens any more when the chat ends.
        notes.send(format!("MCP server {}: {what}", self.config.name)).unwrap_or(());
    }

    /// Calls a tool by the server's own name for it.
    pub async fn call(
        &self,
        tool: String,
        arguments: JsonObject,
        limits: Limits,
        stop: &AtomicBool,
    ) -> Ran {
        let peer = match self.state() {
            State::Ready { peer, .. } => peer,
            State::Starting => return self.failed("is still starting"),
            State::Ended(why) => return self.failed(&why),
        };
        let request = CallToolRequestParams::new(tool).with_arguments(arguments);
        let answered = tokio::select! {
            answered = timeout(limits.timeout, peer.call_tool(request)) => answered,
            () = stopped(stop) => return Ran::without_output(Why::Stopped),
        };
        match answered {
            Ok(Ok(result)) => answer(&result, limits.output_bytes),
            Ok(Err(ServiceError::McpError(error))) => {
                self.failed(&format!("refuses the call: {}", cut(&error.message)))
            }
            Ok(Err(ServiceError::UnexpectedResponse)) => {
                self.failed("gave an answer of a kind that is not known here")
            }
            Ok(Err(_)) => self.gone().await,
            Err(_) => Ran::without_output(Why::Unanswered(limits.timeout)),
        }
    }

    fn failed(&self, why: &str) -> Ran {
        Ran::without_output(Why::Failed(format!("the MCP server {} {why}", self.config.name)))
    }

    /// A call whose connection ended: the reason is there as soon as the process has been waited for.
    async fn gone(&self) -> Ran {
        let mut states = self.state.subscribe();
        let ended = states.wait_for(|state| matches!(state, State::Ended(_)));
        match timeout(3 * GRACE, ended).await.ok().and_then(Result::ok).as_deref() {
            Some(State::Ended(why)) => self.failed(why),
            _ => self.failed("closed the connection"),
        }
    }
}

fn answer(result: &CallToolResult, output_bytes: usize) -> Ran {
    let mut output = Output::new(output_bytes);
    output.take(answer::text(result).as_bytes());
    let (bytes, left_out) = output.bytes();
    let why = if result.is_error == Some(true) { Why::IsError } else { Why::Answered };
    Ran { output: String::from_utf8_lossy(&bytes).into_owned(), why, left_out }
}

/// All tools, page by page.
async fn listed(peer: &Peer<RoleClient>) -> Result<Vec<Tool>, ServiceError> {
    let has_tools = peer.peer_info().is_some_and(|server| server.capabilities.tools.is_some());
    let mut tools = Vec::new();
    let mut cursor = None;
    for _ in 0..if has_tools { PAGES_MAX } else { 0 } {
        let params = PaginatedRequestParams::default().with_cursor(cursor);
        let page = peer.list_tools(Some(params)).await?;
        tools.extend(page.tools);
        cursor = page.next_cursor;
        if cursor.is_none() || tools.len() >= LISTED_MAX {
            break;
        }
    }
    Ok(tools)
}

/// Why the protocol could not begin; `None` where the process has gone.
fn not_begun(error: &ClientInitializeError) -> Option<String> {
    use ClientInitializeError::{ConnectionClosed, JsonRpcError, TransportError};
    match error {
        ConnectionClosed(_) | TransportError { .. } => None,
        JsonRpcError(error) => Some(format!("refuses to begin: {}", cut(&error.message))),
        other => Some(format!("does not begin as MCP does: {}", cut(&other.to_string()))),
    }
}

fn silent(method: &str, patience: Duration) -> String {
    format!("no answer to {method} within {} s; it is killed", patience.as_secs())
}

fn cut(words: &str) -> String {
    words.chars().take(WORDS_MAX).collect()
}

/// Returns when the user has stopped the call.
async fn stopped(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        sleep(STOP_INTERVAL).await;
    }
}

/// Keeps the last of what a process writes.
async fn keep(mut errors: impl AsyncRead + Unpin, log: Arc<Mutex<VecDeque<u8>>>) {
    let mut bytes = [0; 4096];
    while let Ok(read @ 1..) = errors.read(&mut bytes).await {
        let mut log = lock(&log);
        log.extend(&bytes[..read]);
        let surplus = log.len().saturating_sub(LOG_BYTES_MAX);
        log.drain(..surplus);
    }
}

fn lock(log: &Mutex<VecDeque<u8>>) -> MutexGuard<'_, VecDeque<u8>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}
