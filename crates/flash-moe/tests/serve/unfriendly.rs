//! Requests that nobody sends on purpose, and texts that break where tokens do not.
//!
//! Whatever comes, there is an answer in the interface's shape, the server goes on, and nothing panics.

use std::io::{Read, Write};

use serde_json::{Value, json};

use super::answers::lamp;
use super::client::{Answer, Server, read_answer};

const CHAT: &str = "/v1/chat/completions";

fn end_in_peace(server: Server) {
    assert_eq!(server.get("/health").status, 200);
    server.terminate();
    let (status, log) = server.ended();
    assert!(status.success() && !log.contains("panicked"), "{log}");
}

/// Answered, or refused with a reason.
fn is_settled(answer: &Answer) -> bool {
    let body = answer.json();
    let told = body["error"]["message"].as_str().is_some_and(|why| !why.is_empty());
    answer.status == 200 || ((400..500).contains(&answer.status) && told)
}

fn bodies() -> Vec<(&'static str, Value)> {
    let text = json!([{ "type": "text", "text": "a" }]);
    let call = json!({ "id": "1", "type": "function",
                       "function": { "name": "set_lamp", "arguments": "{\"on\":true}" } });
    let schema = json!({ "type": "object", "properties": { "a": { "type": "boolean" } } });
    let parameters = lamp()["function"]["parameters"].clone();
    vec![
        (
            CHAT,
            json!({
            "messages": [
                { "role": "system", "content": "s" }, { "role": "user", "content": text },
                { "role": "assistant", "content": "", "tool_calls": [call] },
                { "role": "tool", "tool_call_id": "1", "content": "done" } ],
            "max_tokens": 1, "tools": [lamp()], "tool_choice": "auto", "temperature": 1, "top_p": 0.9,
            "top_k": 4, "min_p": 0.1, "seed": 1, "stop": ["x"], "n": 1, "logprobs": true,
            "top_logprobs": 1, "logit_bias": { "5": 1 }, "presence_penalty": 0.1,
            "frequency_penalty": 0.1, "repetition_penalty": 1.1, "enable_thinking": false }),
        ),
        (
            CHAT,
            json!({
            "messages": [{ "role": "user", "content": "a" }], "max_tokens": 1,
            "response_format": { "type": "json_schema", "json_schema": { "name": "n", "schema": schema } },
            "reasoning_effort": "low", "chat_template_kwargs": { "enable_thinking": true } }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": ["a", "b"], "max_tokens": 1, "echo": false, "n": 1 }),
        ),
        (
            "/v1/responses",
            json!({
            "input": [{ "role": "user", "content": [{ "type": "input_text", "text": "a" }] },
                { "type": "function_call", "call_id": "1", "name": "f", "arguments": "{}" },
                { "type": "function_call_output", "call_id": "1", "output": "b" }],
            "instructions": "s", "max_output_tokens": 1, "store": false,
            "tools": [{ "type": "function", "name": "f", "parameters": parameters },
                      { "type": "namespace", "name": "s", "tools": [{ "type": "function", "name": "g" }] }],
            "text": { "format": { "type": "json_schema", "name": "n", "schema": schema } },
            "reasoning": { "effort": "low" } }),
        ),
        (
            "/v1/messages",
            json!({
            "system": text, "max_tokens": 1, "stop_sequences": ["x"],
            "messages": [{ "role": "user", "content": text },
                { "role": "assistant", "content": [
                    { "type": "tool_use", "id": "1", "name": "set_lamp", "input": {} }] },
                { "role": "user", "content": [
                    { "type": "tool_result", "tool_use_id": "1", "content": text }] }],
            "tools": [{ "name": "set_lamp", "input_schema": parameters }],
            "tool_choice": { "type": "auto" }, "thinking": { "type": "enabled", "budget_tokens": 1 },
            "output_config": { "effort": "low" } }),
        ),
        ("/v1/messages/count_tokens", json!({ "messages": [{ "role": "user", "content": "a" }] })),
        ("/tokenize", json!({ "content": "a" })),
        ("/detokenize", json!({ "tokens": [1, 2] })),
    ]
}

/// Paths of all values in a body.
fn places(value: &Value, path: &str, all: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = format!("{path}/{name}");
                all.push(path.clone());
                places(value, &path, all);
            }
        }
        Value::Array(items) => {
            for (at, value) in items.iter().enumerate() {
                let path = format!("{path}/{at}");
                all.push(path.clone());
                places(value, &path, all);
            }
        }
        _ => {}
    }
}

