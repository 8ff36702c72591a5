//! `flash-moe serve`: one model for any OpenAI or Anthropic client on this machine or network.
//!
//! Connections are tokio's; the model runs on one thread of its own (`schedule`), and the two meet in
//! a bounded queue of jobs and a channel of events for each request. Everything that can be refused
//! is refused before the weights are read, or before a job is made. `flash-moe chat` uses the same
//! model, schedule and prefixes without any connection.

pub mod api;

mod constrain;
pub mod model;
pub mod turns;

pub mod prefix;
pub mod schedule;

mod listen;
mod route;
mod sse;

pub mod log;
pub mod metrics;
mod panel;

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::convert::files::make_directory;
use crate::options::serve::ServeArgs;
use metrics::Metrics;
use model::Model;
use prefix::{PrefixStore, WhenTaken};
use route::{Access, Server};
use schedule::Schedule;

/// Threads for connections: the model's own threads want the rest.
const CONNECTION_THREADS: usize = 2;

/// Runs the command.
///
/// # Errors
/// Whatever the flags, the address, the model or the engine have to say.
pub fn run(args: &ServeArgs) -> Result<ExitCode> {
    let key = args.listen.key()?;
    let address = SocketAddr::new(args.listen.host, args.listen.port);
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address}; another --port may be free"))?;
    listener.set_nonblocking(true).context("the listener")?;
    if !address.ip().is_loopback() && key.is_none() {
        log::note(&format!(
            "warning: {} is open to the network and asks for no key; --api-key-file FILE does",
            address.ip()
        ));
    }
    if let Some(dir) = &args.prefix.state_dir {
        make_directory(dir)?;
    }
    let model =
        Arc::new(Model::open(&args.engine, &args.answer, &args.prefix, args.load.parallel)?);
    let hot_set = args.hot_set.file(model.engine.container());
    hot_set.iter().for_each(|file| file.load(&model.engine));
    let metrics = Arc::new(Metrics::new());
    let prefixes = PrefixStore::open(&model, &metrics, &args.prefix, WhenTaken::Refuse)?;
    let (live, waiting) = (args.load.parallel, args.load.queue);
    let schedule = Schedule::start(&model, &metrics, prefixes, live, waiting)
        .context("the engine's thread")?;
    let server = Arc::new(Server {
        model: Arc::clone(&model),
        schedule,
        metrics,
        responses: Arc::default(),
        access: Access { key, cors: args.listen.cors.clone() },
        body_max: usize::try_from(args.load.max_body).unwrap_or(usize::MAX),
        client_timeout: Duration::from_secs(args.load.client_timeout as u64),
        request_limit: args.load.request_limit(),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONNECTION_THREADS)
        .enable_all()
        .build()
        .context("the runtime")?;
    let deadline = Duration::from_secs(args.load.shutdown_timeout);
    let status = runtime.block_on(listen::serve(listener, &server, deadline))?;
    runtime.shutdown_timeout(Duration::from_secs(1));
    hot_set.iter().for_each(|file| file.save(&model.engine));
    Ok(status)
}
