//! MCP servers: programs beside the chat whose tools the model may ask for.
//!
//! `config` reads the file, `server` is one process, `offer` what the model hears of it, `answer` what
//! comes of a call. They are started when the chat starts and never waited for: a question has the
//! tools of those that are ready. One that fails is a note, and the chat goes on without it.

mod answer;
mod config;
mod offer;
mod server;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result};
use rmcp::model::JsonObject;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::group::Groups;
use super::outcome::{Limits, Ran};
use crate::chat::backend::Tool;
use config::Config;
use offer::{Offer, Offers};
use server::{GRACE, Server, State};

/// Tools and lines that are shown of one that has many.
const SHOWN_MAX: usize = 20;

/// The servers of a chat.
pub struct Servers {
    servers: Vec<Arc<Server>>,
    tasks: Vec<JoinHandle<()>>,
    runtime: Option<Runtime>,
    notes: Receiver<String>,
}

/// A call of a server's tool.
#[derive(Clone, PartialEq, Debug)]
pub struct Wanted {
    pub server: usize, // its place among the servers
    pub server_name: String,
    /// The server's own name for the tool.
    pub tool: String,
    /// Its name for the model.
    pub name: String,
    pub arguments: JsonObject,
    /// Whether the file says that it needs no decision.
    pub is_allowed: bool,
}

impl Servers {
    /// None at all.
    pub fn none() -> Self {
        Self { servers: Vec::new(), tasks: Vec::new(), runtime: None, notes: channel().1 }
    }

    /// Starts those that a file names, and does not wait for them.
    ///
    /// # Errors
    /// The file cannot be read or is none; the system has no thread to give.
    pub fn start(file: &Path, patience: Duration, groups: &Groups) -> Result<Self> {
        let Config { servers, notes: told } = Config::read(file)?;
        let (sender, notes) = channel();
        told.into_iter().for_each(|note| sender.send(note).expect("it is listened to here"));
        let servers: Vec<_> = servers.into_iter().map(|one| Arc::new(Server::new(one))).collect();
        if servers.is_empty() {
            return Ok(Self { notes, ..Self::none() });
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("mcp")
            .enable_all()
            .build()
            .context("the runtime of MCP servers")?;
        let attend = |server: &Arc<Server>| {
            let (server, groups, notes) = (Arc::clone(server), groups.clone(), sender.clone());
            runtime.spawn(async move { server.attend(patience, &groups, &notes).await })
        };
        let tasks = servers.iter().map(attend).collect();
        Ok(Self { servers, tasks, runtime: Some(runtime), notes })
    }

    /// Whether there are any.
    pub fn are_on(&self) -> bool {
        !self.servers.is_empty()
    }

    /// What the user should know, once.
    pub fn take_notes(&self) -> Vec<String> {
        self.notes.try_iter().collect()
    }

    /// The tools of those that are ready.
    pub fn described(&self) -> Vec<Tool> {
        let offered = self.ready().flat_map(|(_, offers)| offers.offered.clone());
        offered.map(|offer| offer.tool).collect()
    }

    fn ready(&self) -> impl Iterator<Item = (usize, Arc<Offers>)> {
        self.servers.iter().enumerate().filter_map(|(at, server)| match server.state() {
            State::Ready { offers, .. } => Some((at, offers)),
            _ => None,
        })
    }

    /// A call of a tool by its name for the model, if a server that is ready has it.
    pub fn wanted(&self, name: &str, arguments: JsonObject) -> Option<Wanted> {
        let found = self.ready().find_map(|(at, offers)| {
            let offer = offers.offered.iter().find(|offer| offer.tool.name == name)?;
            Some((at, offer.clone()))
        });
        let (server, Offer { own_name, tool, is_allowed }) = found?;
        let server_name = self.servers[server].config.name.clone();
        Some(Wanted { server, server_name, tool: own_name, name: tool.name, arguments, is_allowed })
    }

    /// Why a name that looks like a server's tool is none.
    pub fn why_not(&self, name: &str) -> Option<String> {
        let (key, _) = name.split_once("__")?;
        let server = self.servers.iter().find(|server| server.config.key == key)?;
        let name = &server.config.name;
        match server.state() {
            State::Starting => Some(format!("the MCP server {name} is still starting")),
            State::Ended(why) => Some(format!("the MCP server {name}: {why}")),
            State::Ready { .. } => None,
        }
    }

    /// Begins a call; its outcome is sent.
    pub fn call(&self, wanted: Wanted, limits: Limits, stop: &Arc<AtomicBool>, to: Sender<Ran>) {
        let Some(runtime) = &self.runtime else { return };
        let (server, stop) = (Arc::clone(&self.servers[wanted.server]), Arc::clone(stop));
        runtime.spawn(async move {
            let ran = server.call(wanted.tool, wanted.arguments, limits, &stop).await;
            // Nobody may be waiting any more.
            to.send(ran).unwrap_or(());
        });
    }

    /// Every server, its state and its tools.
    pub fn listed(&self) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        for server in &self.servers {
            let name = server.config.name.clone();
            match server.state() {
                State::Starting => lines.push((name, "MCP server, starting".into())),
                State::Ended(why) => lines.push((name, format!("MCP server, {why}"))),
                State::Ready { offers, .. } => {
                    let count = offers.offered.len();
                    lines.push((name, format!("MCP server, ready, {count} tools")));
                    lines.extend(offers.offered.iter().map(tool_line));
                }
            }
        }
        lines
    }

    /// All that is known of one server.
    pub fn told(&self, name: &str) -> Option<Vec<(String, String)>> {
        let server = self.servers.iter().find(|server| server.config.name == name)?;
        let mut lines = vec![("command".into(), server.config.command.clone())];
        match server.state() {
            State::Starting => lines.push(("state".into(), "starting".into())),
            State::Ended(why) => lines.push(("state".into(), why)),
            State::Ready { offers, .. } => {
                lines.push(("state".into(), format!("ready, {} tools", offers.offered.len())));
                lines.extend(offers.offered.iter().map(tool_line));
                let left_out = offers.left_out.iter().take(SHOWN_MAX);
                let line = |(name, why): &(String, String)| {
                    (format!("  {name}"), format!("not offered: {why}"))
                };
                lines.extend(left_out.map(line));
                let more = offers.left_out.len().saturating_sub(SHOWN_MAX);
                let more = (more > 0).then(|| ("  ...".into(), format!("{more} more not offered")));
                lines.extend(more);
            }
        }
        let log = server.log();
        let last = &log[log.len().saturating_sub(SHOWN_MAX)..];
        lines.extend(last.iter().map(|line| ("log".into(), line.clone())));
        Some(lines)
    }

    /// Names, for completion and errors.
    pub fn names(&self) -> Vec<String> {
        self.servers.iter().map(|server| server.config.name.clone()).collect()
    }

    /// Closes their inputs, waits a moment for them to end by themselves, and kills the rest.
    pub fn close(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        self.servers.iter().for_each(|server| server.close());
        let tasks = std::mem::take(&mut self.tasks);
        runtime.block_on(async {
            for task in tasks {
                // What is late is killed with its group by the owner of the groups.
                timeout(2 * GRACE, task).await.map(drop).unwrap_or(());
            }
        });
        runtime.shutdown_background();
    }
}

fn tool_line(offer: &Offer) -> (String, String) {
    let first = offer.tool.description.lines().next().unwrap_or("");
    let allowed = if offer.is_allowed { " (needs no decision)" } else { "" };
    (format!("  {}", offer.tool.name), format!("{first}{allowed}"))
}