/// Two of the odd values in each field: the next field has the next two.
#[test]
fn every_field_may_hold_anything() {
    let server = Server::start(&["--context", "640"]);
    let odd = [
        json!(null),
        json!(true),
        json!(-1),
        json!(u64::MAX),
        json!("\u{0}\u{fffd}\u{1f999}"),
        json!([[[]]]),
        json!({ "": { "type": [] } }),
    ];
    for (path, body) in bodies() {
        let sound = server.post(path, &body);
        assert_eq!(sound.status, 200, "{path}: {}", sound.body);
        let mut all = Vec::new();
        places(&body, "", &mut all);
        for (at, place) in all.into_iter().enumerate() {
            for value in odd.iter().cycle().skip(2 * at).take(2) {
                let mut body = body.clone();
                *body.pointer_mut(&place).expect("a place") = value.clone();
                // Shown if there is no answer at all.
                println!("{path} {place}: {value}");
                let answer = server.post(path, &body);
                assert!(
                    is_settled(&answer),
                    "{path} {place}: {value}: {} {}",
                    answer.status,
                    answer.body
                );
            }
        }
    }
    let many = json!({ "prompt": ["a", "b"], "n": u64::MAX });
    assert!(server.refuse("/v1/completions", &many, 400).contains("n: is above"));
    server.wait_until_idle();
    end_in_peace(server);
}

#[test]
fn bodies_that_are_no_json_are_refused() {
    let server = Server::start(&[]);
    let deep = |open: &str, close: &str| format!("{}1{}", open.repeat(5000), close.repeat(5000));
    for body in [
        "",
        " ",
        "nul",
        "NaN",
        "{\"messages\": NaN}",
        "{\"temperature\": Infinity}",
        "{\"a\": 1e999}",
        "\u{feff}{}",
        "{\"a\": \"\\ud800\"}",
        "{\"a\": \"\\udc00\\ud800\"}",
        "{'a': 1}",
        "{\"a\": 1,}",
        "{\"a\": \"\u{1}\"}",
        &deep("[", "]"),
        &deep("{\"a\":", "}"),
    ] {
        for path in [CHAT, "/v1/responses", "/v1/messages", "/v1/completions", "/tokenize"] {
            let head = format!("content-length: {}", body.len());
            let headers: &[&str] = if body.is_empty() { &[&head] } else { &[] };
            let answer = server.request("POST", path, headers, body);
            assert!(
                answer.status == 400 && is_settled(&answer),
                "{path} {body:.60}: {}",
                answer.body
            );
        }
    }
    let twice = "{\"messages\": 5, \"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"max_tokens\": 1}";
    let answer = server.request("POST", CHAT, &[], twice);
    assert!(is_settled(&answer), "{}", answer.body);
    end_in_peace(server);
}

/// What comes back for these bytes, until the server closes the connection.
fn raw(server: &Server, bytes: &[u8]) -> String {
    let mut stream = server.connect();
    stream.write_all(bytes).expect("sending");
    let mut said = Vec::new();
    stream.read_to_end(&mut said).expect("an answer");
    String::from_utf8(said).expect("text")
}

