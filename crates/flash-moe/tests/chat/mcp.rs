//! MCP servers beside the chat: their tools are offered, asked about and called, and they never stop it.
//!
//! A scripted model says what is called, the servers are processes of this test program. What must not
//! outlive the chat is looked for by its process id.

use serde_json::{Value, json};

use super::mcp_server::entry;
use super::screen::answer;
use super::server::Scripted;
use super::terminal::Terminal;
use crate::fixture::parrot;
use crate::program::Home;

const COLUMNS: u16 = 100;

/// A file of servers by name and kind, and the file of their process ids.
fn servers(home: &Home, named: &[(&str, &str)]) -> (String, String) {
    let pids = home.write("pids", "");
    let servers: Value = named
        .iter()
        .map(|(name, kind)| {
            let mut entry = entry(kind, &pids);
            entry["alwaysAllow"] = json!(["picture"]);
            ((*name).to_string(), entry)
        })
        .collect::<serde_json::Map<_, _>>()
        .into();
    let file = home.write("servers.json", json!({ "mcpServers": servers }).to_string());
    (file, pids)
}

fn call(name: &str, arguments: &Value) -> Vec<Value> {
    let function = json!({ "name": name, "arguments": arguments.to_string() });
    let calls = json!([{ "index": 0, "id": "x", "function": function }]);
    answer(json!({ "tool_calls": calls }), "tool_calls")
}

fn said(text: &str) -> Vec<Value> {
    answer(json!({ "content": text }), "stop")
}

/// A chat with a scripted model and these servers.
fn chat(home: &Home, model: &Scripted, file: &str, flags: &[&str]) -> Terminal {
    let url = model.url();
    let all = [&["--connect", &url, "-m", "scripted", "--mcp", file], flags].concat();
    Terminal::start(home, (COLUMNS, 40), &all)
}

/// The content of the last message of a request.
fn last(request: &Value) -> String {
    let messages = request["messages"].as_array().expect("messages");
    messages.last().expect("a message")["content"].as_str().expect("text").into()
}

/// Fails unless all processes of the file end.
#[track_caller]
fn all_are_gone(pids: &str) {
    let pids = std::fs::read_to_string(pids).expect("ids");
    assert!(!pids.is_empty());
    let started = std::time::Instant::now();
    for pid in pids.lines() {
        let lives = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        while lives() && started.elapsed().as_secs() < 30 {
            std::thread::yield_now();
        }
        assert!(!lives(), "{pid} lives on");
    }
}

#[test]
fn tools_of_a_server_are_offered_asked_about_and_called() {
    let home = Home::new();
    let (file, _) = servers(&home, &[("my calc", "plain")]);
    let model = Scripted::start(vec![
        call("my_calc__add", &json!({ "a": 2, "b": 40 })),
        call("my_calc__add", &json!({ "a": 3 })),
        call("my_calc__fail", &json!({})),
        call("my_calc__refuse", &json!({})),
        call("my_calc__picture", &json!({})),
        call("my_calc__other", &json!({})),
        said("All done."),
    ]);
    let mut terminal = chat(&home, &model, &file, &["--tool-output", "1KiB", "--tools"]);
    terminal.wait_for("MCP server my calc: 8 tools; 1 more are not offered");
    terminal.press("Add\r");
    let screen = terminal.wait_for("run it? [y/n/a/e]");
    assert!(screen.contains("The model wants to call add, of MCP server my calc:"), "{screen}");
    assert!(screen.contains("\"a\": 2,\n      \"b\": 40"), "{screen}");
    let offered = model.request()["tools"].clone();
    let names: Vec<&str> = offered
        .as_array()
        .expect("tools")
        .iter()
        .map(|tool| tool["function"]["name"].as_str().expect("a name"))
        .collect();
    assert_eq!(names[..4], ["shell", "my_calc__add", "my_calc__add_1", "my_calc__fail"]);
    assert_eq!(offered[1]["function"]["parameters"]["properties"]["a"]["type"], "integer");
    // The arguments are changed, and what they become is called.
    terminal.press("e\r");
    terminal.wait_for("run instead: ");
    terminal.press("\x15\x10\x15");
    terminal.press(" {\"a\": 2, \"b\": 5");
    terminal.press("\r");
    terminal.wait_for("the arguments are not JSON");
    terminal.press("}\r");
    terminal.wait_for("\"a\": 3");
    assert_eq!(last(&model.request()), "7");
    terminal.press("a\r");
    terminal.wait_for("my_calc__add, with any arguments, is allowed until this chat ends");
    terminal.wait_for("to call fail, of MCP server");
    assert_eq!(last(&model.request()), "3");
    terminal.press("y\r");
    terminal.wait_for("to call refuse, of MCP server");
    let failed = "no [31mluck< |im_end|>\n[the tool says that this is an error]";
    assert_eq!(last(&model.request()), failed);
    terminal.press("n\r");
    // The picture is allowed by the file, the next is none of the tools.
    terminal.wait_for("All done.");
    assert!(last(&model.request()).contains("declined"));
    let picture = last(&model.request());
    assert!(picture.starts_with("[an image, image/png, 5 bytes"), "{picture}");
    assert!(picture.contains("bytes are left out") && picture.len() < 1200, "{picture}");
    assert!(
        last(&model.request())
            .contains("no tool \"my_calc__other\"; there are shell, my_calc__add")
    );
    terminal.press("/tools my calc\r");
    let screen = terminal.wait_for("not offered: another tool is my_calc__add_1 already");
    assert!(
        screen.contains("my_calc__picture") && screen.contains("needs no decision"),
        "{screen}"
    );
}

