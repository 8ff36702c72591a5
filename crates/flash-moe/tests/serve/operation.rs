//! Keys, limits, patience, load, and how the server ends.
//!
//! What takes time is waited for on the socket or by asking the server; nothing sleeps.

use std::io::{Read, Write};

use serde_json::{Value, json};

use super::client::{Server, read_answer, read_until};
use crate::program::Home;

const CHAT: &str = "/v1/chat/completions";

/// A request for more tokens than a test waits for.
fn long(stream: bool) -> String {
    json!({ "messages": [{ "role": "user", "content": "Tell me a story." }], "stream": stream,
            "max_tokens": 2000, "enable_thinking": false,
            "logit_bias": { "4085": -100, "4083": -100 } })
    .to_string()
}

fn short() -> Value {
    json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 2 })
}

#[test]
fn a_full_queue_refuses_and_a_client_that_leaves_makes_room() {
    let server = Server::start(&["--parallel", "1", "--queue", "1"]);
    let running = server.send("POST", CHAT, &[], &long(true));
    read_until(&running, "\"content\":\"");
    let waiting = server.send("POST", CHAT, &[], &long(false));
    server.wait_until(|health| health["waiting"] == 1);
    let refused = server.post(CHAT, &short());
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.header("retry-after").is_some());
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    // One that leaves before its turn makes room at once.
    drop(waiting);
    server.wait_until(|health| health["waiting"] == 0 && health["live"] == 1);
    drop(running);
    server.wait_until_idle();
    assert_eq!(server.post(CHAT, &short()).status, 200);
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("flash_moe_texts_total{ended=\"disconnected\"} 2"), "{metrics}");
    assert!(metrics.contains("route=\"/v1/chat/completions\",status=\"429\"} 1"), "{metrics}");
    assert!(metrics.contains("flash_moe_context_tokens_used 0\n"), "{metrics}");
}

#[test]
fn texts_at_once_go_through_the_layers_together_and_a_long_prompt_lets_others_pass() {
    let asked = |i: usize| {
        json!({ "messages": [{ "role": "user", "content": format!("Story {i}, please.") }],
                "max_tokens": 80, "temperature": 0, "enable_thinking": false,
                "logit_bias": { "4085": -100, "4083": -100 } })
    };
    let fetched = |parallel: &str| {
        let server = Server::start(&["--parallel", parallel, "--prefix-memory", "0"]);
        let streams = (0..8).map(|i| server.send("POST", CHAT, &[], &asked(i).to_string()));
        for stream in streams.collect::<Vec<_>>() {
            assert_eq!(read_answer(stream).status, 200);
        }
        let live = server.get("/live").json();
        let heat = live["heat"].as_array().expect("layers").iter();
        let uses = heat.flat_map(|layer| layer["uses"].as_array().expect("experts").clone());
        uses.map(|uses| uses.as_u64().expect("a count")).sum::<u64>()
    };
    // An expert that several texts want is fetched once for all of them.
    let (alone, together) = (fetched("1"), fetched("8"));
    assert!(10 * together < 9 * alone, "{together} together, {alone} one after the other");

    let server = Server::start(&["--parallel", "2", "--prefill-chunk", "16"]);
    let long = json!({ "messages": [{ "role": "user", "content": "word ".repeat(1500) }],
                       "max_tokens": 2, "stream": true });
    let reading = server.send("POST", CHAT, &[], &long.to_string());
    read_until(&reading, ": prompt ");
    server.ask(CHAT, &short());
    let metrics = server.get("/metrics").body;
    let computed = metrics.lines().find_map(|l| l.strip_prefix("flash_moe_prompt_tokens_total "));
    let computed: f64 = computed.expect("a counter").parse().expect("a number");
    assert!(computed < 1000.0, "{computed} tokens of the long prompt came first");
}

#[test]
fn a_key_is_asked_for_everywhere_but_where_nothing_is_told() {
    let home = Home::new();
    let file = home.write("key", "secret\nnot this\n");
    let server = Server::start(&["--api-key-file", &file]);
    let body = short().to_string();
    for (headers, status) in [
        (&[][..], 401),
        (&["authorization: Bearer wrong"], 401),
        (&["authorization: Bearer secre"], 401),
        (&["authorization: Bearer secret"], 200),
        (&["x-api-key: secret"], 200),
    ] {
        let answer = server.request("POST", CHAT, headers, &body);
        assert_eq!(answer.status, status, "{headers:?}");
        assert!(!answer.body.contains("secret"));
    }
    for (path, status) in [("/health", 200), ("/", 200), ("/metrics", 401), ("/live", 401)] {
        assert_eq!(server.get(path).status, status, "{path}");
    }
    let dialect = server.request("POST", "/v1/messages", &[], &body).json();
    assert_eq!(dialect["error"]["type"], "authentication_error");
    assert!(home.refuse(&["serve", "--port", "0", "--api-key", ""]).contains("key is empty"));
}

