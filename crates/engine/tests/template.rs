//! The family's chat template, against renderings by the hub's reference library.
//!
//! `template/cases.json` holds conversations with the text, or the refusal, that Python's Jinja gave
//! for `template/qwen3.5.jinja`; every one must come out the same to the byte.

use std::path::Path;

use flash_moe_engine::chat_template::{ChatTemplate, Conversation};
use serde_json::Value;

fn list(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

#[test]
fn every_conversation_renders_as_the_reference_renders_it() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/template");
    let source = std::fs::read_to_string(dir.join("qwen3.5.jinja")).unwrap();
    let cases = std::fs::read_to_string(dir.join("cases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&cases).unwrap();
    let template = ChatTemplate::new(source, &Value::Null).unwrap();
    assert!(template.has_thinking_switch());
    let mut refused = 0;
    for case in &cases {
        let options = &case["kwargs"];
        let rendered = template.render(&Conversation {
            messages: list(case.get("messages")),
            tools: list(options.get("tools")),
            generation_prompt: options["add_generation_prompt"].as_bool().unwrap(),
            thinking: options.get("enable_thinking").and_then(Value::as_bool),
        });
        let expected = match case["rendered"].as_str() {
            Some(text) => Ok(text.to_string()),
            None => Err(format!("chat template: {}", case["error"].as_str().unwrap())),
        };
        refused += usize::from(expected.is_err());
        assert_eq!(rendered.map_err(|e| e.to_string()), expected, "{}", case["name"]);
    }
    assert!(refused >= 3 && cases.len() - refused >= 13, "{refused} of {}", cases.len());
}