#[test]
fn a_server_that_dies_or_hangs_in_a_call_is_told_and_the_chat_goes_on() {
    let home = Home::new();
    let (file, pids) = servers(&home, &[("calc", "plain")]);
    let model = Scripted::start(vec![
        call("calc__hang", &json!({})),
        call("calc__hang", &json!({})),
        call("calc__grow", &json!({})),
        call("calc__die", &json!({})),
        call("calc__add", &json!({})),
        said("It is gone."),
    ]);
    let mut terminal = chat(&home, &model, &file, &["--tool-timeout", "5"]);
    terminal.wait_for("MCP server calc: 8 tools");
    terminal.press("Go\r");
    terminal.wait_for("to call hang");
    assert_eq!(model.request()["tools"].as_array().map(Vec::len), Some(8), "no shell");
    terminal.press("y\r");
    terminal.wait_for("Ctrl-C kills it");
    terminal.press("\x03");
    terminal.wait_for("[stopped by the user]");
    assert_eq!(last(&model.request()), "[stopped by the user]");
    terminal.wait("another call", |screen| screen.matches("to call hang").count() == 2);
    terminal.press("y\r");
    terminal.wait_for("to call grow");
    assert_eq!(last(&model.request()), "[no answer within 5 s; the call was cancelled]");
    terminal.press("y\r");
    terminal.wait_for("to call die");
    assert_eq!(last(&model.request()), "[no output]");
    terminal.press("y\r");
    terminal.wait_for("It is gone.");
    let died = "[the MCP server calc ended with exit status 3: out of luck]";
    assert_eq!(last(&model.request()), died);
    let request = model.request();
    assert_eq!(last(&request), "[the MCP server calc: ended with exit status 3: out of luck]");
    assert!(request["tools"].is_null(), "{request}");
    let screen = terminal.wait_for("MCP server calc: ended with exit status 3: out of luck");
    assert!(!screen.contains("\nout of luck"), "{screen}");
    terminal.press("/quit\r");
    assert!(terminal.ended().success());
    all_are_gone(&pids);
}

#[test]
fn servers_that_fail_are_lines_and_stop_nothing() {
    let home = Home::new();
    let named = [
        ("quiet", "silent"),
        ("noise", "garbage"),
        ("gone", "dead"),
        ("crowd", "many"),
        ("absent", "plain"),
    ];
    let (file, pids) = servers(&home, &named);
    let text = std::fs::read_to_string(&file).expect("the file");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config["mcpServers"]["absent"]["command"] = json!("/nowhere/mcp");
    config["mcpServers"]["far"] = json!({ "url": "https://example.org/mcp" });
    config["mcpServers"]["crowd"]["includeTools"] = json!(["tool7", "tool9999", "tool10000"]);
    std::fs::write(&file, config.to_string()).expect("the file");
    let model = Scripted::start(vec![said("I am here."), said("Still here.")]);
    let mut terminal = chat(&home, &model, &file, &["--tool-timeout", "8"]);
    terminal.wait_for("/help says more");
    // Nothing of this waits for the servers.
    terminal.press("Hello\r");
    terminal.wait_for("I am here.");
    for note in [
        "far: is reached by URL",
        "absent: cannot start \"/nowhere/mcp\": No such file",
        "gone: ended with exit status 5: please create it",
        "crowd: 2 tools; 9998 more are not offered, /tools crowd says why; it has no tool10000,",
        "quiet: no answer to initialize within 8 s; it is killed",
        "noise: ",
    ] {
        terminal.wait_for(&format!("MCP server {note}"));
    }
    terminal.press("Hello?\r");
    terminal.wait_for("Still here.");
    model.request();
    let tools = model.request()["tools"].clone();
    assert_eq!(tools[1]["function"]["name"], "crowd__tool9999", "{tools}");
    terminal.press("/tools gone\r");
    let screen = terminal.wait_for("no such database: \u{241b}[31mx");
    assert!(!screen.contains('\u{1b}'), "{screen}");
    terminal.press("/tools\r");
    terminal.wait_for("MCP server, ready, 2 tools");
    terminal.press("/tools nobody\r");
    terminal.wait_for("no MCP server \"nobody\"; there are quiet, noise, gone, crowd, absent");
    terminal.press("\x15/quit\r");
    assert!(terminal.ended().success());
    all_are_gone(&pids);
}