#[test]
fn http_is_spoken_in_all_its_forms() {
    let server = Server::start(&["--client-timeout", "2"]);
    let body =
        json!({ "messages": [{ "role": "user", "content": "a" }], "max_tokens": 1 }).to_string();
    let (half, rest) = body.split_at(body.len() / 2);
    let chunks = format!(
        "{:x}\r\n{half}\r\n{:x};a=b\r\n{rest}\r\n0\r\nx: y\r\n\r\n",
        half.len(),
        rest.len()
    );
    let post = |headers: &str, body: &str| {
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n\r\n{body}")
    };
    let length = format!("content-length: {}", body.len());
    for (request, expected) in [
        (post("transfer-encoding: chunked", &chunks), "HTTP/1.1 200"),
        (post("transfer-encoding: chunked", "zz\r\n"), "HTTP/1.1 400"),
        (
            post(&format!("expect: 100-continue\r\n{length}"), &body),
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200",
        ),
        (post(&length, &body).replace("HTTP/1.1", "HTTP/1.0"), "HTTP/1.0 200"),
        (post(&format!("{length}\r\ncontent-length: 5"), &body), "HTTP/1.1 400"),
        (post("content-length: -5", &body), "HTTP/1.1 400"),
        (post(&"a: b\r\n".repeat(5000), ""), "HTTP/1.1 431"),
        (
            format!("GET /{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "a".repeat(60_000)),
            "HTTP/1.1 404",
        ),
        (
            "GET /v1/%ff%00/../x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".into(),
            "HTTP/1.1 404",
        ),
        ("TRACE / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".into(), "HTTP/1.1 405"),
        ("nonsense\r\n\r\n".into(), "HTTP/1.1 400"),
        (
            "GET /health HTTP/1.1\r\nhost: x\r\n\r\n".repeat(2) + &post(&length, &body),
            "HTTP/1.1 200",
        ),
    ] {
        let said = raw(&server, request.as_bytes());
        assert!(said.starts_with(expected), "{request:.90}: {said}");
        assert!(
            !request.starts_with("GET /health") || said.matches("HTTP/1.1 200").count() == 3,
            "{said}"
        );
    }
    // A header a second would keep a connection for ever, if each were granted the time anew.
    let mut slow = server.connect();
    slow.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n").expect("sending");
    let started = std::time::Instant::now();
    let mut piece = [0; 100];
    slow.set_read_timeout(Some(std::time::Duration::from_millis(300))).expect("a timeout");
    while slow.read(&mut piece).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock) {
        assert!(started.elapsed().as_secs() < 20, "the connection is never closed");
        // One that is closed takes no more.
        slow.write_all(b"a: b\r\n").unwrap_or(());
    }
    end_in_peace(server);
}

/// A request whose answer can only be this text, as a JSON string.
fn only(text: &str, extra: &Value) -> Value {
    let schema = json!({ "enum": [text] });
    let mut body = json!({
        "messages": [{ "role": "user", "content": "Say it." }], "temperature": 0, "enable_thinking": false,
        "response_format": { "type": "json_schema", "json_schema": { "name": "n", "schema": schema } },
    });
    extra.as_object().expect("fields").iter().for_each(|(name, v)| body[name] = v.clone());
    body
}

fn streamed(answer: &Answer, index: u64) -> String {
    let events = answer.events();
    let choices = events.iter().flat_map(|event| event["choices"].as_array().expect("choices"));
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

#[test]
fn characters_and_stop_texts_may_lie_across_tokens() {
    let server = Server::start(&[]);
    let text = "a \u{1f999}\u{1f3fd} \u{65e5}\u{672c}\u{8a9e} \u{e9}e\u{301} z";
    let expected = format!("\"{text}\"");
    let whole = server.ask(CHAT, &only(text, &json!({ "logprobs": true })));
    assert_eq!(whole["choices"][0]["message"]["content"], expected);
    let tokens = whole["choices"][0]["logprobs"]["content"].as_array().expect("tokens");
    let bytes = tokens.iter().flat_map(|token| token["bytes"].as_array().expect("bytes"));
    let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().expect("a byte") as u8).collect();
    assert_eq!(String::from_utf8(bytes).expect("text"), expected);
    assert!(tokens.len() > 20, "a character is one token: {tokens:?}");
    let stream = json!({ "stream": true });
    assert_eq!(streamed(&server.post(CHAT, &only(text, &stream)), 0), expected);
    for stop in ["\u{1f999}", "\u{1f3fd} \u{65e5}", "\u{672c}\u{8a9e} \u{e9}", "z\"", " z"] {
        let until = expected.split(stop).next().expect("a part");
        for stream in [false, true] {
            let answer =
                server.post(CHAT, &only(text, &json!({ "stop": [stop], "stream": stream })));
            let content = match stream {
                true => streamed(&answer, 0),
                false => answer.json()["choices"][0]["message"]["content"]
                    .as_str()
                    .expect("a text")
                    .into(),
            };
            assert_eq!(content, until, "{stop:?}");
            assert!(answer.body.contains("\"finish_reason\":\"stop\""), "{}", answer.body);
        }
    }
    end_in_peace(server);
}

