//! `/v1/models`, `/tokenize` and `/detokenize`: what the model is, and its view of a text.
//!
//! A text to be tokenized is a string, or messages, which go through the template as they would in a
//! chat.

use serde_json::{Value as Json, json};

use super::super::model::Model;
use super::chat_messages;
use super::completions::ids;
use super::fields::Fields;
use super::refusal::{Parsed, Refusal};
use super::request::Conversation;

/// The list of models: one.
pub fn models(model: &Model) -> Json {
    json!({ "object": "list", "data": [one_model(model)], "first_id": model.name,
            "last_id": model.name, "has_more": false })
}

/// The model, in the terms of both dialects.
pub fn one_model(model: &Model) -> Json {
    json!({
        "id": model.name,
        "object": "model",
        "type": "model",
        "display_name": model.name,
        "created": model.opened,
        "owned_by": "flash-moe",
        "max_model_len": model.engine.context(),
    })
}

/// Tokens of a text or a conversation.
///
/// # Errors
/// Names the field that is wrong.
pub fn tokenize(model: &Model, body: Json) -> Parsed<Json> {
    let mut fields = Fields::of(body, "")?;
    fields.accept(&["model"]);
    fields.only("add_special_tokens", &[json!(true), json!(false)])?;
    let tokens = match fields.list("messages")? {
        Some(list) => {
            let conversation = Conversation {
                messages: chat_messages::messages(list, "messages")?,
                tools: chat_messages::tools(
                    fields.list("tools")?.unwrap_or_else(Vec::new),
                    "tools",
                )?,
                ..Conversation::default()
            };
            conversation.prompt(model)?.tokens
        }
        None => {
            let (content, prompt) = (fields.text("content")?, fields.text("prompt")?);
            let Some(text) = content.or(prompt) else {
                return Err(Refusal::new(400, "content, prompt or messages is required"));
            };
            model.tokenizer.encode(&text).map_err(|e| Refusal::field("content", e.to_string()))?
        }
    };
    fields.finish()?;
    let tokens: Vec<u32> = tokens.iter().map(|token| token.0).collect();
    let (count, context) = (tokens.len(), model.engine.context());
    Ok(json!({ "tokens": tokens, "count": count, "max_model_len": context }))
}

/// Text of tokens, special ones left out.
///
/// # Errors
/// Names the field that is wrong.
pub fn detokenize(model: &Model, body: Json) -> Parsed<Json> {
    let mut fields = Fields::of(body, "")?;
    fields.accept(&["model"]);
    let tokens = fields.take("tokens");
    let tokens = tokens.as_ref().and_then(ids);
    let tokens =
        tokens.ok_or_else(|| fields.refusal("tokens", "is required, a list of token ids"))?;
    fields.finish()?;
    let text = model.tokenizer.decode(&tokens);
    Ok(json!({ "content": text, "prompt": text }))
}