#[test]
fn no_server_and_no_command_outlives_the_chat() {
    use rustix::process::Signal;
    for (flags, leave) in [
        (&[][..], None),
        (&[][..], Some(Signal::TERM)),
        (&[][..], Some(Signal::HUP)),
        (&["--plain"][..], Some(Signal::TERM)),
        (&["--plain"][..], Some(Signal::INT)),
    ] {
        let home = Home::new();
        let (file, pids) = servers(&home, &[("wall", "stubborn")]);
        let command = format!("echo $$ >> {pids}; sleep 1000 & echo $! >> {pids}; wait");
        let model = Scripted::start(vec![call("shell", &json!({ "command": command }))]);
        let mut terminal = chat(&home, &model, &file, &[&["--tools"], flags].concat());
        let count = |pids: &str| std::fs::read_to_string(pids).expect("ids").lines().count();
        terminal.wait("a server", |_| count(&pids) == 2);
        terminal.press("Go\r");
        terminal.wait_for("run it? ");
        terminal.press("y\r");
        terminal.wait("a command", |_| count(&pids) == 4);
        match leave {
            Some(signal) => terminal.signal(signal),
            None => terminal.press("\x03\x03\x04"),
        }
        if flags.is_empty() || leave != Some(Signal::INT) {
            terminal.ended();
        } else {
            // The first Ctrl-C stops the command, the second leaves.
            terminal.wait_for("stopped by the user");
            terminal.signal(Signal::INT);
            terminal.ended();
        }
        all_are_gone(&pids);
    }
}

#[test]
fn a_file_that_is_wrong_is_refused_before_anything_starts() {
    let home = Home::new();
    for (text, why) in [
        ("{", "not JSON"),
        ("{\"mcpServers\": {\"a\": {}}}", "the server \"a\" needs a \"command\""),
    ] {
        let file = home.write("wrong.json", text);
        let mut terminal = Terminal::start(&home, (COLUMNS, 20), &["--mcp", &file]);
        assert_eq!(terminal.ended().code(), Some(1));
        terminal.wait(why, |screen| screen.replace('\n', "").contains(why));
    }
    let missing = home.path("missing.json");
    let flags = ["--mcp", missing.to_str().expect("UTF-8")];
    let mut terminal = Terminal::start(&home, (COLUMNS, 20), &flags);
    assert_eq!(terminal.ended().code(), Some(1));
    terminal.wait_for("No such file");
}

#[test]
fn the_file_in_the_directory_of_configurations_is_read_with_tools_alone() {
    let home = Home::new();
    let (file, _) = servers(&home, &[("calc", "plain")]);
    std::fs::create_dir_all(home.path(".config/flash-moe")).expect("a directory");
    std::fs::rename(file, home.path(".config/flash-moe/mcp.json")).expect("a file");
    let model = Scripted::start(vec![]);
    let url = model.url();
    let flags = ["--connect", &url, "-m", "scripted"];
    let mut without = Terminal::start(&home, (COLUMNS, 20), &flags);
    without.wait_for("/help says more");
    without.press("/tools\r");
    without.wait_for("--tools and --mcp FILE offer some");
    let with = Terminal::start(&home, (COLUMNS, 20), &[&flags[..], &["--tools"]].concat());
    with.wait_for("MCP server calc: 8 tools");
}

/// A call as the model's own format writes it.
fn tagged(name: &str, argument: &str, value: &str) -> String {
    format!(
        "<tool_call>\n<function={name}>\n<parameter={argument}>\n{value}\n</parameter>\n</function>\n</tool_call>"
    )
}

#[test]
fn a_model_in_this_process_calls_a_command_and_a_server() {
    let command = tagged("shell", "command", "echo one two; exit 4");
    let sum = tagged("calc__add", "a", "41");
    let home = parrot([&command, &sum, "That is all."]);
    let (file, pids) = servers(&home, &[("calc", "plain")]);
    let container = crate::program::text(&home.path("container"));
    let flags = ["-m", &container, "--no-think", "--tools", "--mcp", &file, "--memory", "600MiB"];
    let mut terminal = Terminal::start(&home, (COLUMNS, 40), &flags);
    terminal.wait_for("/help says more");
    terminal.wait_for("MCP server calc: 8 tools");
    terminal.press("Go\r");
    let screen = terminal.wait_for("run it? [y/n/a/e]");
    assert!(screen.contains("  $ echo one two; exit 4"), "{screen}");
    terminal.press("y\r");
    terminal.wait_for("[exit status 4]");
    let screen = terminal.wait_for("to call add, of MCP server calc:");
    assert!(screen.contains("\"a\": 41"), "{screen}");
    terminal.press("y\r");
    terminal.wait("the end", |screen| {
        screen.contains("That is all.") && !screen.contains("Ctrl-C stops")
    });
    let export = home.path("export.json");
    terminal.press(&format!("/export {}\r", export.display()));
    terminal.wait_for("bytes)");
    let exported: Value =
        serde_json::from_slice(&std::fs::read(export).expect("an export")).expect("JSON");
    let said = |at: usize| exported["messages"][at]["content"].clone();
    assert_eq!([said(2), said(4), said(5)], ["one two\n[exit status 4]", "41", "That is all."]);
    terminal.press("/quit\r");
    assert!(terminal.ended().success());
    all_are_gone(&pids);
}
