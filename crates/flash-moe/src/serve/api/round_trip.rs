//! Conversations through the interfaces' own shapes come out as the reference renders them.
//!
//! The cases and their texts are the reference library's (`oracle/`). Here each is written as a client
//! of either interface would send it, read back, and rendered by the same template.

use flash_moe_engine::chat_template::{ChatTemplate, Conversation};
use serde_json::{Value as Json, json};

use super::{chat, messages};

const TEMPLATE: &str = include_str!("../../../../engine/tests/template/qwen3.5.jinja");
const CASES: &str = include_str!("../../../../engine/tests/template/cases.json");

/// The cases that a client of text can send, with the text that they become.
fn cases() -> Vec<(String, Json, String)> {
    let cases: Vec<Json> = serde_json::from_str(CASES).unwrap();
    let text = |case: &Json| case["rendered"].as_str().map(str::to_string);
    let plain = |case: &&Json| {
        let generates = case["kwargs"]["add_generation_prompt"] == json!(true);
        // No client can send a picture, or a call that is not wrapped as the interface has it.
        let sent = case["name"] != "call_without_function_wrapper";
        generates && sent && !case.to_string().contains("\"image\"")
    };
    let wanted = cases.iter().filter(plain);
    wanted
        .filter_map(|case| Some((case["name"].as_str()?.to_string(), case.clone(), text(case)?)))
        .collect()
}

fn render(conversation: &super::request::Conversation) -> String {
    let template = ChatTemplate::new(TEMPLATE.into(), &Json::Null).unwrap();
    let tools: Vec<Json> = conversation.tools.iter().map(|tool| tool.described()).collect();
    template
        .render(&Conversation {
            messages: &conversation.messages,
            tools: &tools,
            generation_prompt: true,
            thinking: conversation.thinking,
        })
        .unwrap()
}

/// Every call of a conversation gets an id, and every result the id of its call.
fn with_ids(list: &Json) -> Vec<Json> {
    let mut open: Vec<String> = Vec::new();
    let mut count = 0;
    let messages = list.as_array().unwrap().iter().map(|message| {
        let mut message = message.clone();
        for call in message["tool_calls"].as_array_mut().into_iter().flatten() {
            count += 1;
            open.push(format!("call_{count}"));
            call["id"] = json!(format!("call_{count}"));
        }
        if message["role"] == "tool" {
            message["tool_call_id"] = json!(open.remove(0));
        }
        message
    });
    messages
        .map(|mut message| {
            // An absent list was made null by looking at it.
            message.as_object_mut().unwrap().retain(|_, value| !value.is_null());
            message
        })
        .collect()
}

fn openai(case: &Json) -> Json {
    let mut list = with_ids(&case["messages"]);
    for message in &mut list {
        for call in message.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten()
        {
            let arguments = call["function"]["arguments"].to_string();
            call["function"]["arguments"] = json!(arguments);
        }
    }
    let mut body = json!({ "messages": list, "tools": case["kwargs"]["tools"] });
    if let Some(thinks) = case["kwargs"].get("enable_thinking") {
        body["chat_template_kwargs"] = json!({ "enable_thinking": thinks });
    }
    body
}

fn anthropic(case: &Json) -> Json {
    let thinks = case["kwargs"].get("enable_thinking") != Some(&json!(false));
    let kind = if thinks { "enabled" } else { "disabled" };
    let mut body = json!({ "max_tokens": 1, "messages": [], "thinking": { "type": kind } });
    let mut list: Vec<Json> = Vec::new();
    for message in with_ids(&case["messages"]) {
        match message["role"].as_str() {
            Some("system") => body["system"] = message["content"].clone(),
            Some("tool") => list.push(json!({ "role": "user", "content": [{
                "type": "tool_result", "tool_use_id": message["tool_call_id"],
                "content": message["content"] }] })),
            Some("assistant") => list.push(assistant_blocks(&message)),
            _ => list.push(message),
        }
    }
    body["messages"] = json!(list);
    let tools = case["kwargs"]["tools"].as_array().into_iter().flatten();
    let tools = tools.map(|tool| {
        let function = &tool["function"];
        json!({ "name": function["name"], "description": function["description"],
                "input_schema": function["parameters"] })
    });
    body["tools"] = tools.collect();
    body
}

fn assistant_blocks(message: &Json) -> Json {
    let mut blocks = Vec::new();
    if let Some(thought) = message.get("reasoning_content") {
        blocks.push(json!({ "type": "thinking", "thinking": thought, "signature": "" }));
    }
    if message["content"].as_str().is_some_and(|text| !text.is_empty()) {
        blocks.push(json!({ "type": "text", "text": message["content"] }));
    }
    for call in message.get("tool_calls").and_then(Json::as_array).into_iter().flatten() {
        let function = &call["function"];
        blocks.push(json!({ "type": "tool_use", "id": call["id"], "name": function["name"],
                            "input": function["arguments"] }));
    }
    json!({ "role": "assistant", "content": blocks })
}

#[test]
fn openai_s_shapes_come_out_as_the_reference_renders_them() {
    for (name, case, expected) in cases() {
        let read = chat::read(openai(&case)).unwrap_or_else(|e| panic!("{name}: {}", e.message));
        assert_eq!(render(&read.conversation), expected, "{name}");
    }
    assert!(cases().len() >= 10);
}

#[test]
fn anthropic_s_shapes_come_out_as_the_reference_renders_them() {
    for (name, case, expected) in cases() {
        let body = anthropic(&case);
        let read = messages::read(body, false).unwrap_or_else(|e| panic!("{name}: {}", e.message));
        assert_eq!(render(&read.conversation), expected, "{name}");
    }
}
