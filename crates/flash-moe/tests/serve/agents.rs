//! What coding agents send, in small: the shapes of Claude Code, Codex, OpenCode and aider.
//!
//! The fields and headers are those of their requests, the texts are ours. `docs/server.md` names the versions
//! that were looked at. Each is answered, and a call that one of them is given comes back.

use serde_json::{Value, json};

use super::answers::lamp;
use super::client::Server;

fn schema() -> Value {
    lamp()["function"]["parameters"].clone()
}

fn with(mut body: Value, extra: &Value) -> Value {
    extra.as_object().expect("fields").iter().for_each(|(name, v)| body[name] = v.clone());
    body
}

fn claude_code(attribution: &str) -> Value {
    let cached = json!({ "type": "ephemeral" });
    json!({
        "model": "flash-moe",
        "system": [
            { "type": "text", "text": format!("x-anthropic-billing-header: {attribution};") },
            { "type": "text", "text": "You are an agent.", "cache_control": cached },
            { "type": "text", "text": "\nRead before you write. ".repeat(9), "cache_control": cached },
        ],
        "messages": [
            { "role": "user", "content": [
                { "type": "text", "text": "<system-reminder>It is Monday.</system-reminder>" },
                { "type": "text", "text": "Light.", "cache_control": cached } ] },
            { "role": "system", "content": "There are no other agents." },
        ],
        "tools": [{ "name": "set_lamp", "description": "Switches.", "input_schema": schema() }],
        "metadata": { "user_id": "{\"session_id\":\"s\"}" },
        "max_tokens": 100, "temperature": 0, "stream": true,
        "thinking": { "type": "adaptive" },
        "context_management": { "edits": [{ "type": "clear_thinking_20251015", "keep": "all" }] },
        "output_config": { "effort": "high" },
    })
}

const CLAUDE_HEADERS: [&str; 4] = [
    "anthropic-version: 2023-06-01",
    "anthropic-beta: claude-code-20250219,context-management-2025-06-27,effort-2025-11-24",
    "anthropic-dangerous-direct-browser-access: true",
    "authorization: Bearer any",
];

#[test]
fn claude_code_is_answered_and_its_sessions_share_the_system_prompt() {
    let server = Server::start(&["--think-budget", "4"]);
    assert_eq!(server.request("HEAD", "/", &[], "").status, 200);
    let ask = |body: &Value| {
        let path = "/v1/messages?beta=true";
        let answer = server.request("POST", path, &CLAUDE_HEADERS, &body.to_string());
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.events()
    };
    let call = json!({ "tool_choice": { "type": "tool", "name": "set_lamp" },
                       "thinking": { "type": "enabled", "budget_tokens": 4 } });
    let events = ask(&with(claude_code("a=1"), &call));
    let block = |kind: &str| {
        let begun = events.iter().filter(|event| event["type"] == "content_block_start");
        begun.map(|event| event["content_block"].clone()).find(|block| block["type"] == kind)
    };
    let used = block("tool_use").unwrap_or_else(|| panic!("no call: {events:?}"));
    let pieces = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str());
    let input: Value = serde_json::from_str(&pieces.collect::<String>()).expect("JSON");

    let mut next = claude_code("a=1");
    let messages = next["messages"].as_array_mut().expect("messages");
    messages.push(json!({ "role": "assistant", "content": [
        { "type": "thinking", "thinking": "Hm.", "signature": "unsigned" },
        { "type": "tool_use", "id": used["id"], "name": "set_lamp", "input": input,
          "caller": { "type": "direct" } } ] }));
    messages.push(json!({ "role": "user", "content": [
        { "type": "tool_result", "tool_use_id": used["id"], "is_error": true,
          "content": "<tool_use_error>No such lamp.</tool_use_error>",
          "cache_control": { "type": "ephemeral" } } ] }));
    ask(&next);
    let other =
        with(claude_code("b=2"), &json!({ "messages": [{ "role": "user", "content": "Hi" }] }));
    let cached = &ask(&other)[0]["message"]["usage"]["cache_read_input_tokens"];
    assert!(cached.as_u64() > Some(300), "the system prompt and the tools: {cached}");

    let counted = json!({ "model": "m", "messages": [{ "role": "user", "content": "foo" }],
                          "tools": claude_code("")["tools"] });
    let path = "/v1/messages/count_tokens?beta=true";
    let counted = server.request("POST", path, &CLAUDE_HEADERS, &counted.to_string());
    assert!(counted.json()["input_tokens"].as_u64() > Some(100), "{}", counted.body);
}

