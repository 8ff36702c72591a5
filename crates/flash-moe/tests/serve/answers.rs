//! What is answered: the same text whole, streamed, alone, beside others and from `run`.
//!
//! Greedy texts are compared letter by letter; sampled ones through their seed.

use serde_json::{Value, json};

use super::client::{Server, read_answer};
use crate::program::Home;

const CHAT: &str = "/v1/chat/completions";

fn story(extra: &Value) -> Value {
    let mut body = json!({
        "messages": [{ "role": "user", "content": "Tell me a story about a robot." }],
        "max_tokens": 24, "temperature": 0,
    });
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

/// Without thinking, which the template would else open.
fn plain(extra: &Value) -> Value {
    let mut body = story(extra);
    body["enable_thinking"] = json!(false);
    body
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("content")
}

fn streamed(events: &[Value], field: &str) -> String {
    let deltas = events.iter().filter_map(|event| event["choices"][0]["delta"][field].as_str());
    deltas.collect()
}

#[test]
fn whole_streamed_alone_and_together_are_one_text() {
    let server = Server::start(&["--parallel", "3"]);
    let alone = server.ask(CHAT, &plain(&json!({})));
    let expected = content(&alone);
    assert_eq!(alone["usage"]["completion_tokens"], 24);
    assert_eq!(alone["choices"][0]["finish_reason"], "length");
    let stream = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let body = plain(&stream).to_string();
    let answers: Vec<_> = (0..5).map(|_| server.send("POST", CHAT, &[], &body)).collect();
    for answer in answers.into_iter().map(read_answer) {
        let events = answer.events();
        assert_eq!(streamed(&events, "content"), expected);
        let usage = &events.last().unwrap()["usage"];
        assert_eq!(usage["total_tokens"], alone["usage"]["total_tokens"]);
        assert!(answer.body.contains(": prompt ") && answer.body.ends_with("data: [DONE]\n\n"));
    }
}

#[test]
fn the_server_and_run_give_the_same_text() {
    let home = Home::new();
    let prompt = "Tell me a story about a robot.";
    let run = home.json(&["--greedy", "--max-tokens", "40", prompt]);
    let config = home.write("own.jinja", own_template());
    let server = Server::start(&["--chat-template", &config]);
    let answer = server.ask(CHAT, &story(&json!({ "max_tokens": 40 })));
    assert_eq!(content(&answer), run["text"].as_str().unwrap());
    let refused = server.refuse(CHAT, &story(&json!({ "tools": [lamp()] })), 400);
    assert!(refused.contains("template knows no tools"), "{refused}");
}

fn own_template() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny/tokenizer_config.json");
    let text = std::fs::read_to_string(path).expect("the built-in model's configuration");
    let config: Value = serde_json::from_str(&text).expect("JSON");
    config["chat_template"].as_str().expect("a template").to_string()
}

#[test]
fn seeds_choices_and_probabilities() {
    let server = Server::start(&[]);
    let wish =
        json!({ "n": 3, "seed": 7, "temperature": 1.2, "logprobs": true, "top_logprobs": 2 });
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap().iter();
        choices.map(|c| c["message"]["content"].as_str().unwrap().to_string()).collect()
    };
    let first = server.ask(CHAT, &plain(&wish));
    assert_eq!(texts(&first), texts(&server.ask(CHAT, &plain(&wish))));
    assert_ne!(texts(&first)[0], texts(&first)[1]);
    assert_eq!(first["usage"]["completion_tokens"], 72);
    let tokens = first["choices"][2]["logprobs"]["content"].as_array().unwrap();
    let joined: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!((tokens.len(), joined.trim()), (24, texts(&first)[2].trim()));
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert!(top.len() == 2 && top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[test]
fn biases_and_stop_texts_are_obeyed() {
    let server = Server::start(&[]);
    let free = server.ask(CHAT, &plain(&json!({})));
    let text = content(&free).to_string();
    let middle = &text[4..11];
    let stopped = server.ask(CHAT, &plain(&json!({ "stop": [middle, "nowhere"] })));
    assert_eq!(
        (content(&stopped), &stopped["choices"][0]["finish_reason"]),
        (&text[..4], &json!("stop"))
    );
    let word = &server.ask("/tokenize", &json!({ "content": text }))["tokens"][0];
    let banned = server.ask(CHAT, &plain(&json!({ "logit_bias": { word.to_string(): -100 } })));
    assert_ne!(content(&banned)[..4], text[..4]);
}

#[test]
fn thinking_is_never_content() {
    let server = Server::start(&["--think-budget", "5"]);
    let answer = server.ask(CHAT, &story(&json!({ "max_tokens": 40 })));
    let message = &answer["choices"][0]["message"];
    let thought = message["reasoning_content"].as_str().expect("thinking");
    assert!(!thought.is_empty() && !content(&answer).contains("</think>"), "{answer}");
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], 6);
    let events = server.post(CHAT, &story(&json!({ "max_tokens": 40, "stream": true }))).events();
    assert_eq!(streamed(&events, "reasoning_content"), thought);
    assert_eq!(streamed(&events, "content"), content(&answer));
}

#[test]
fn prompts_that_do_not_fit_are_refused() {
    let server = Server::start(&["--context", "64"]);
    let long = json!({ "prompt": "word ".repeat(200) });
    let said = server.refuse("/v1/completions", &long, 400);
    assert!(said.contains("the context holds 64") && said.contains("--context"), "{said}");
    let full = server
        .ask("/v1/completions", &json!({ "prompt": "Once", "max_tokens": 500, "temperature": 0 }));
    let usage = &full["usage"];
    assert!(usage["total_tokens"].as_u64().unwrap() <= 65, "{usage}");
}

#[test]
fn completions_continue_texts_and_tokens() {
    let server = Server::start(&[]);
    let ids = server.ask("/tokenize", &json!({ "prompt": "Once upon a time" }));
    let back = server.ask("/detokenize", &json!({ "tokens": ids["tokens"] }));
    assert_eq!(back["content"], "Once upon a time");
    let both = json!({ "prompt": ["Once upon a time", ids["tokens"]], "max_tokens": 6, "temperature": 0, "logprobs": 1 });
    let answer = server.ask("/v1/completions", &both);
    assert_eq!(answer["choices"][0]["text"], answer["choices"][1]["text"]);
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 6);
    let alone =
        json!({ "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0, "stream": true });
    let events = server.post("/v1/completions", &alone).events();
    let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, answer["choices"][0]["text"]);
}

/// A tool whose calls are short whatever the model thinks.
pub fn lamp() -> Value {
    json!({ "type": "function", "function": { "name": "set_lamp", "parameters": {
        "type": "object", "required": ["room", "on"], "additionalProperties": false,
        "properties": { "room": { "enum": ["kitchen", "hall"] }, "on": { "type": "boolean" },
                        "level": { "type": "integer", "minimum": 0, "maximum": 9 } } } } })
}
