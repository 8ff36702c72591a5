//! The chat in a terminal: typed at, stopped, resized, asked about commands, left.
//!
//! The built-in model answers where any text will do, a scripted server where it must be a certain one.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::symlink;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::server::Scripted;
use super::terminal::Terminal;
use crate::fixture::converted;
use crate::program::{Home, text};
use crate::serve::client::TEMPLATE;

/// Slow kernels, so that an answer is still coming when it is looked at.
const MODEL: [&str; 8] = ["--memory", "600MiB", "--threads", "1", "--seed", "5", "--isa", "scalar"];

/// A text, an end, and the mark of the stream's end.
pub fn answer(delta: Value, reason: &str) -> Vec<Value> {
    vec![
        json!({ "choices": [{ "delta": delta }] }),
        json!({ "choices": [{ "delta": {}, "finish_reason": reason }] }),
        json!("[DONE]"),
    ]
}

pub fn call(command: &str) -> Value {
    let arguments = json!({ "command": command }).to_string();
    json!({ "tool_calls": [{ "index": 0, "id": "x", "function": { "name": "shell", "arguments": arguments } }] })
}

#[test]
fn a_message_is_typed_answered_stopped_and_the_terminal_given_back() {
    let home = Home::new();
    let mut terminal = Terminal::start(&home, (80, 24), &MODEL);
    terminal.wait_for("/help says more");
    assert!(!terminal.is_as_before());
    terminal.press("Tell me a very long story.\r");
    terminal.wait_for("Ctrl-C stops");
    // An answer that has no text yet would not be kept.
    terminal.wait("some text", |screen| {
        let rows = screen.lines().skip_while(|row| !row.starts_with("> Tell")).skip(1);
        let mut rows = rows.take_while(|row| !row.contains("Ctrl-C stops"));
        rows.any(|row| row.starts_with(char::is_alphabetic))
    });
    // Keys are seen while the answer comes.
    terminal.press("typed meanwhile");
    terminal.wait_for("> typed meanwhile");
    terminal.press("\x03");
    terminal.wait("the answer stopped", |screen| {
        screen.contains("stopped\n")
            && screen.contains("> typed meanwhile")
            && !screen.contains("Ctrl-C stops")
    });
    terminal.press("\x15/stats\r");
    terminal.wait_for("experts ");
    terminal.press("\x04");
    assert!(terminal.ended().success());
    terminal.wait_for("chat --resume goes on with it");
    assert!(terminal.is_as_before());

    let mut again = Terminal::start(&home, (40, 24), &[&MODEL[..], &["--resume"]].concat());
    let screen = again.wait_for("stopped");
    assert!(screen.contains("> Tell me a very long story."), "{screen}");
    again.press("/quit\r");
    assert!(again.ended().success());
}

#[test]
fn a_new_size_lays_the_live_rows_out_anew() {
    let home = Home::new();
    let server = Scripted::start(vec![answer(json!({ "content": "One answer." }), "stop")]);
    let flags = ["--connect", &server.url(), "-m", "scripted"];
    let mut terminal = Terminal::start(&home, (80, 20), &flags);
    terminal.wait_for("/help says more");
    terminal.press("Hello\r");
    terminal.wait_for("One answer.");
    terminal.press("a line that is longer than forty columns are wide");
    terminal.wait_for("columns are wide");
    terminal.resize(40, 20);
    terminal.wait("two rows of typed text", |screen| {
        let mut rows = screen.lines().map(str::trim_end);
        let first = rows.any(|row| row == "> a line that is longer than forty colu");
        first && rows.next() == Some("  mns are wide")
    });
}

#[test]
fn a_command_runs_only_when_it_is_allowed_and_its_output_goes_back() {
    let home = Home::new();
    let server = Scripted::start(vec![
        answer(call("echo out; echo err >&2; exit 4"), "tool_calls"),
        answer(call("rm -rf everything"), "tool_calls"),
        answer(json!({ "content": "Done, all of it." }), "stop"),
    ]);
    let flags = ["--connect", &server.url(), "-m", "scripted", "--tools"];
    let mut terminal = Terminal::start(&home, (80, 24), &flags);
    terminal.wait_for("/help says more");
    terminal.press("Do it\r");
    let screen = terminal.wait_for("run it? [y/n/a/e]");
    assert!(screen.contains("$ echo out; echo err >&2; exit 4"), "{screen}");
    assert_eq!(server.request()["tools"][0]["function"]["name"], "shell");
    terminal.press("y\r");
    terminal.wait_for("$ rm -rf everything");
    let messages = server.request()["messages"].clone();
    assert_eq!(messages[2]["content"], "out\nerr\n[exit status 4]");
    assert_eq!(messages[2]["tool_call_id"], messages[1]["tool_calls"][0]["id"]);
    terminal.press("n\r");
    terminal.wait_for("Done, all of it.");
    let declined = server.request()["messages"][4]["content"].clone();
    assert!(declined.as_str().is_some_and(|text| text.contains("declined")), "{declined}");
}

