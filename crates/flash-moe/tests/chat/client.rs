//! What a server says and does, and what the chat makes of it: calls, retries, models, errors.
//!
//! A scripted server answers messages that come through pipes, so that every request can be compared
//! letter by letter.

use serde_json::{Value, json};

use super::plain::{client, said};
use super::screen::answer;
use super::server::Scripted;
use crate::program::{Home, stderr};

const MODEL: [&str; 2] = ["-m", "scripted"];

/// An answer of one text.
fn text(content: &str) -> Vec<Value> {
    answer(json!({ "content": content }), "stop")
}

/// An answer that breaks off.
fn broken() -> Vec<Value> {
    vec![json!({ "choices": [{ "delta": { "content": "Half an ans" } }] })]
}

/// An answer that calls a tool that is not there, so many times.
fn lost(calls: usize) -> Vec<Value> {
    let call =
        |index| json!({ "index": index, "function": { "name": "nosuch", "arguments": "{}" } });
    let calls: Vec<Value> = (0..calls).map(call).collect();
    answer(json!({ "tool_calls": calls }), "tool_calls")
}

/// The messages of the last conversation: their roles and texts.
fn kept(home: &Home) -> Vec<(String, String)> {
    let path = home.path("export.json");
    std::fs::remove_file(&path).unwrap_or(());
    let line = format!("/export {}", path.display());
    said(&client(home, "http://127.0.0.1:1", &["-m", "x", "--resume"], &[&line]));
    let exported: Value =
        serde_json::from_slice(&std::fs::read(path).expect("an export")).expect("JSON");
    let messages = exported["messages"].as_array().expect("messages").iter();
    let field = |message: &Value, name: &str| message[name].as_str().unwrap_or("").to_string();
    messages.map(|message| (field(message, "role"), field(message, "content"))).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(role, text)| ((*role).into(), (*text).into())).collect()
}

#[test]
fn calls_of_tools_that_are_not_there_come_to_an_end() {
    let home = Home::new();
    let server = Scripted::start(vec![lost(2); 8]);
    let output = client(&home, &server.url(), &MODEL, &["Hello"]);
    assert_eq!(output.status.code(), Some(1));
    let told = stderr(&output);
    assert!(told.contains("keeps calling tools that are not there"), "{told}");
    assert_eq!(server.requests().len(), 8);
}

#[test]
fn an_answer_of_too_many_calls_is_given_up() {
    let home = Home::new();
    for (calls, is_too_many) in [(32, false), (33, true), (3000, true)] {
        let server = Scripted::start(vec![lost(calls), text("Sorry.")]);
        let output = client(&home, &server.url(), &MODEL, &["Hello"]);
        assert_eq!(stderr(&output).contains("more than 32 calls at once"), is_too_many, "{calls}");
        assert_eq!(output.status.success(), !is_too_many);
    }
}

#[test]
fn a_retry_behind_results_asks_for_the_answer_alone() {
    let home = Home::new();
    let server = Scripted::start(vec![lost(1), broken(), text("A whole one.")]);
    client(&home, &server.url(), &MODEL, &["Hello", "/retry"]);
    let requests = server.requests();
    assert_eq!(requests.len(), 3);
    assert_eq!(requests[2], requests[1], "the result is not thrown away");
    let roles: Vec<String> = kept(&home).into_iter().map(|(role, _)| role).collect();
    assert_eq!(roles, ["user", "assistant", "tool", "assistant"]);
}

#[test]
fn a_retry_that_fails_leaves_the_answer_before() {
    let home = Home::new();
    let server = Scripted::start(vec![text("The first."), broken(), text("The third.")]);
    let output = client(&home, &server.url(), &MODEL, &["Hello", "/retry"]);
    assert!(stderr(&output).contains("the answer before stays; /retry asks again"));
    assert_eq!(kept(&home), pairs(&[("user", "Hello"), ("assistant", "The first.")]));
    said(&client(&home, &server.url(), &["-m", "x", "--resume"], &["/retry"]));
    assert_eq!(kept(&home), pairs(&[("user", "Hello"), ("assistant", "The third.")]));
}

#[test]
fn conversations_are_begun_left_and_taken_up_by_commands() {
    let home = Home::new();
    let server = Scripted::start(vec![text("One."), text("Two."), text("Three.")]);
    let lines = ["First", "/new", "Second", "/resume", "Third"];
    let output = client(&home, &server.url(), &MODEL, &lines);
    said(&output);
    let contents = |request: &Value| -> Vec<String> {
        let messages = request["messages"].as_array().expect("messages").iter();
        messages.map(|message| message["content"].as_str().expect("text").into()).collect()
    };
    let requests: Vec<Vec<String>> = server.requests().iter().map(contents).collect();
    assert_eq!(requests, [vec!["First"], vec!["Second"], vec!["First", "One.", "Third"]]);
    let only = client(&Home::new(), &server.url(), &MODEL, &["/resume"]);
    assert!(stderr(&only).contains("no other sessions"), "{}", stderr(&only));
}

