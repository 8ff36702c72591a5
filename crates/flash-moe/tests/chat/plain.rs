//! Messages through pipes: answers, exit statuses, sessions, and what a resumed one computes.
//!
//! Greedy answers of the built-in model are the same in every process, so a conversation that was left
//! and taken up is compared with one that was not.

use std::io::{BufRead, BufReader, Write};
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::program::{Home, stderr};
use crate::serve::client::Server;

const FLAGS: [&str; 7] = ["--memory", "600MiB", "--threads", "1", "--greedy", "-n", "24"];

/// The program with these flags and these lines of input.
fn chat(home: &Home, flags: &[&str], lines: &[&str]) -> Output {
    let all: Vec<&str> = FLAGS.iter().chain(flags).copied().collect();
    chat_with(home, &all, lines)
}

/// As [`chat`], with no other flags.
fn chat_with(home: &Home, flags: &[&str], lines: &[&str]) -> Output {
    let all: Vec<&str> = ["chat"].iter().chain(flags).copied().collect();
    let mut command = home.command(&all);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all((lines.join("\n") + "\n").as_bytes()).expect("a pipe that is read");
    drop(input);
    child.wait_with_output().expect("the program ends")
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// Tokens of the last prompt and those of them that were known, as `/stats` tells.
fn prompt_and_known(stats: &str) -> (usize, usize) {
    let line = stats.lines().find_map(|line| line.strip_prefix("prompt "));
    let words: Vec<&str> = line.expect("a line of the prompt").split_whitespace().collect();
    let number = |word: &str| word.replace(',', "").parse().expect("a number");
    (number(words[0]), number(words[2]))
}

fn exported(home: &Home, flags: &[&str]) -> Value {
    let path = home.path("export.json");
    std::fs::remove_file(&path).unwrap_or(());
    let line = format!("/export {}", path.display());
    said(&chat(home, flags, &[&line]));
    serde_json::from_slice(&std::fs::read(path).expect("an export")).expect("JSON")
}

#[test]
fn a_conversation_that_was_left_goes_on_as_if_it_had_not_been() {
    let lines = ["Tell me a story about a cat.", "And what did the cat do then?", "Why?"];
    let whole = Home::new();
    let expected = said(&chat(&whole, &[], &lines));
    let home = Home::new();
    let mut got = said(&chat(&home, &[], &lines[..2]));
    let rest = said(&chat(&home, &["--resume"], &[lines[2], "/stats"]));
    let (answer, stats) = rest.split_once("model ").expect("the figures");
    got += answer;
    assert_eq!(got, expected);
    // All but the new question and the opening of its answer was in the state on disk.
    let (prompt, known) = prompt_and_known(stats);
    assert!(known > 60 && prompt - known < 30, "{known} of {prompt} were known");

    let without = chat(&home, &["--resume", "--no-state"], &["Oh?", "/stats"]);
    let (_, known) = prompt_and_known(&said(&without));
    assert_eq!(known, 0, "without states all is read again");
}

#[test]
fn a_chat_killed_in_mid_answer_keeps_everything_before() {
    let home = Home::new();
    // Slow kernels, so that the answer is still coming when the program is killed.
    let slow = ["chat", "--isa", "scalar"];
    let all: Vec<&str> = slow.iter().chain(&FLAGS).copied().collect();
    let mut command = home.command(&all);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("the program starts");
    let mut input = child.stdin.take().expect("a pipe");
    let mut answers = BufReader::new(child.stdout.take().expect("a pipe"));
    input.write_all(b"Tell me a story.\n/set max_tokens 1500\n").expect("a pipe that is read");
    let mut seen = String::new();
    while !seen.contains("max_tokens is 1500") {
        assert!(answers.read_line(&mut seen).expect("text") > 0, "{seen}");
    }
    input.write_all(b"Tell me another one, and a long one.\n").expect("a pipe that is read");
    answers.fill_buf().expect("the beginning of the answer");
    child.kill().expect("a running program");
    child.wait().expect("a killed program");

    let messages = exported(&home, &["--resume"])["messages"].clone();
    let roles: Vec<&str> = messages
        .as_array()
        .expect("messages")
        .iter()
        .map(|m| m["role"].as_str().expect("a role"))
        .collect();
    assert_eq!(roles, ["user", "assistant", "user"]);
    assert!(
        seen.contains(
            messages[1]["content"].as_str().expect("text").lines().next().expect("a line")
        )
    );
    assert_eq!(messages[2]["content"], "Tell me another one, and a long one.");
    // The question that was not answered can be asked again.
    said(&chat(&home, &["--resume"], &["/retry"]));
    assert_eq!(exported(&home, &["--resume"])["messages"].as_array().map(Vec::len), Some(4));
}

#[test]
fn commands_work_on_plain_streams() {
    let home = Home::new();
    let file = home.write("notes.txt", "The cat is called Marble.\n");
    let read = format!("/read {file}");
    let lines = [
        "/system Be kind.",
        &read,
        "Who\\",
        "is it?",
        "/undo",
        "/stats",
        "/save a cat",
        "/set seed 7",
    ];
    let output = said(&chat(&home, &[], &lines));
    for wanted in [
        "the system prompt is set",
        "goes with the next message",
        "taken back: ",
        "messages   0",
        "seed is 7",
    ] {
        assert!(output.contains(wanted), "{wanted}: {output}");
    }
    let asked = "notes.txt:\n```\nThe cat is called Marble.\n```\n\nWho\nis it?";
    let again = said(&chat(&home, &["--resume", "a cat"], &["Hello", "/system"]));
    assert!(again.contains("Be kind."), "{again}");
    assert!(output.contains(asked), "{output}");
    let listed = String::from_utf8(home.succeed(&["chat", "--sessions"]).stdout).expect("text");
    assert!(listed.contains("2 messages  a cat"), "{listed}");
}

#[test]
fn what_fails_is_told_and_the_status_says_so() {
    let home = Home::new();
    let long = "word ".repeat(3000);
    let output = chat(&home, &[], &[&long, "/nonsense", "Hello"]);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(
        told.contains("the context holds 2048") && told.contains("/nonsense is no command"),
        "{told}"
    );
    assert!(!output.stdout.is_empty(), "the message after them is answered");
    for (flags, why) in [
        (&["chat", "--resume"][..], "no sessions"),
        (&["chat", "--tools"], "must be a terminal"),
        (&["chat", "--connect", "ftp://x"], "not spoken here"),
        (&["chat", "--connect", "http://127.0.0.1:1"], "cannot connect to 127.0.0.1:1"),
        (
            &["chat", "--connect", "http://127.0.0.1:1", "--context", "5"],
            "--context is about a model",
        ),
    ] {
        let said = Home::new().refuse(flags);
        assert!(said.contains(why), "{flags:?}: {said}");
    }
}

#[test]
fn a_server_answers_as_the_model_in_this_process_does() {
    let server = Server::start(&[]);
    let home = Home::new();
    let template = ["--chat-template", crate::serve::client::TEMPLATE, "--no-think"];
    let lines = ["Tell me a story about a cat.", "And then?"];
    let own = said(&chat(&home, &template, &lines));
    let address = format!("http://{}", server.address());
    let flags = ["--greedy", "-n", "24", "--no-think", "--connect", &address];
    let theirs = said(&chat_with(&home, &flags, &lines));
    assert_eq!(theirs, own);
}