#[test]
fn pages_of_other_origins_are_kept_out() {
    let server = Server::start(&["--cors", "https://chat.example"]);
    let body = short().to_string();
    for (origin, status) in [
        ("https://evil.example", 403),
        ("null", 403),
        ("https://chat.example", 200),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:5173", 200),
        ("http://localhost.evil.example", 403),
    ] {
        let answer = server.request("POST", CHAT, &[&format!("origin: {origin}")], &body);
        assert_eq!(answer.status, status, "{origin}");
        let allowed = answer.header("access-control-allow-origin");
        assert_eq!(allowed, (status == 200).then_some(origin));
    }
    let asked = ["origin: https://chat.example", "access-control-request-headers: x-stainless-os"];
    let preflight = server.request("OPTIONS", CHAT, &asked, "");
    assert_eq!(preflight.status, 204);
    assert_eq!(preflight.header("access-control-allow-headers"), Some("x-stainless-os"));
}

#[test]
fn bad_requests_are_told_what_is_wrong() {
    let server = Server::start(&["--max-body", "10K", "--client-timeout", "1"]);
    let large = json!({ "messages": [{ "role": "user", "content": "x".repeat(20_000) }] });
    assert!(server.refuse(CHAT, &large, 413).contains("--max-body"));
    let malformed = server.request("POST", CHAT, &[], "{\"messages\": [");
    assert_eq!(malformed.status, 400);
    assert!(malformed.body.contains("not JSON"), "{}", malformed.body);
    assert!(server.request("POST", CHAT, &[], "[1]").body.contains("expected a JSON object"));
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get(CHAT).status, 405);
    assert_eq!(server.get("/v1/models/other").status, 404);
    let headers = format!("x-long: {}", "y".repeat(100_000));
    assert_eq!(server.request("GET", "/health", &[&headers], "").status, 431);

    let mut silent = server.connect();
    silent.write_all(b"GET /health HTT").unwrap();
    let mut said = String::new();
    silent.read_to_string(&mut said).unwrap();
    assert!(said.is_empty() || said.contains(" 408 "), "{said}");
    let mut halting = server.connect();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 90\r\n\r\n{{"
    );
    halting.write_all(head.as_bytes()).unwrap();
    assert_eq!(read_answer(halting).status, 408);
}

#[test]
fn a_request_that_takes_too_long_is_given_up() {
    let server = Server::start(&["--request-timeout", "1"]);
    let whole = server.request("POST", CHAT, &[], &long(false));
    assert_eq!(whole.status, 504, "{}", whole.body);
    let events = server.request("POST", CHAT, &[], &long(true)).events();
    let last = events.last().unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("--request-timeout"), "{last}");
    server.wait_until_idle();
}

#[test]
fn the_server_ends_when_what_runs_has_ended() {
    let server = Server::start(&[]);
    let body = json!({ "messages": [{ "role": "user", "content": "Tell me a story." }],
                       "stream": true, "max_tokens": 150, "enable_thinking": false });
    let running = server.send("POST", CHAT, &[], &body.to_string());
    read_until(&running, "\"content\":\"");
    server.terminate();
    let mut rest = String::new();
    (&running).read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    let (status, log) = server.ended();
    assert!(status.success(), "{log}");
    assert!(log.contains("request=req_") && log.contains("ttft_ms="), "{log}");
}

#[test]
fn what_runs_past_the_deadline_is_cancelled() {
    let server = Server::start(&["--shutdown-timeout", "0"]);
    let running = server.send("POST", CHAT, &[], &long(true));
    read_until(&running, "\"content\":\"");
    server.terminate();
    let (status, log) = server.ended();
    assert!(status.success() && log.contains("ended=shutdown"), "{log}");
}

#[test]
fn the_panel_and_the_page_are_served() {
    let server = Server::start(&[]);
    server.ask(CHAT, &short());
    let live = server.get("/live").json();
    assert!(live["generated_tokens"].as_u64() >= Some(1), "{live}");
    let heat = live["heat"].as_array().unwrap();
    assert_eq!((heat.len(), heat[0]["uses"].as_array().unwrap().len()), (12, 48));
    let page = server.get("/");
    assert!(page.body.contains("<title>") && page.header("content-security-policy").is_some());
    for outside in ["src=\"http", "href=\"http", "@import", "url(http"] {
        assert!(!page.body.contains(outside), "{outside}");
    }
}