#[test]
fn several_streamed_texts_are_those_that_come_whole() {
    let server = Server::start(&["--parallel", "2"]);
    let body = |stream: bool| {
        json!({ "messages": [{ "role": "user", "content": "Tell me a story." }], "n": 3, "seed": 5,
                "temperature": 1.3, "max_tokens": 16, "enable_thinking": false, "stream": stream,
                "logprobs": true })
    };
    let whole = server.ask(CHAT, &body(false));
    let answer = server.post(CHAT, &body(true));
    for index in 0..3 {
        let expected = &whole["choices"][index]["message"]["content"];
        assert_eq!(json!(streamed(&answer, index as u64)), *expected);
    }
    let events = answer.events();
    let ends = events.iter().filter(|event| event["choices"][0]["finish_reason"].is_string());
    assert_eq!(ends.count(), 3);
    let told = events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(told.map(Vec::len).sum::<usize>(), 48);
}

#[test]
fn a_named_tool_is_called_and_probabilities_are_told_after_thinking() {
    let server = Server::start(&["--think-budget", "6"]);
    let base = json!({ "messages": [{ "role": "user", "content": "Light." }], "tools": [lamp()],
                       "max_tokens": 200, "temperature": 1.2, "seed": 3, "logprobs": true });
    let with = |extra: &Value| {
        let mut body = base.clone();
        extra.as_object().expect("fields").iter().for_each(|(name, v)| body[name] = v.clone());
        server.ask(CHAT, &body)["choices"][0].clone()
    };
    let named = json!({ "type": "function", "function": { "name": "set_lamp" } });
    let called = with(&json!({ "tool_choice": named }));
    let message = &called["message"];
    assert!(!message["reasoning_content"].as_str().expect("thinking").is_empty(), "{message}");
    assert_eq!(called["finish_reason"], "tool_calls", "{called}");
    let arguments = message["tool_calls"][0]["function"]["arguments"].as_str().expect("arguments");
    let arguments: Value = serde_json::from_str(arguments).expect("JSON");
    assert!(arguments["on"].is_boolean(), "{arguments}");

    let schema = json!({ "type": "object", "required": ["yes"], "additionalProperties": false,
                         "properties": { "yes": { "type": "boolean" } } });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema } });
    for seed in 0..4 {
        let either =
            with(&json!({ "response_format": format, "seed": seed, "parallel_tool_calls": false }));
        let message = &either["message"];
        let content = message["content"].as_str().unwrap_or("").trim();
        let told = either["logprobs"]["content"].as_array().expect("probabilities");
        let text: String =
            told.iter().map(|token| token["token"].as_str().expect("text")).collect();
        match message["tool_calls"].as_array() {
            Some(calls) => assert!(!calls.is_empty() && content.is_empty(), "{message}"),
            None => {
                let value: Value = serde_json::from_str(content).expect("JSON");
                assert!(value["yes"].is_boolean(), "{message}");
                assert_eq!(text.trim(), content, "thinking is not among them");
            }
        }
    }
}

#[test]
fn a_body_that_says_it_is_too_large_is_refused_before_it_comes() {
    let server = Server::start(&["--max-body", "1K"]);
    let mut stream = server.connect();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("sending");
    let answer = read_answer(stream);
    assert!(answer.status == 413 && answer.body.contains("--max-body"), "{}", answer.body);
}
