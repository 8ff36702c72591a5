//! The chat in a terminal: typed at, stopped, resized, asked about commands, left.
//!
//! The built-in model answers where any text will do, a scripted server where it must be a certain one.

use serde_json::{Value, json};

use super::server::Scripted;
use super::terminal::Terminal;
use crate::fixture::converted;
use crate::program::Home;

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

fn call(command: &str) -> Value {
    let arguments = json!({ "command": command }).to_string();
    json!({ "tool_calls": [{ "index": 0, "id": "x", "function": { "name": "shell", "arguments": arguments } }] })
}

#[test]
fn a_message_is_typed_answered_stopped_and_the_terminal_given_back() {
    let home = Home::new();
    let mut terminal = Terminal::start(&home, (80, 24), &MODEL);
    terminal.wait_for("/help says more");
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
    let screen = terminal.screen();
    assert!(screen.contains("chat --resume goes on with it"), "{screen}");

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
        screen.lines().any(|row| row.trim_end() == "> a line that is longer than forty colum")
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
