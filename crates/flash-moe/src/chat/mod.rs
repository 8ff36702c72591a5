//! `flash-moe chat`: a conversation in the terminal.
//!
//! `talk` is the conversation, `backend` who answers: the server's own engine thread in this process,
//! or a server. `app` is the screen around it, pure but for the surface it draws on; `plain` the same
//! without a screen. What the user said is on disk before it is asked, and the terminal is given back
//! on every way out.

mod base64;
pub mod line;
mod private;

mod conversation;
mod sessions;

mod backend;
mod tools;

mod commands;
mod perform;
mod talk;

mod editor;
mod history;
mod keys;
mod markdown;
mod surface;
mod view;

mod app;
mod plain;
mod terminal;

use std::io::{self, BufWriter, Stdout, Write};
use std::process::{Command, ExitCode};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use crossterm::event;
use indicatif::{ProgressBar, ProgressStyle};

use crate::options::chat::ChatArgs;
use crate::options::environment;
use crate::serve::log;
use app::{App, Outside};
use history::History;
use sessions::Store;
use surface::Surface;
use talk::Talk;
use terminal::{Ending, Terminal};

/// Time between two looks at an answer that is coming: one frame.
const FRAME: Duration = Duration::from_millis(16);
/// Time between two looks at whether something happened by itself.
const IDLE: Duration = Duration::from_millis(250);

/// How long an answer that was left may take to end, to be kept as far as it came.
const SETTLE: Duration = Duration::from_secs(2);

type Screen = App<BufWriter<Stdout>>;

/// Runs the command.
///
/// # Errors
/// Whatever the flags, the model, the server or the terminal have to say.
pub fn run(args: ChatArgs) -> Result<ExitCode> {
    let data = ChatArgs::data_dir()?;
    let store = Store::new(data.join("sessions"));
    if args.session.sessions {
        perform::print_sessions(&store.list()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let draws = environment::may_draw() && !args.session.plain;
    let is_typed = environment::input_is_terminal();
    if args.tools.are_on() && !draws && !is_typed {
        bail!("--tools and --mcp ask before anything runs: standard input must be a terminal");
    }
    let spinner = loading(&args);
    let talk = Talk::open(args, store);
    spinner.finish_and_clear();
    let talk = talk?;
    let (mut talk, worked) = match draws {
        true => on_screen(talk, &data.join("history")),
        false => plain::run(talk, is_typed),
    };
    talk.settle(SETTLE);
    if talk.session.is_on_disk() {
        let id = talk.session.id();
        // The terminal may be gone.
        writeln!(io::stderr(), "flash-moe: session {id}; chat --resume goes on with it")
            .unwrap_or(());
    }
    talk.backend.close();
    worked
}

fn loading(args: &ChatArgs) -> ProgressBar {
    if !environment::errors_are_seen() {
        return ProgressBar::hidden();
    }
    let what = if args.server.connect.is_some() { "connecting" } else { "loading the model" };
    let style = ProgressStyle::with_template("{spinner} {msg}").expect("a constant template");
    let spinner = ProgressBar::new_spinner().with_style(style).with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Runs until the user leaves. The talk comes back whatever happened.
fn on_screen(talk: Talk, history: &std::path::Path) -> (Talk, Result<ExitCode>) {
    terminal::restore_on_panic();
    let (ending, terminal) = match (Ending::listen(), Terminal::take()) {
        (Ok(ending), Ok(terminal)) => (ending, terminal),
        (Err(error), _) | (_, Err(error)) => return (talk, Err(error)),
    };
    let mut terminal = Some(terminal);
    let notes = log::listen();
    let out = BufWriter::with_capacity(1 << 16, io::stdout());
    let surface = Surface::new(out, Terminal::size(), environment::may_color());
    let mut app = App::new(talk, surface, History::open(Some(history.into())));
    let worked = turn(&mut app, &ending, &notes, &mut terminal);
    let finished = app.finish();
    drop(terminal);
    let talk = app.into_talk();
    // Where the system asked for the end nobody may be there to see the last rows.
    let worked = if ending.is_asked() { Ok(()) } else { worked.and(finished) };
    (talk, worked.map(|()| ExitCode::SUCCESS))
}

/// Inputs and events, until the user leaves.
fn turn(
    app: &mut Screen,
    ending: &Ending,
    notes: &Receiver<String>,
    terminal: &mut Option<Terminal>,
) -> Result<()> {
    while !app.is_over() && !ending.is_asked() {
        app.tick();
        notes.try_iter().for_each(|note| app.note(&note));
        app.draw()?;
        if let Some(outside) = app.take_outside() {
            do_outside(app, outside, terminal)?;
            continue;
        }
        let wait = if app.is_busy() { FRAME } else { IDLE };
        if !terminal::wait_for_input(wait)? {
            ending.ask();
        }
        // All that is there is taken before the next drawing: keys never queue behind rows.
        while !ending.is_asked() && event::poll(Duration::ZERO).context("the terminal")? {
            app.input(event::read().context("the terminal")?)?;
        }
    }
    Ok(())
}

/// Gives the terminal away for a while.
fn do_outside(app: &mut Screen, outside: Outside, terminal: &mut Option<Terminal>) -> Result<()> {
    app.finish()?;
    *terminal = None;
    let done = match outside {
        Outside::Suspend => terminal::suspend(),
        Outside::Edit(text) => edited(&text).map(|text| app.refill(&text)),
    };
    *terminal = Some(Terminal::take()?);
    let (columns, rows) = Terminal::size();
    app.input(event::Event::Resize(columns as u16, rows as u16))?;
    if let Err(error) = done {
        app.error(&format!("{error:#}"));
    }
    Ok(())
}

/// A text as the user's editor leaves it.
fn edited(text: &str) -> Result<String> {
    let editor = environment::editor();
    let editor = editor.context("set VISUAL or EDITOR to the editor you like")?;
    let name = format!("message-{}.md", std::process::id());
    let path = ChatArgs::data_dir()?.join(name);
    private::replace(&path, text.as_bytes()).with_context(|| path.display().to_string())?;
    let mut words = editor.split_whitespace();
    let program = words.next().context("VISUAL and EDITOR are empty")?;
    let status = Command::new(program).args(words).arg(&path).status();
    let read = std::fs::read_to_string(&path);
    // One that is left behind is as private as the conversations beside it.
    std::fs::remove_file(&path).unwrap_or(());
    let status = status.with_context(|| format!("cannot start {editor}"))?;
    ensure!(status.success(), "{editor} ended with {status}; the message is as it was");
    read.with_context(|| path.display().to_string())
}
