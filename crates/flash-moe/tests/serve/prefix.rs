//! What is not computed again: turns of a conversation, answers that come back, a server's next start.
//!
//! `usage` says how much of a prompt was cached, and the counters how much was computed; greedy texts
//! are compared with those of a server that keeps nothing.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::answers::lamp;
use super::client::{Server, read_answer, read_until};
use crate::program::{Home, text};

const CHAT: &str = "/v1/chat/completions";

fn system() -> Value {
    let rules = (0..12).map(|i| format!("Rule {i}: be kind, be brief, and answer truthfully. "));
    json!({ "role": "system", "content": rules.collect::<String>() })
}

fn user(content: &str) -> Value {
    json!({ "role": "user", "content": content })
}

fn ask(server: &Server, messages: &[Value], extra: &Value) -> Value {
    let mut body = json!({ "messages": messages, "max_tokens": 60, "temperature": 0,
                           "enable_thinking": false, "tools": [lamp()] });
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    server.ask(CHAT, &body)
}

/// Tokens of the prompt, and those of them that were cached.
fn usage(answer: &Value) -> (u64, u64) {
    let usage = &answer["usage"];
    let cached = &usage["prompt_tokens_details"]["cached_tokens"];
    (usage["prompt_tokens"].as_u64().expect("a count"), cached.as_u64().expect("a count"))
}

fn said(answer: &Value) -> Value {
    answer["choices"][0]["message"].clone()
}

fn metric(server: &Server, name: &str) -> u64 {
    let text = server.get("/metrics").body;
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).parse::<f64>().expect("a number") as u64
}

/// A call that a client sends back: its arguments in another form, its thinking left out.
fn sent_back(message: &Value) -> Value {
    let call = &message["tool_calls"][0];
    let arguments: Value =
        serde_json::from_str(call["function"]["arguments"].as_str().expect("text")).expect("JSON");
    let mut fields: Vec<(&String, &Value)> =
        arguments.as_object().expect("fields").iter().collect();
    fields.reverse();
    let fields: Vec<String> =
        fields.iter().map(|(name, value)| format!("\n  {} :  {value}", json!(name))).collect();
    json!({ "role": "assistant", "content": "", "tool_calls": [{
        "id": call["id"], "type": "function",
        "function": { "name": "set_lamp", "arguments": format!("{{{}\n}}", fields.join(" ,")) } }] })
}

