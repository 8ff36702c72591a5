//! One command of the shell: started in a group of its own, bounded in time and output, killed as a whole.
//!
//! Standard output and standard error share one pipe, so they keep their order. What is left of the
//! group when the command has ended is killed too; a process that has left the group (`setsid`) is not
//! ours any more, and what it writes later is lost.

use std::io::{PipeReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::group::Groups;
use super::outcome::{Limits, Output, Ran, Why};
use crate::options::environment;

/// How often the end of the command is looked for.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long the last of the output may take to arrive when the command has ended.
const LAST_OUTPUT: Duration = Duration::from_millis(500);

/// Runs a command to its end, or until `stop`.
pub fn run(
    command: &str,
    directory: &Path,
    limits: Limits,
    stop: &AtomicBool,
    groups: &Groups,
) -> Ran {
    match start(command, directory) {
        Ok((mut child, pipe)) => {
            let output = collect(pipe, limits.output_bytes);
            groups.add(child.id());
            let why = watch(&mut child, limits.timeout, stop);
            groups.kill(child.id());
            // What has ended already is no error.
            child.kill().unwrap_or(());
            child.wait().map(drop).unwrap_or(());
            let (bytes, left_out) = output.last();
            Ran { output: String::from_utf8_lossy(&bytes).into_owned(), why, left_out }
        }
        Err(error) => Ran::without_output(Why::NotStarted(error.to_string())),
    }
}

fn start(command: &str, directory: &Path) -> std::io::Result<(Child, PipeReader)> {
    let (reader, writer) = std::io::pipe()?;
    let mut shell = Command::new(environment::shell());
    shell.arg(if cfg!(windows) { "/C" } else { "-c" }).arg(command).current_dir(directory);
    shell.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut shell, 0);
    Ok((shell.spawn()?, reader))
}

fn watch(child: &mut Child, timeout: Duration, stop: &AtomicBool) -> Why {
    let started = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return ended(status),
            Ok(None) => {}
            Err(error) => return Why::NotStarted(error.to_string()),
        }
        if stop.load(Ordering::Relaxed) {
            return Why::Stopped;
        }
        if started.elapsed() >= timeout {
            return Why::TimedOut(timeout);
        }
        thread::sleep(INTERVAL);
    }
}

fn ended(status: ExitStatus) -> Why {
    status.code().map_or(Why::Killed, Why::Exited)
}

/// What has been read so far.
struct Collected {
    output: Arc<Mutex<Output>>,
    end: Receiver<()>, // of the pipe: nothing is sent, the sender goes away
}

fn collect(mut pipe: PipeReader, most: usize) -> Collected {
    let (ends, end) = channel();
    let output = Arc::new(Mutex::new(Output::new(most)));
    let own = Arc::clone(&output);
    thread::spawn(move || {
        let mut bytes = [0; 8192];
        while let Ok(read @ 1..) = pipe.read(&mut bytes) {
            own.lock().unwrap_or_else(PoisonError::into_inner).take(&bytes[..read]);
        }
        drop(ends);
    });
    Collected { output, end }
}

impl Collected {
    /// All of it, or what is there after a while if somebody keeps the pipe open.
    fn last(self) -> (Vec<u8>, usize) {
        // Either way nothing comes but time.
        self.end.recv_timeout(LAST_OUTPUT).unwrap_or(());
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *output, Output::new(0)).bytes()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn ran(command: &str, limits: Limits) -> Ran {
        run(command, Path::new("/"), limits, &AtomicBool::new(false), &Groups::default())
    }

    const LIMITS: Limits = Limits { timeout: Duration::from_secs(60), output_bytes: 1000 };

    #[test]
    fn both_streams_come_back_in_their_order_with_the_status() {
        let got = ran("echo one; echo two >&2; pwd; exit 3", LIMITS);
        assert_eq!(got, Ran { output: "one\ntwo\n/\n".into(), why: Why::Exited(3), left_out: 0 });
        let input = ran("cat; echo done", LIMITS);
        assert_eq!(input.output, "done\n");
    }

    #[test]
    fn a_long_output_loses_its_middle() {
        let got = ran("i=0; while [ $i -lt 500 ]; do echo line $i; i=$((i+1)); done", LIMITS);
        assert!(got.output.starts_with("line 0\n") && got.output.ends_with("line 499\n"));
        assert!(got.output.contains(&format!("[... {} bytes are left out ...]", got.left_out)));
        assert!(got.left_out > 3000 && got.output.len() < 1100);
    }

    #[test]
    fn the_whole_group_dies_at_the_time_limit_and_at_the_end() {
        let limits = Limits { timeout: Duration::from_millis(300), ..LIMITS };
        let dir = tempfile::tempdir().unwrap();
        for (command, why) in [
            ("sleep 1000 & echo $! > pid; wait", Why::TimedOut(limits.timeout)),
            ("sleep 1000 & echo $! > pid", Why::Exited(0)),
        ] {
            let started = Instant::now();
            let got = run(command, dir.path(), limits, &AtomicBool::new(false), &Groups::default());
            assert_eq!(got.why, why);
            assert!(started.elapsed() < Duration::from_secs(30));
            let pid = std::fs::read_to_string(dir.path().join("pid")).unwrap();
            let lives = || {
                let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
                stat.is_ok_and(|stat| !stat.contains(") Z "))
            };
            // A signal is delivered when the system gets to it.
            while lives() && started.elapsed() < Duration::from_secs(30) {
                thread::yield_now();
            }
            assert!(!lives(), "{command}: {pid} lives on");
        }
    }

    #[test]
    fn what_was_said_is_not_lost_to_a_process_that_keeps_the_pipe() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = "setsid sh -c 'touch up; sleep 2' & while [ ! -e up ]; do :; done";
        let command = format!("echo IMPORTANT; {daemon}; echo last");
        let stop = AtomicBool::new(false);
        let got = run(&command, dir.path(), LIMITS, &stop, &Groups::default());
        assert_eq!((got.output.as_str(), got.why), ("IMPORTANT\nlast\n", Why::Exited(0)));
    }

    #[test]
    fn a_stop_and_a_directory_that_is_gone_are_told() {
        let groups = Groups::default();
        let got = run("sleep 1000", Path::new("/"), LIMITS, &AtomicBool::new(true), &groups);
        assert_eq!(got.why, Why::Stopped);
        let nowhere = Path::new("/nowhere/at/all");
        let got = run("true", nowhere, LIMITS, &AtomicBool::new(false), &groups);
        assert!(matches!(got.why, Why::NotStarted(_)), "{got:?}");
    }
}
