//! Output that must have a shape: JSON of a schema, and calls of tools.
//!
//! The built-in model tells stories and knows neither, so whatever parses here does so because of the
//! grammar. Temperatures are high on purpose.

use serde_json::{Value, json};

use super::answers::lamp;
use super::client::Server;

const CHAT: &str = "/v1/chat/completions";

fn wish(extra: &Value) -> Value {
    let mut body = json!({
        "messages": [{ "role": "user", "content": "Light, please." }],
        "max_tokens": 150, "temperature": 1.5, "enable_thinking": false,
    });
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

fn check_lamp(arguments: &Value) {
    assert!(
        ["kitchen", "hall"].contains(&arguments["room"].as_str().expect("a room")),
        "{arguments}"
    );
    assert!(arguments["on"].is_boolean(), "{arguments}");
    assert!(arguments.get("level").is_none_or(|level| level.as_u64() <= Some(9)), "{arguments}");
}

#[test]
fn a_required_tool_is_called_and_its_arguments_parse() {
    let server = Server::start(&[]);
    for seed in 0..6 {
        let named = json!({ "type": "function", "function": { "name": "set_lamp" } });
        let body = wish(&json!({ "tools": [lamp()], "tool_choice": named, "seed": seed }));
        let answer = server.ask(CHAT, &body);
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
        assert_eq!(choice["message"]["content"], Value::Null);
        let call = &choice["message"]["tool_calls"][0]["function"];
        let whole = call["arguments"].as_str().expect("arguments");
        check_lamp(&serde_json::from_str(whole).expect("JSON"));

        let mut body = body;
        body["stream"] = json!(true);
        let events = server.post(CHAT, &body).events();
        let calls = events.iter().map(|event| &event["choices"][0]["delta"]["tool_calls"][0]);
        let calls: Vec<&Value> = calls.filter(|call| !call.is_null()).collect();
        let pieces = calls.iter().filter_map(|call| call["function"]["arguments"].as_str());
        assert_eq!(pieces.collect::<String>(), whole);
        assert!(calls[0]["id"].is_string() && calls.len() > 2, "{calls:?}");
    }
}

#[test]
fn several_calls_may_follow_where_one_is_required() {
    let server = Server::start(&[]);
    let answer = |parallel: bool| {
        let body = json!({ "tools": [lamp()], "tool_choice": "required", "seed": 3,
                           "parallel_tool_calls": parallel, "max_tokens": 400 });
        let answer = server.ask(CHAT, &wish(&body));
        let calls =
            answer["choices"][0]["message"]["tool_calls"].as_array().expect("calls").clone();
        for call in &calls {
            let arguments = call["function"]["arguments"].as_str().expect("arguments");
            check_lamp(&serde_json::from_str(arguments).expect("JSON"));
        }
        calls.len()
    };
    assert_eq!(answer(false), 1);
    assert!(answer(true) >= 1);
}

#[test]
fn a_schema_is_followed_and_a_bad_one_is_refused() {
    let server = Server::start(&[]);
    let schema = json!({ "type": "object", "required": ["age", "tags"], "additionalProperties": false,
        "properties": { "age": { "type": "integer", "minimum": 1, "maximum": 99 },
                        "tags": { "type": "array", "items": { "enum": ["a", "b"] }, "maxItems": 3 } } });
    let format = |schema: &Value| json!({ "type": "json_schema", "json_schema": { "name": "p", "schema": schema } });
    for seed in 0..6 {
        let body = wish(&json!({ "response_format": format(&schema), "seed": seed }));
        let answer = server.ask(CHAT, &body);
        let text = answer["choices"][0]["message"]["content"].as_str().expect("content");
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!((1..=99).contains(&value["age"].as_u64().expect("an age")), "{value}");
        assert!(value["tags"].as_array().expect("tags").len() <= 3, "{value}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    let bad = wish(&json!({ "response_format": format(&json!({ "type": "fantasy" })) }));
    let said = server.refuse(CHAT, &bad, 400);
    assert!(said.contains("response_format") && said.contains("fantasy"), "{said}");
    let lost = wish(&json!({ "tools": [lamp()], "tool_choice": { "type": "function",
                             "function": { "name": "other" } } }));
    assert!(server.refuse(CHAT, &lost, 400).contains("\"other\" is not among the tools"));
}

#[test]
fn an_answer_after_thinking_has_its_shape_too() {
    let server = Server::start(&["--think-budget", "8"]);
    let schema = json!({ "type": "object", "required": ["yes"], "additionalProperties": false,
                         "properties": { "yes": { "type": "boolean" } } });
    let mut body = wish(&json!({ "response_format": { "type": "json_schema",
                                 "json_schema": { "name": "p", "schema": schema } } }));
    body["enable_thinking"] = json!(true);
    let answer = server.ask(CHAT, &body);
    let message = &answer["choices"][0]["message"];
    assert!(message["reasoning_content"].is_string(), "{message}");
    let value: Value = serde_json::from_str(message["content"].as_str().unwrap()).expect("JSON");
    assert!(value["yes"].is_boolean());
}