fn result(message: &Value) -> Value {
    json!({ "role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "done" })
}

/// How a call is forced, and short.
fn must_call(thinking: bool) -> Value {
    let named = json!({ "type": "function", "function": { "name": "set_lamp" } });
    json!({ "enable_thinking": thinking, "tool_choice": named, "temperature": 1.5, "seed": 1,
            "max_tokens": 150 })
}

/// A call, its result, and the answer to that; gives what each request was answered.
fn agent(server: &Server, thinking: bool) -> [Value; 2] {
    let mut messages = vec![system(), user("Light in the hall, please.")];
    let call = ask(server, &messages, &must_call(thinking));
    messages.extend([sent_back(&said(&call)), result(&said(&call))]);
    let answer = ask(server, &messages, &json!({ "enable_thinking": thinking }));
    [call, answer]
}

#[test]
fn a_second_turn_computes_what_is_new_and_says_the_same() {
    let off = Server::start(&["--prefix-memory", "0"]);
    let on = Server::start(&[]);
    let mut messages = vec![system(), user("Tell me a story about a robot.")];
    let mut before = 0;
    for turn in 0..3 {
        let [plain, answer] = [&off, &on].map(|server| ask(server, &messages, &json!({})));
        assert_eq!(said(&answer)["content"], said(&plain)["content"], "turn {turn}");
        assert_eq!(usage(&plain).1, 0);
        let (prompt, cached) = usage(&answer);
        assert_eq!(prompt, usage(&plain).0);
        // All messages of the request before: where thinking may be hidden later, not its answer.
        assert!(cached + 12 >= before && (turn == 0 || cached > 0), "{cached} of {prompt}");
        before = prompt;
        messages.push(json!({ "role": "assistant", "content": said(&answer)["content"] }));
        messages.push(user("And then?"));
    }
    let computed = metric(&on, "flash_moe_prompt_tokens_total");
    let cached = metric(&on, "flash_moe_cached_tokens_total");
    assert_eq!(computed + cached, metric(&off, "flash_moe_prompt_tokens_total"));
}

#[test]
fn another_conversation_goes_on_from_the_system_prompt() {
    let server = Server::start(&[]);
    ask(&server, &[system(), user("Tell me a story.")], &json!({}));
    let (prompt, cached) = usage(&ask(&server, &[system(), user("Why is it dark?")], &json!({})));
    assert!(cached > 200 && prompt - cached < 25, "{cached} of {prompt}");
    let body = json!({ "system": system()["content"], "max_tokens": 4,
        "messages": [user("Who are you?")] });
    let first = server.ask("/v1/messages", &body)["usage"].clone();
    let again = server.ask("/v1/messages", &body)["usage"].clone();
    let count = |usage: &Value, name: &str| usage[name].as_u64().expect("a count");
    let all = |usage| count(usage, "input_tokens") + count(usage, "cache_read_input_tokens");
    assert_eq!(all(&first), all(&again));
    assert!(count(&again, "cache_read_input_tokens") > 100, "{again}");
}

#[test]
fn a_call_that_comes_back_in_another_form_is_not_computed_again() {
    let budget = ["--think-budget", "6"];
    let server = Server::start(&budget);
    for thinking in [false, true] {
        let [call, answer] = agent(&server, thinking);
        let generated = call["usage"]["completion_tokens"].as_u64().expect("a count");
        let (behind, (prompt, cached)) = (usage(&call).0 + generated, usage(&answer));
        assert_eq!(cached, behind - 1, "all but the last token of the call");
        assert!(prompt - cached < 40, "{cached} of {prompt}");
        assert_eq!(said(&call)["reasoning_content"].is_string(), thinking);
        // A call that was never made is tokenized as it stands.
        let mut other = sent_back(&said(&call));
        other["tool_calls"][0]["function"]["arguments"] =
            json!(format!("{{\"room\": \"{thinking}\"}}"));
        let messages = [system(), user("Light in the hall, please."), other, result(&said(&call))];
        assert!(
            usage(&ask(&server, &messages, &json!({ "enable_thinking": thinking }))).1
                < usage(&call).0
        );
    }
}

#[test]
fn several_texts_compute_their_prompt_once() {
    for parallel in ["1", "3"] {
        let server = Server::start(&["--parallel", parallel]);
        let wish = json!({ "n": 3, "temperature": 1.0, "seed": 4 });
        let answer = ask(&server, &[system(), user("Tell me a story.")], &wish);
        let (prompt, cached) = usage(&answer);
        assert_eq!((cached, metric(&server, "flash_moe_prompt_tokens_total")), (0, prompt));
        assert_eq!(metric(&server, "flash_moe_cached_tokens_total"), 2 * prompt);
    }
}

#[test]
fn one_that_waits_for_another_s_prompt_goes_on_when_that_one_leaves() {
    let server = Server::start(&["--parallel", "2", "--prefill-chunk", "16"]);
    let messages: Vec<Value> = [system()].into_iter().chain([user(&"word ".repeat(800))]).collect();
    let body = json!({ "messages": messages, "max_tokens": 4, "temperature": 0, "stream": true });
    let leaver = server.send("POST", CHAT, &[], &body.to_string());
    read_until(&leaver, ": prompt ");
    let other = server.send("POST", CHAT, &[], &body.to_string());
    drop(leaver);
    assert!(read_answer(other).body.ends_with("data: [DONE]\n\n"));
}

#[test]
fn memory_stays_within_its_bound() {
    let server = Server::start(&["--prefix-memory", "3MiB", "--prefix-every", "128"]);
    let mut peak = 0;
    for story in 0..8 {
        ask(&server, &[system(), user(&format!("Story {story}, please."))], &json!({}));
        let bytes = metric(&server, "flash_moe_prefix_bytes");
        assert!(bytes <= 3 << 20, "{bytes}");
        peak = peak.max(bytes);
    }
    assert!(metric(&server, "flash_moe_prefix_evictions_total") > 0 && peak > 0);
    let small = Server::start(&["--prefix-memory", "1KiB"]);
    for _ in 0..2 {
        let answer = ask(&small, &[system(), user("Story, please.")], &json!({}));
        assert_eq!(usage(&answer).1, 0);
    }
    assert_eq!(metric(&small, "flash_moe_prefix_bytes"), 0);
}

fn states(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).expect("the directory").map(|file| file.expect("a file"));
    files.map(|file| file.path()).filter(|p| p.extension().is_some_and(|e| e == "state")).collect()
}

/// The file of answers.
fn answers(dir: &Path) -> Option<PathBuf> {
    let mut files =
        std::fs::read_dir(dir).expect("the directory").map(|f| f.expect("a file").path());
    files.find(|path| path.extension().is_some_and(|e| e == "log"))
}

fn wait_until_written(server: &Server) {
    server.wait_until(|_| metric(server, "flash_moe_prefix_writing") == 0);
}

fn log_of(server: Server) -> String {
    server.terminate();
    let (status, log) = server.ended();
    assert!(status.success(), "{log}");
    log
}

#[test]
fn the_next_start_goes_on_from_the_directory() {
    let home = Home::new();
    let dir = home.path("states");
    let flags = ["--state-dir", &text(&dir), "--think-budget", "6"];
    let extra = json!({ "enable_thinking": true });
    let server = Server::start(&flags);
    let mut messages = vec![system(), user("Light in the hall, please.")];
    let forced = must_call(true);
    let call = ask(&server, &messages, &forced);
    let log = log_of(server);
    assert!(!log.contains("warning") && !states(&dir).is_empty(), "{log}");

    messages.extend([sent_back(&said(&call)), result(&said(&call))]);
    let expected = {
        let server = Server::start(&["--think-budget", "6"]);
        let again = ask(&server, &messages[..2], &forced);
        assert_eq!(
            sent_back(&said(&again))["tool_calls"][0]["function"],
            messages[2]["tool_calls"][0]["function"]
        );
        ask(&server, &messages, &extra)
    };
    let server = Server::start(&flags);
    let answer = ask(&server, &messages, &extra);
    let generated = call["usage"]["completion_tokens"].as_u64().expect("a count");
    let loads = metric(&server, "flash_moe_prefix_loads_total");
    let log = log_of(server);
    assert_eq!(usage(&answer).1, usage(&call).0 + generated - 1, "{log}");
    assert_eq!(said(&answer)["content"], said(&expected)["content"]);
    assert_eq!(loads, 1);

    let other = Server::start(&["--state-dir", &text(&dir), "--kv-cache", "int8"]);
    assert_eq!(usage(&ask(&other, &messages, &extra)).1, 0, "a state of other settings");
}

#[test]
fn a_server_that_is_killed_leaves_what_it_wrote_and_all_answers() {
    let home = Home::new();
    let dir = home.path("states");
    let flags = ["--state-dir", &text(&dir), "--prefix-memory", "0"];
    let server = Server::start(&flags);
    let mut messages = vec![system(), user("Light in the hall, please.")];
    let call = ask(&server, &messages, &must_call(false));
    wait_until_written(&server);
    drop(server);
    messages.extend([sent_back(&said(&call)), result(&said(&call))]);
    let server = Server::start(&flags);
    let generated = call["usage"]["completion_tokens"].as_u64().expect("a count");
    assert_eq!(usage(&ask(&server, &messages, &json!({}))).1, usage(&call).0 + generated - 1);
}

/// A disk that takes nothing: whoever writes a file that is a pipe waits for a reader.
#[cfg(unix)]
#[test]
fn no_token_waits_for_the_disk_and_the_end_does_not_wait_for_ever() {
    let home = Home::new();
    let dir = home.path("states");
    let flags = ["--state-dir", &text(&dir), "--prefix-memory", "0", "--shutdown-timeout", "1"];
    let messages = [system(), user("Tell me a story.")];
    let server = Server::start(&flags);
    let first = ask(&server, &messages, &json!({}));
    log_of(server);
    let files = states(&dir);
    assert!(files.len() > 1, "{files:?}");
    files.iter().for_each(|path| std::fs::remove_file(path).expect("a file"));

    let server = Server::start(&flags);
    for path in &files {
        let pipe = format!("{}.partial", text(path));
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo");
        assert!(made.success());
    }
    for cached in [false, true] {
        let answer = ask(&server, &messages, &json!({}));
        assert_eq!(said(&answer)["content"], said(&first)["content"]);
        assert_eq!(usage(&answer).1 > 0, cached, "from what waits to be written");
    }
    assert!(metric(&server, "flash_moe_prefix_writing") > 1);
    let log = log_of(server);
    assert!(log.contains("are not written") && log.contains("--shutdown-timeout"), "{log}");
    assert!(states(&dir).is_empty());
}

#[test]
fn damaged_files_are_removed_with_a_warning_and_answers_are_the_same() {
    let home = Home::new();
    let dir = home.path("states");
    let flags = ["--state-dir", &text(&dir)];
    let messages = [system(), user("Tell me a story.")];
    let server = Server::start(&flags);
    let first = ask(&server, &messages, &json!({}));
    ask(&server, &messages, &must_call(false));
    log_of(server);
    let damage: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes[20] ^= 1,
        |bytes| bytes.truncate(100),
        |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        },
        |bytes| bytes.clear(),
    ];
    for spoil in damage {
        for path in states(&dir).into_iter().chain(answers(&dir)) {
            let mut bytes = std::fs::read(&path).expect("a file");
            spoil(&mut bytes);
            std::fs::write(&path, bytes).expect("a file");
        }
        let server = Server::start(&flags);
        let answer = ask(&server, &messages, &json!({}));
        assert_eq!((usage(&answer).1, said(&answer)), (0, said(&first)));
        ask(&server, &messages, &must_call(false));
        let log = log_of(server);
        assert!(log.contains("warning") && log.contains("it is removed"), "{log}");
        assert!(!log.contains("panicked"), "{log}");
    }
    let server = Server::start(&flags);
    assert!(usage(&ask(&server, &messages, &json!({}))).1 > 0, "the last run wrote them anew");
}

