//! Groups of processes that tools have started, so that none of them outlives the chat.
//!
//! Whoever starts a process in a group of its own says so here, and takes it back when the process has
//! ended. What is left is killed as a whole on the way out, whichever that is: a copy serves the one who
//! hears Ctrl-C as well. Only `kill -9` of the chat itself leaves groups behind.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The groups that may live.
#[derive(Clone, Default)]
pub struct Groups(Arc<Mutex<BTreeSet<u32>>>);

impl Groups {
    /// A process leads a group of its own.
    pub fn add(&self, leader: u32) {
        self.lock().insert(leader);
    }

    /// Kills what is left of a group.
    pub fn kill(&self, leader: u32) {
        if self.lock().remove(&leader) {
            kill(leader);
        }
    }

    /// Kills what is left of all.
    pub fn kill_all(&self) {
        std::mem::take(&mut *self.lock()).into_iter().for_each(kill);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has ended already is no error.
#[cfg(unix)]
fn kill(leader: u32) {
    if let Some(group) = i32::try_from(leader).ok().and_then(rustix::process::Pid::from_raw) {
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap_or(());
    }
}

/// Other systems have no groups; the process itself is killed by who holds it.
#[cfg(not(unix))]
fn kill(_leader: u32) {}
