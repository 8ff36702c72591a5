//! Connections: accepted, bounded in number and in patience, and ended in order.
//!
//! A client that sends no request, or takes none of its answer, for the client timeout is cut off; a
//! long wait for the model is no such thing. The first signal stops taking requests and lets the
//! running ones end and what is kept be written within the deadline, the second ends the process.

use std::future::Future;
use std::io;
use std::net::TcpListener as StdListener;
use std::pin::Pin;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::task::{Context as Poller, Poll, ready};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout_at};

use super::log;
use super::route::{self, Server};

/// Open connections at once; further ones wait to be accepted.
const CONNECTIONS_MAX: usize = 1024;
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Exit status after the second signal.
const INTERRUPTED: i32 = 130;

/// Serves until a signal; gives the exit status.
///
/// # Errors
/// The listener cannot be used, or signals cannot be heard.
pub async fn serve(
    listener: StdListener,
    server: &Arc<Server>,
    deadline: Duration,
) -> Result<ExitCode> {
    let listener = TcpListener::from_std(listener).context("the listener")?;
    let address = listener.local_addr().context("the listener")?;
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    let (closing, closed) = watch::channel(false);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let model = &server.model;
    log::note(&format!(
        "listening on http://{address} with {}, context {}",
        model.name,
        model.engine.context()
    ));
    tokio::select! {
        () = accept(&listener, server, &places, &closed) => {}
        () = signals.next() => {}
    }
    drop(listener);
    let until = Instant::now() + deadline;
    server.schedule.drain(until.into_std());
    closing.send_replace(true);
    log::note(&format!("shutting down within {} s; again to end at once", deadline.as_secs()));
    let ended = async {
        // All places are free when every connection is gone.
        places.acquire_many(CONNECTIONS_MAX as u32).await.is_ok()
    };
    let stopped = async {
        // Those that have not ended by then fail.
        timeout_at(until, ended).await.unwrap_or(true);
        let server = Arc::clone(server);
        // A panic has been printed where it happened.
        spawn_blocking(move || server.schedule.stop()).await.unwrap_or(());
    };
    tokio::select! {
        () = stopped => {}
        () = signals.next() => process::exit(INTERRUPTED),
    }
    Ok(ExitCode::SUCCESS)
}

async fn accept(
    listener: &TcpListener,
    server: &Arc<Server>,
    places: &Arc<Semaphore>,
    closed: &watch::Receiver<bool>,
) {
    let router = route::router(server);
    loop {
        let Ok(place) = Arc::clone(places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Too many open files, most likely: some close before long.
                log::note(&format!("cannot accept a connection: {error}"));
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (router, closed) = (router.clone(), closed.clone());
        let patience = server.client_timeout;
        tokio::spawn(async move {
            converse(stream, router, patience, closed).await;
            drop(place);
        });
    }
}

/// One connection, to its end.
async fn converse(
    stream: TcpStream,
    router: axum::Router,
    patience: Duration,
    mut closed: watch::Receiver<bool>,
) {
    // Tokens are small; none waits for the next one.
    stream.set_nodelay(true).unwrap_or(());
    let io = TokioIo::new(Patient { stream, patience, waiting: None });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_header_size(HEAD_BYTES_MAX)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    // What is watched changes once, when the server closes; so does its loss.
    let closing = async { closed.changed().await.unwrap_or(()) };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // A client that goes away or breaks the protocol is its own affair.
    ended.unwrap_or(());
}

/// A stream whose writes fail when nobody takes them for too long.
struct Patient {
    stream: TcpStream,
    patience: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn patiently<T>(
        &mut self,
        poller: &mut Poller<'_>,
        done: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.waiting = None;
            return done;
        }
        let until = Instant::now() + self.patience;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep_until(until)));
        ready!(waiting.as_mut().poll(poller));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        poller: &mut Poller<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(poller, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        poller: &mut Poller<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(poller, bytes);
        self.patiently(poller, done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        poller: &mut Poller<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(poller, slices);
        self.patiently(poller, done)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, poller: &mut Poller<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(poller)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, poller: &mut Poller<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(poller)
    }
}

/// Ctrl-C, and what a system sends to end a program.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    #[cfg(not(unix))]
    fn listen() -> io::Result<Self> {
        Ok(Self {})
    }

    #[cfg(unix)]
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    #[cfg(not(unix))]
    async fn next(&mut self) {
        // A handler that cannot be installed leaves the system's own, which ends the process.
        tokio::signal::ctrl_c().await.unwrap_or(());
    }
}
