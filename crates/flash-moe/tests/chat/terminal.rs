//! A terminal for a program under test: a pseudo-terminal, and an emulator that draws what comes.
//!
//! Waits look at the screen again and again until it shows what was expected, and fail with the screen
//! after a minute. `setsid` gives the program the terminal as its own.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{InputModes, LocalModes, OutputModes, Winsize, tcgetattr, tcsetwinsize};

use crate::program::Home;

/// A screen that has not come by then will not come.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program on a terminal of its own.
pub struct Terminal {
    child: Child,
    keys: File,
    screen: Arc<Mutex<vt100::Parser>>,
    modes: (InputModes, OutputModes, LocalModes), // before the program
}

fn modes(terminal: &File) -> (InputModes, OutputModes, LocalModes) {
    let modes = tcgetattr(terminal).expect("the modes of a terminal");
    (modes.input_modes, modes.output_modes, modes.local_modes)
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn cells(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).expect("a size above 0")
}

impl Terminal {
    /// Starts `flash-moe chat` with these flags.
    pub fn start(home: &Home, size: (u16, u16), flags: &[&str]) -> Self {
        Self::launch(home, size, flags, |_| {})
    }

    /// The same, with what a test changes about the command.
    pub fn launch(
        home: &Home,
        (columns, rows): (u16, u16),
        flags: &[&str],
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("its other end");
        let name = ptsname(&master, Vec::new()).expect("its name");
        let name = name.to_str().expect("a plain name").to_string();
        tcsetwinsize(&master, size(columns, rows)).expect("a size");
        let keys = File::from(master);
        let modes = modes(&keys);
        let slave = OpenOptions::new().read(true).write(true).open(name).expect("its other end");
        let program = home.command(&["chat"]);
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(program.get_program()).arg("chat").args(flags);
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let other = || slave.try_clone().expect("a copy");
        command.env("TERM", "xterm-256color").stdin(other()).stdout(other()).stderr(other());
        change(&mut command);
        let child = command.spawn().expect("setsid, of util-linux");
        drop((command, slave));
        let parser = vt100::Parser::new(cells(rows), cells(columns), 1000);
        let screen = Arc::new(Mutex::new(parser));
        let (own, mut output) = (Arc::clone(&screen), keys.try_clone().expect("a copy"));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut bytes) {
                own.lock().unwrap_or_else(PoisonError::into_inner).process(&bytes[..read]);
            }
        });
        Self { child, keys, screen, modes }
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("a terminal that takes keys");
    }

    /// The rows of the screen.
    pub fn screen(&self) -> String {
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        screen.screen().contents()
    }

    /// Waits until the screen shows a text, and gives the screen.
    #[track_caller]
    pub fn wait_for(&self, text: &str) -> String {
        self.wait(text, |screen| screen.contains(text))
    }

    /// Waits until the screen is as wanted.
    #[track_caller]
    pub fn wait(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let started = Instant::now();
        loop {
            let screen = self.screen();
            if wanted(&screen) {
                return screen;
            }
            assert!(started.elapsed() < PATIENCE, "no {what:?} on\n{screen}");
            thread::park_timeout(Duration::from_millis(10));
        }
    }

    /// Gives it another size.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let mut screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        screen.set_size(cells(rows), cells(columns));
        tcsetwinsize(&self.keys, size(columns, rows)).expect("a size");
    }

    /// Whether the terminal is as it was before, as far as modes go and pastes.
    pub fn is_as_before(&self) -> bool {
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        modes(&self.keys) == self.modes && !screen.screen().bracketed_paste()
    }

    /// Waits for the program to end.
    pub fn ended(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "it does not end:\n{}", self.screen());
            thread::park_timeout(Duration::from_millis(10));
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let id = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let id = id.expect("a process id");
        rustix::process::kill_process(id, signal).expect("a running program");
    }

    /// Kills it at once.
    pub fn kill(&mut self) {
        self.child.kill().expect("a running program");
        self.ended();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().unwrap_or(());
        self.child.wait().map(drop).unwrap_or(());
    }
}
