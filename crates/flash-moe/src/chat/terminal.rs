//! The terminal while the chat has it: raw, with pastes marked, and given back on every way out.
//!
//! Leaving, an error, a panic of the main thread, SIGTERM and SIGHUP all restore it. A panic of another
//! thread is a note on the screen instead of text across it. Only `kill -9` leaves it raw. One that has
//! gone away is noticed before it is read: its end would be read for ever.

use std::io::{self, Write};
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use crossterm::event::{DisableBracketedPaste, EnableBracketedPaste};
use crossterm::{execute, terminal};

use crate::serve::log;

/// A terminal that is ours until this is dropped.
pub struct Terminal {
    _private: (),
}

impl Terminal {
    /// Takes it over.
    ///
    /// # Errors
    /// It cannot be made raw.
    pub fn take() -> Result<Self> {
        terminal::enable_raw_mode()
            .context("this terminal cannot be drawn on; --plain does not")?;
        let taken = Self { _private: () };
        execute!(io::stdout(), EnableBracketedPaste).context("the terminal")?;
        Ok(taken)
    }

    /// Columns and rows.
    pub fn size() -> (usize, usize) {
        match terminal::size() {
            Ok((columns @ 1.., rows @ 1..)) => (columns.into(), rows.into()),
            // A terminal that does not say is taken for the smallest of old.
            _ => (80, 24),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was. Where that fails there is nobody left to tell.
fn restore() {
    execute!(io::stdout(), DisableBracketedPaste).unwrap_or(());
    write!(io::stdout(), "\x1b[?25h\x1b[?2026l").unwrap_or(());
    io::stdout().flush().unwrap_or(());
    terminal::disable_raw_mode().unwrap_or(());
}

/// From here on a panic of this thread restores the terminal before it is told, and one of another
/// thread is a note.
pub fn restore_on_panic() {
    let before = panic::take_hook();
    let own = thread::current().id();
    panic::set_hook(Box::new(move |info| {
        if thread::current().id() == own {
            restore();
            before(info);
        } else {
            log::note(&format!("warning: internal error: {info}"));
        }
    }));
}

/// Whether the system wants this program to end.
#[derive(Clone, Default)]
pub struct Ending(Arc<AtomicBool>);

impl Ending {
    /// Listens for SIGTERM and SIGHUP.
    ///
    /// # Errors
    /// The system has no thread or no signals to give.
    pub fn listen() -> Result<Self> {
        let ending = Self::default();
        let flag = Arc::clone(&ending.0);
        listen_for_end(move || flag.store(true, Ordering::Relaxed))?;
        Ok(ending)
    }

    /// Ends it as if the system had asked.
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it does.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Calls `ask` at the first SIGTERM or SIGHUP.
///
/// # Errors
/// The system has no thread or no signals to give.
#[cfg(unix)]
pub fn listen_for_end(ask: impl Fn() + Send + 'static) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut end, mut hangup) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = end.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        ask();
    })?;
    Ok(())
}

/// There are no such signals here.
///
/// # Errors
/// Never.
#[cfg(not(unix))]
pub fn listen_for_end(_ask: impl Fn() + Send + 'static) -> Result<()> {
    Ok(())
}

/// Waits for input, no longer than `longest`. False when the terminal is gone.
///
/// # Errors
/// The system refuses to wait.
#[cfg(unix)]
pub fn wait_for_input(longest: Duration) -> Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let input = io::stdin();
    let mut waited = [PollFd::new(&input, PollFlags::IN)];
    let longest = Timespec::try_from(longest).context("a time to wait")?;
    match poll(&mut waited, Some(&longest)) {
        // A signal: the terminal may have another size.
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context("the terminal"),
    }
    let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
    Ok(!waited[0].revents().intersects(gone))
}

/// Waits for input, no longer than `longest`.
///
/// # Errors
/// The terminal's.
#[cfg(not(unix))]
pub fn wait_for_input(longest: Duration) -> Result<bool> {
    crossterm::event::poll(longest).context("the terminal")?;
    Ok(true)
}

/// Stops this process as Ctrl-Z does, until it is continued.
///
/// # Errors
/// The system refuses.
#[cfg(unix)]
pub fn suspend() -> Result<()> {
    use rustix::process::{Signal, getpid, kill_process};
    kill_process(getpid(), Signal::TSTP).context("suspending")
}

/// There is no such thing here.
///
/// # Errors
/// Always.
#[cfg(not(unix))]
pub fn suspend() -> Result<()> {
    anyhow::bail!("this system has no suspended programs")
}