#[test]
fn the_directory_stays_within_its_bound() {
    let home = Home::new();
    let dir = home.path("states");
    let flags = ["--state-dir", &text(&dir), "--prefix-memory", "0", "--state-dir-size", "4MiB"];
    let server = Server::start(&flags);
    for story in 0..6 {
        ask(&server, &[system(), user(&format!("Story {story}, please."))], &json!({}));
        wait_until_written(&server);
        let sum: u64 = states(&dir).iter().map(|p| p.metadata().expect("a file").len()).sum();
        assert!(sum > 0 && sum <= 4 << 20, "{sum}");
    }
    drop(server);
    let server = Server::start(&["--state-dir", &text(&dir), "--state-dir-size", "1KiB"]);
    assert!(states(&dir).is_empty());
    drop(server);
    let blocked = home.write("file", "not a directory");
    let said = home.refuse(&["serve", "--port", "0", "--state-dir", &blocked]);
    assert!(said.contains(&blocked), "{said}");
}

#[test]
fn a_directory_belongs_to_one_process() {
    let home = Home::new();
    let dir = text(&home.path("states"));
    let server = Server::start(&["--state-dir", &dir]);
    let said = home.refuse(&["serve", "--port", "0", "--memory", "600MiB", "--state-dir", &dir]);
    assert!(said.contains(&dir) && said.contains("another process"), "{said}");
    drop(server);
    Server::start(&["--state-dir", &dir]);
}

