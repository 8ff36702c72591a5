//! The shapes of Anthropic's messages and OpenAI's responses, and what each refuses.
//!
//! The official packages check more of them (`ci/clients.sh`); here is what must hold on every
//! machine.

use serde_json::{Value, json};

use super::answers::lamp;
use super::client::Server;

fn message(extra: &Value) -> Value {
    let mut body = json!({
        "model": "any", "max_tokens": 20, "temperature": 0,
        "messages": [{ "role": "user", "content": "Tell me a story." }],
    });
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().expect("a type")).collect()
}

#[test]
fn messages_are_the_same_whole_and_streamed() {
    let server = Server::start(&[]);
    let whole = server.ask("/v1/messages", &message(&json!({ "system": "Be kind." })));
    assert_eq!(whole["stop_reason"], "max_tokens");
    let counted =
        server.ask("/v1/messages/count_tokens", &message(&json!({ "system": "Be kind." })));
    assert_eq!(counted["input_tokens"], whole["usage"]["input_tokens"]);
    let stream = message(&json!({ "system": "Be kind.", "stream": true }));
    let events = server.post("/v1/messages", &stream).events();
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(whole["content"][0]["text"], text);
    let kinds = kinds(&events);
    assert_eq!(kinds[..3], ["message_start", "ping", "content_block_start"]);
    let last = ["content_block_stop", "message_delta", "message_stop"];
    assert_eq!(kinds[kinds.len() - 3..], last);
}

#[test]
fn a_called_tool_is_a_block_and_its_result_is_taken() {
    let server = Server::start(&[]);
    let tool = json!([{ "name": "set_lamp", "input_schema": lamp()["function"]["parameters"] }]);
    let choice = json!({ "type": "any", "disable_parallel_tool_use": true });
    let body = message(&json!({ "tools": tool, "tool_choice": choice, "max_tokens": 150 }));
    let whole = server.ask("/v1/messages", &body);
    assert_eq!(whole["stop_reason"], "tool_use", "{whole}");
    let call = &whole["content"][0];
    assert!(call["type"] == "tool_use" && call["input"]["on"].is_boolean(), "{call}");
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let events = server.post("/v1/messages", &streamed).events();
    let pieces = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str());
    let input: Value = serde_json::from_str(&pieces.collect::<String>()).expect("JSON");
    assert_eq!(input, call["input"]);
    let more = json!({ "tools": tool, "messages": [
        { "role": "user", "content": "Light." },
        { "role": "assistant", "content": [call] },
        { "role": "user", "content": [
            { "type": "tool_result", "tool_use_id": call["id"], "content": "done" }] } ] });
    assert_eq!(server.ask("/v1/messages", &message(&more))["type"], "message");
}

#[test]
fn thinking_is_a_block_of_its_own() {
    let server = Server::start(&[]);
    let thinking =
        json!({ "thinking": { "type": "enabled", "budget_tokens": 4 }, "max_tokens": 30 });
    let whole = server.ask("/v1/messages", &message(&thinking));
    let kinds: Vec<&Value> =
        whole["content"].as_array().unwrap().iter().map(|b| &b["type"]).collect();
    assert_eq!(kinds, [&json!("thinking"), &json!("text")], "{whole}");
    let mut streamed = message(&thinking);
    streamed["stream"] = json!(true);
    let events = server.post("/v1/messages", &streamed).events();
    let thought: String = events.iter().filter_map(|e| e["delta"]["thinking"].as_str()).collect();
    assert_eq!(whole["content"][0]["thinking"], thought);
    assert!(events.iter().any(|event| event["delta"]["type"] == "signature_delta"));
}

#[test]
fn responses_go_on_from_their_id_until_they_are_deleted() {
    let server = Server::start(&[]);
    let ask = |extra: &Value| {
        let mut body = json!({ "input": "Tell me a story.", "max_output_tokens": 12,
                               "temperature": 0, "enable_thinking": false });
        extra.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        body
    };
    let first = server.ask("/v1/responses", &ask(&json!({})));
    let id = first["id"].as_str().unwrap();
    assert_eq!(first["incomplete_details"]["reason"], "max_output_tokens");
    let events = server.post("/v1/responses", &ask(&json!({ "stream": true }))).events();
    let text: String = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .filter_map(|event| event["delta"].as_str())
        .collect();
    assert_eq!(first["output"][0]["content"][0]["text"], text);
    let numbers: Vec<u64> = events.iter().map(|e| e["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..numbers.len() as u64).collect::<Vec<_>>());
    assert_eq!(server.get(&format!("/v1/responses/{id}")).json(), first);
    let more = ask(&json!({ "previous_response_id": id, "input": "Go on." }));
    let second = server.ask("/v1/responses", &more);
    let tokens = |response: &Value| response["usage"]["input_tokens"].as_u64().unwrap();
    assert!(tokens(&second) > tokens(&first) + 12, "{second}");
    let deleted = server.request("DELETE", &format!("/v1/responses/{id}"), &[], "");
    assert_eq!(deleted.json()["deleted"], true);
    assert!(server.refuse("/v1/responses", &more, 404).contains("there is no response"));
    let unkept = server.ask("/v1/responses", &ask(&json!({ "store": false })));
    let path = format!("/v1/responses/{}", unkept["id"].as_str().unwrap());
    assert_eq!(server.get(&path).status, 404);
}

#[test]
fn what_is_not_supported_is_refused_by_name_in_the_client_s_dialect() {
    let server = Server::start(&[]);
    let chat = |extra: &Value| {
        let mut body = json!({ "messages": [{ "role": "user", "content": "a" }] });
        extra.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        body
    };
    for (extra, field) in [
        (json!({ "frobnicate": 1 }), "frobnicate"),
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "temperature": 1000 }), "temperature"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "n": 99 }), "n"),
        (json!({ "store": true }), "store"),
        (json!({ "audio": {} }), "audio"),
        (json!({ "functions": [] }), "functions"),
        (json!({ "top_logprobs": 3 }), "top_logprobs"),
        (json!({ "stream_options": { "include_usage": true } }), "stream_options"),
        (json!({ "reasoning_effort": "heroic" }), "reasoning_effort"),
        (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (json!({ "messages": "a" }), "messages"),
    ] {
        let said = server.refuse("/v1/chat/completions", &chat(&extra), 400);
        assert!(said.contains(field), "{extra}: {said}");
    }
    for null in ["frobnicate", "temperature", "tools", "stop"] {
        let body = chat(&json!({ null: null, "max_tokens": 1 }));
        assert_eq!(server.post("/v1/chat/completions", &body).status, 200, "{null}");
    }
    let refused = server.post("/v1/messages", &message(&json!({ "top_q": 1 })));
    assert_eq!((refused.status, &refused.json()["type"]), (400, &json!("error")));
    assert_eq!(refused.json()["error"]["type"], "invalid_request_error");
    assert!(refused.json()["request_id"].is_string());
}