#[test]
fn an_answer_that_breaks_off_leaves_its_text_and_can_be_retried() {
    let home = Home::new();
    let broken = vec![json!({ "choices": [{ "delta": { "content": "Half an ans" } }] })];
    let server =
        Scripted::start(vec![broken, answer(json!({ "content": "A whole one." }), "stop")]);
    let flags = ["--connect", &server.url(), "-m", "scripted"];
    let mut terminal = Terminal::start(&home, (80, 24), &flags);
    terminal.wait_for("/help says more");
    terminal.press("Hello\r");
    let screen = terminal.wait_for("/retry asks again");
    assert!(screen.contains("Half an ans") && screen.contains("broke off"), "{screen}");
    terminal.press("/retry\r");
    terminal.wait_for("A whole one.");
    let (first, second) = (server.request(), server.request());
    assert_eq!(first["messages"], second["messages"]);
    terminal.kill();
}

/// A chat on a scripted server whose model has asked for a command that goes on, and was allowed to. Its
/// process id is written to a file of the home.
fn running(home: &Home, plain: bool) -> (Terminal, Scripted, i32) {
    let pid = home.path("pid");
    let command =
        format!("echo begun; echo $$ > {0}.part; mv {0}.part {0}; sleep 1000", pid.display());
    let server = Scripted::start(vec![
        answer(call(&command), "tool_calls"),
        answer(json!({ "content": "It was stopped." }), "stop"),
    ]);
    let url = server.url();
    let mut flags = vec!["--connect", &url, "-m", "scripted", "--tools"];
    flags.extend(plain.then_some("--plain"));
    let mut terminal = Terminal::start(home, (80, 24), &flags);
    terminal.wait_for(if plain { "> " } else { "/help says more" });
    terminal.press("Do it\r");
    terminal.wait_for("run it? [y/n/a");
    terminal.press("y\r");
    terminal.wait("the command's id", |_| pid.exists());
    let pid = fs::read_to_string(pid).expect("an id").trim().parse().expect("a number");
    (terminal, server, pid)
}

/// Whether a process runs; one that is dead and not yet waited for does not.
fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn no_way_out_of_the_chat_leaves_a_command_running() {
    for signal in [None, Some(Signal::TERM), Some(Signal::HUP)] {
        let home = Home::new();
        let (mut terminal, _server, pid) = running(&home, false);
        match signal {
            None => terminal.press("\x04"),
            Some(signal) => terminal.signal(signal),
        }
        assert!(terminal.ended().success(), "{signal:?}");
        assert!(!lives(pid), "{signal:?}");
        assert!(terminal.is_as_before(), "{signal:?}");
        let listed = home.succeed(&["chat", "--sessions"]).stdout;
        let listed = String::from_utf8(listed).expect("text");
        assert!(listed.contains("2 messages  Do it"), "{listed}");
    }
    let home = Home::new();
    let (mut terminal, _server, pid) = running(&home, true);
    terminal.signal(Signal::TERM);
    assert_eq!(terminal.ended().code(), Some(143));
    assert!(!lives(pid), "without a screen");
}

#[test]
fn ctrl_c_kills_the_command_and_the_chat_goes_on() {
    for plain in [false, true] {
        let home = Home::new();
        let (mut terminal, server, pid) = running(&home, plain);
        terminal.press("\x03");
        terminal.wait_for("It was stopped.");
        assert!(!lives(pid));
        let results = server.requests().pop().expect("a request")["messages"][2].clone();
        assert_eq!(results["content"], "begun\n[stopped by the user]");
        terminal.press("\x04");
        assert!(terminal.ended().success());
    }
}