/// A state that cannot be read is not one that is damaged.
#[cfg(unix)]
#[test]
fn files_that_cannot_be_read_stay() {
    let home = Home::new();
    let dir = home.path("states");
    let flags = ["--state-dir", &text(&dir)];
    let messages = [system(), user("Tell me a story.")];
    let server = Server::start(&flags);
    ask(&server, &messages, &json!({}));
    log_of(server);
    let files: Vec<PathBuf> = states(&dir).into_iter().chain(answers(&dir)).collect();
    assert!(files.len() > 2, "{files:?}");
    let aside = |path: &Path| PathBuf::from(format!("{}.aside", text(path)));
    for path in &files {
        std::fs::rename(path, aside(path)).expect("a file");
        std::fs::create_dir(path).expect("a directory in its place");
    }
    let server = Server::start(&flags);
    assert_eq!(usage(&ask(&server, &messages, &json!({}))).1, 0);
    let log = log_of(server);
    assert!(log.contains("is not used") && !log.contains("is removed"), "{log}");
    for path in &files {
        std::fs::remove_dir(path).expect("the directory is still there");
        std::fs::rename(aside(path), path).expect("a file");
    }
    assert!(usage(&ask(&Server::start(&flags), &messages, &json!({}))).1 > 0);

    // Nor is one of another version of the layout.
    for path in states(&dir) {
        let mut bytes = std::fs::read(&path).expect("a file");
        bytes[8] = 99;
        std::fs::write(&path, bytes).expect("a file");
    }
    let before = states(&dir).len();
    let server = Server::start(&flags);
    assert_eq!(states(&dir).len(), before);
    let log = log_of(server);
    assert!(log.contains("version 99"), "{log}");
}