fn codex() -> Value {
    let text = |text: &str| json!([{ "type": "input_text", "text": text }]);
    let function = |name: &str| {
        json!({ "type": "function", "name": name, "description": "Acts.",
                                        "strict": false, "parameters": schema() })
    };
    json!({
        "model": "flash-moe", "stream": true, "store": false, "temperature": 0,
        "input": [
            { "type": "message", "id": "msg_1", "role": "developer", "content": text("You are an agent.") },
            { "type": "message", "id": "msg_2", "role": "developer", "content": text("Be careful.") },
            { "type": "message", "id": "msg_3", "role": "user", "content": text("Light.") },
        ],
        "tools": [
            function("exec_command"),
            { "type": "namespace", "name": "lamps", "description": "All lamps.", "tools": [function("set_lamp")] },
            { "type": "web_search", "external_web_access": false },
        ],
        "tool_choice": "auto", "parallel_tool_calls": true, "reasoning": { "summary": "auto" },
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "client_metadata": { "session_id": "s" }, "enable_thinking": false,
    })
}

#[test]
fn codex_calls_a_function_of_a_namespace_and_it_comes_back() {
    let server = Server::start(&[]);
    let call = json!({ "tool_choice": { "type": "function", "name": "lamps.set_lamp" } });
    let events = server.post("/v1/responses", &with(codex(), &call)).events();
    let done = events.iter().find(|event| event["type"] == "response.output_item.done");
    let item = &done.unwrap_or_else(|| panic!("no item: {events:?}"))["item"];
    assert_eq!((&item["namespace"], &item["name"]), (&json!("lamps"), &json!("set_lamp")));
    let mut next = codex();
    let input = next["input"].as_array_mut().expect("items");
    input.push(item.clone());
    let result =
        json!({ "type": "function_call_output", "call_id": item["call_id"], "output": "done" });
    input.push(result);
    let events = server.post("/v1/responses", &next).events();
    let last = &events.last().expect("events")["response"];
    assert_eq!(last["object"], "response", "{last}");
    let cached = &last["usage"]["input_tokens_details"]["cached_tokens"];
    let before = &events[0]["response"]["usage"];
    assert!(
        before.is_null() && cached.as_u64() > Some(300),
        "the call is not computed again: {cached}"
    );
    let live = json!([{ "type": "web_search", "external_web_access": true }]);
    let said = server.refuse("/v1/responses", &with(codex(), &json!({ "tools": live })), 400);
    assert!(said.contains("tools[0].type"), "{said}");
}

#[test]
fn opencode_and_aider_are_answered() {
    let server = Server::start(&["--think-budget", "4"]);
    let opencode = json!({
        "model": "flash-moe", "max_tokens": 20, "tools": [lamp()], "tool_choice": "auto",
        "messages": [
            { "role": "system", "content": "You are an agent." },
            { "role": "user", "content": "Light." },
            { "role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [
                { "id": "call_1", "type": "function", "function": {
                    "name": "set_lamp", "arguments": "{\"room\":\"hall\",\"on\":true}" } } ] },
            { "role": "tool", "tool_call_id": "call_1", "content": "done" },
        ],
        "stream": true, "stream_options": { "include_usage": true },
    });
    let aider = json!({
        "model": "flash-moe", "stream": true, "temperature": 0, "max_tokens": 20,
        "messages": [
            { "role": "system", "content": "Suggest edits." },
            { "role": "user", "content": "Greet." }, { "role": "assistant", "content": "Ok." },
            { "role": "user", "content": "These are the files." }, { "role": "assistant", "content": "Ok." },
            { "role": "user", "content": "Say hello." },
        ],
    });
    for body in [opencode, aider] {
        let answer = server.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.ends_with("data: [DONE]\n\n"), "{}", answer.body);
    }
}