#[test]
fn a_message_is_written_in_the_user_s_own_editor() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    let editor = home.write("editor.sh", "#!/bin/sh\necho from the editor >> \"$2\"\n");
    fs::set_permissions(&editor, fs::Permissions::from_mode(0o700)).expect("a program");
    let server = Scripted::start(vec![answer(json!({ "content": "An answer." }), "stop")]);
    let flags = ["--connect", &server.url(), "-m", "scripted"];
    let mut terminal = Terminal::launch(&home, (80, 24), &flags, |command| {
        command.env("VISUAL", format!("{editor} --flag"));
    });
    terminal.wait_for("/help says more");
    terminal.press("typed \x18");
    terminal.wait_for("> typed from the editor");
    terminal.press("\r");
    terminal.wait_for("An answer.");
    assert_eq!(server.request()["messages"][0]["content"], "typed from the editor");
    terminal.press("/edit\r");
    terminal.wait("an empty message, edited", |screen| {
        screen.lines().filter(|row| row.trim_end() == "> from the editor").count() == 1
    });
}

#[test]
fn standard_error_that_takes_nothing_stops_no_plain_chat() {
    let home = Home::new();
    let server = Scripted::start(vec![answer(json!({ "content": "An answer." }), "stop")]);
    let flags = ["--connect", &server.url(), "-m", "scripted", "--plain"];
    let full = OpenOptions::new().write(true).open("/dev/full").expect("a file that is full");
    let mut terminal = Terminal::launch(&home, (80, 24), &flags, |command| {
        command.stderr(full);
    });
    terminal.press("Hello\r");
    terminal.wait_for("An answer.");
    terminal.press("\x04");
    assert!(terminal.ended().success());
}

#[test]
fn a_model_that_knows_no_tools_does_not_take_over_where_there_are_some() {
    let home = Home::new();
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny");
    let able = home.path("able");
    fs::create_dir(&able).expect("a directory");
    for entry in fs::read_dir(tiny).expect("the built-in model") {
        let entry = entry.expect("an entry");
        symlink(entry.path(), able.join(entry.file_name())).expect("a link");
    }
    fs::copy(TEMPLATE, able.join("chat_template.jinja")).expect("a template that knows tools");
    let able = text(&able);
    let flags =
        ["--memory", "600MiB", "--threads", "1", "-n", "8", "--tools", "--plain", "-m", &able];
    let mut terminal = Terminal::start(&home, (100, 24), &flags);
    terminal.wait_for("> ");
    terminal.press(&format!("/model {tiny}\r"));
    let screen = terminal.wait_for("answers on");
    assert!(screen.contains("knows no tools"), "{screen}");
    terminal.press("/model\r");
    terminal.wait_for("/able, in this process");
    terminal.press("\x04");
    assert_eq!(terminal.ended().code(), Some(1), "a command failed");
}
#[test]
fn another_model_loads_while_typing_goes_on_and_one_that_cannot_changes_nothing() {
    let home = converted();
    let container = home.path("container");
    let switch = format!("/model {}\r", container.display());
    let mut terminal = Terminal::start(&home, (100, 30), &[&MODEL[..], &["-n", "8"]].concat());
    terminal.wait_for("/help says more");
    terminal.press("/model /nowhere\r");
    terminal
        .wait("an error", |screen| screen.contains("/nowhere") && screen.contains("answers on"));
    // The model before is closed for one that is found to have no template.
    let template = container.join("chat_template.jinja");
    std::fs::rename(&template, home.path("template")).expect("a template");
    terminal.press(&switch);
    terminal.wait_for("has no chat template");
    std::fs::rename(home.path("template"), &template).expect("a template");
    terminal.press("Hello\r");
    terminal.wait_for("cut off: the most tokens");

    // A tokenizer that arrives when this test wants it to.
    let tokenizer = container.join("tokenizer.json");
    std::fs::rename(&tokenizer, home.path("whole")).expect("a tokenizer");
    let made = std::process::Command::new("mkfifo").arg(&tokenizer).status().expect("mkfifo");
    assert!(made.success());
    terminal.press(&switch);
    terminal.wait_for("; typing goes on");
    terminal.press("typed meanwhile");
    terminal.wait_for("> typed meanwhile");
    terminal.press("\r");
    let screen = terminal.wait_for("is loading; send this again when it has");
    assert!(screen.contains("> typed meanwhile"), "{screen}");
    let mut pipe = std::fs::OpenOptions::new().write(true).open(&tokenizer).expect("a pipe");
    let whole = std::fs::read(home.path("whole")).expect("a tokenizer");
    std::fs::rename(home.path("whole"), &tokenizer).expect("a tokenizer");
    std::io::Write::write_all(&mut pipe, &whole).expect("a reader");
    drop(pipe);
    terminal.wait_for("source answers from here on");
    terminal.press("\r");
    terminal.wait("an answer", |screen| screen.matches("cut off: the most tokens").count() == 2);
    terminal.press("/quit\r");
    assert!(terminal.ended().success());
}