/// A text that runs to the end of the time leaves none for what is written after it.
#[test]
fn what_is_kept_is_written_although_a_text_runs_on() {
    let home = Home::new();
    let dir = home.path("states");
    let server =
        Server::start(&["--state-dir", &text(&dir), "--shutdown-timeout", "3", "--parallel", "8"]);
    for question in ["Tell me a story.", "Why is it dark?"] {
        ask(&server, &[system(), user(question)], &json!({}));
    }
    let long = json!({ "messages": [user("Go on.")], "stream": true, "max_tokens": 2000,
        "enable_thinking": false, "logit_bias": { "4085": -100, "4083": -100 } });
    // One by itself may be done by then.
    let running: Vec<_> =
        (0..8).map(|_| server.send("POST", CHAT, &[], &long.to_string())).collect();
    for text in &running {
        read_until(text, "\"content\":\"");
    }
    let log = log_of(server);
    assert!(log.contains("ended=shutdown"), "a text was still running: {log}");
    assert!(!log.contains("not written"), "{log}");
    assert!(states(&dir).len() > 2, "{:?}", states(&dir));
}

/// A state on a disk that does not answer: whoever reads a pipe waits for somebody to write.
#[cfg(unix)]
#[test]
fn no_other_text_waits_for_a_state_that_is_read_and_neither_does_the_end() {
    let home = Home::new();
    let dir = home.path("states");
    let flags = ["--state-dir", &text(&dir), "--shutdown-timeout", "1"];
    let messages = [system(), user("Tell me a story.")];
    let server = Server::start(&flags);
    ask(&server, &messages, &json!({}));
    log_of(server);
    let server = Server::start(&flags);
    for path in states(&dir) {
        std::fs::remove_file(&path).expect("a file");
        let made = std::process::Command::new("mkfifo").arg(&path).status().expect("mkfifo");
        assert!(made.success());
    }
    let body = json!({ "messages": messages, "max_tokens": 4, "temperature": 0,
        "enable_thinking": false, "tools": [lamp()] });
    let waiting = server.send("POST", CHAT, &[], &body.to_string());
    server.wait_until(|health| health["live"] == 1);
    let other = json!({ "messages": [user("Hello")], "max_tokens": 4 });
    server.ask(CHAT, &other);
    assert_eq!(server.get("/health").json()["live"], 1, "the first waits still");
    log_of(server);
    drop(waiting);
}
