//! Lines on standard error: one a request, as `key=value`, with the request's id first.
//!
//! Nothing of what a client wrote or a model answered is logged, only counts and times.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::schedule::Step;
use super::schedule::{Failure, Finish, Job, Usage};

/// Who gets the lines instead of standard error: a program that draws on the terminal.
static LISTENER: Mutex<Option<Sender<String>>> = Mutex::new(None);

/// From here on lines go to the receiver, until it is dropped.
pub fn listen() -> Receiver<String> {
    let (sender, receiver) = channel();
    *LISTENER.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
    receiver
}

/// The line of a job that is over.
pub fn job(job: &Job, usage: Usage, step: &Step, ended: &str) {
    let origin = &job.origin;
    if origin.request.is_empty() {
        return;
    }
    let mut line = format!(
        "request={} api={} index={} ended={ended} prompt={} cached={} generated={} total_ms={}",
        origin.request,
        origin.api,
        job.index,
        usage.prompt,
        usage.cached,
        usage.generated,
        ms(origin.received.elapsed()),
    );
    if let Step::Over(outcome) = step {
        let times = outcome.times;
        line += &format!(
            " queued_ms={} prefill_ms={} ttft_ms={} decode_ms={} tok_s={:.2}",
            ms(times.queued),
            ms(times.prefill),
            ms(times.first_token),
            ms(times.decode),
            per_second(usage.generated.saturating_sub(1), times.decode),
        );
        if let Finish::StopText(stop) = &outcome.finish {
            line += &format!(" stop_bytes={}", stop.len());
        }
    }
    if let Step::Failed(Failure::Engine(what)) = step {
        line += &format!(" error={what:?}");
    }
    if let Some(session) = &origin.session {
        line += &format!(" session={session:?}");
    }
    note(&line);
}

/// A line of its own. Where nobody can be told any more, nothing is said.
pub fn note(text: &str) {
    let listener = LISTENER.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let heard = listener.is_some_and(|listener| listener.send(text.into()).is_ok());
    if !heard {
        writeln!(io::stderr(), "flash-moe: {text}").unwrap_or(());
    }
}

/// Whole milliseconds.
fn ms(time: Duration) -> u128 {
    time.as_millis()
}

/// `count` a second; 0 without a time.
pub fn per_second(count: usize, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}