#[test]
fn what_an_earlier_run_left_to_be_decided_is_declined_without_a_screen() {
    let home = Home::new();
    let server = Scripted::start(vec![text("As you like.")]);
    let call = json!({ "id": "x", "name": "shell", "arguments": "{\"command\":\"ls\"}" });
    let lines = [
        json!({ "kind": "session", "version": 1, "id": "s", "model": "scripted" }),
        json!({ "kind": "message", "message": { "role": "user", "content": "Do it" } }),
        json!({ "kind": "message", "message":
            { "role": "assistant", "content": "", "calls": [call], "end": "stop" } }),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let dir = home.path(".local/share/flash-moe/sessions");
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(dir.join("s.jsonl"), text).expect("a session");
    let flags = ["-m", "scripted", "--resume"];
    said(&client(&home, &server.url(), &flags, &["Then do not"]));
    let messages = server.request()["messages"].clone();
    let roles: Vec<&str> =
        messages.as_array().expect("messages").iter().filter_map(|m| m["role"].as_str()).collect();
    assert_eq!(roles, ["user", "assistant", "tool", "user"]);
    assert!(messages[2]["content"].as_str().is_some_and(|text| text.contains("declined")));
}

#[test]
fn thinking_is_shown_on_demand_and_asked_for_in_the_request() {
    let home = Home::new();
    let thought = answer(json!({ "reasoning_content": "Hm, well.", "content": "Yes." }), "stop");
    let server = Scripted::start(vec![thought, text("No.")]);
    let lines = ["Is it?", "/think", "/think off", "And now?", "/set think_budget 5"];
    let output = client(&home, &server.url(), &MODEL, &lines);
    let shown = String::from_utf8(output.stdout.clone()).expect("text");
    assert!(shown.contains("Yes.\nHm, well.\nthe model is asked not to think"), "{shown}");
    let requests = server.requests();
    assert_eq!(requests[0].get("chat_template_kwargs"), None);
    assert_eq!(requests[1]["chat_template_kwargs"]["enable_thinking"], false);
    assert!(stderr(&output).contains("servers have no such setting"), "{}", stderr(&output));
}

#[test]
fn another_model_is_asked_for_by_its_name_if_the_server_has_it() {
    let models = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n\
                  {\"data\":[{\"id\":\"one\"},{\"id\":\"two\"},{\"id\":\"\\u001b[31m\"}]}";
    for (wanted, answered) in [("two", "two answers from here on"), ("six", "it has one, two")] {
        let server = Scripted::once(models);
        let output = client(&Home::new(), &server.url(), &MODEL, &[&format!("/model {wanted}")]);
        let all = String::from_utf8(output.stdout.clone()).expect("text") + &stderr(&output);
        assert!(all.contains(answered), "{all}");
    }
}

#[test]
fn the_words_of_a_server_are_shown_and_not_obeyed() {
    let refused = "HTTP/1.1 500 Oh\r\nconnection: close\r\n\r\n\x1b]52;c;AAAA\x07 no";
    let server = Scripted::once(refused);
    let said = Home::new().refuse(&["chat", "--connect", &server.url()]);
    assert!(said.contains("status 500: \u{241b}]52;c;AAAA\u{2407} no"), "{said:?}");
    assert!(!said.contains('\x1b'), "{said:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_full_for_a_while_loses_nothing() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    let home = Home::new();
    let server = Scripted::start(vec![text("One."), text("Two."), text("Three.")]);
    let (url, long) = (server.url(), "word ".repeat(1000) + "end");
    let program = home.command(&["chat", "--connect", &url, "-m", "scripted"]);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(program.get_program());
    command.args(program.get_args()).env("HOME", home.path("")).env_remove("XDG_DATA_HOME");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("a shell");
    let mut input = child.stdin.take().expect("a pipe");
    let mut answers = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut say = |text: &str| {
        input.write_all(format!("{text}\n").as_bytes()).expect("a pipe that is read");
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("an answer");
    };
    let limit = |bytes: &str| {
        let size = format!("--fsize={bytes}:");
        let id = child.id().to_string();
        let set = Command::new("prlimit").args(["--pid", &id, &size]).status();
        assert!(set.expect("prlimit, of util-linux").success());
    };
    say("Short");
    limit("1000");
    say(&long);
    limit("unlimited");
    say("Short again");
    drop(input);
    let output = child.wait_with_output().expect("the program ends");
    assert!(stderr(&output).contains("this conversation is not kept"), "{}", stderr(&output));
    let expected = [
        ("user", "Short"),
        ("assistant", "One."),
        ("user", &long),
        ("assistant", "Two."),
        ("user", "Short again"),
        ("assistant", "Three."),
    ];
    assert_eq!(kept(&home), pairs(&expected));
}
