//! What a server says to a call, as text for the model.
//!
//! Text is text. What a text model cannot see, images, sound and other bytes, is named with its kind
//! and size and never dumped. Refuses nothing: whatever a server sends becomes a line.

use rmcp::model::{CallToolResult, ContentBlock, ResourceContents};

/// What stands for content that the protocol did not have when this was written.
const UNKNOWN: &str = "[content of a kind that is not known here]";

/// The text of a result.
pub fn text(result: &CallToolResult) -> String {
    let blocks: Vec<String> = result.content.iter().map(block).collect();
    match (&result.structured_content, blocks.is_empty()) {
        (Some(value), true) => value.to_string(),
        _ => blocks.join("\n"),
    }
}

fn block(block: &ContentBlock) -> String {
    match block {
        ContentBlock::Text(text) => text.text.clone(),
        ContentBlock::Image(image) => unseen("an image", &image.mime_type, &image.data),
        ContentBlock::Audio(audio) => unseen("a sound", &audio.mime_type, &audio.data),
        ContentBlock::Resource(embedded) => resource(&embedded.resource),
        ContentBlock::ResourceLink(link) => format!("[a link to {}: {}]", link.uri, link.name),
        _ => UNKNOWN.into(),
    }
}

fn resource(contents: &ResourceContents) -> String {
    match contents {
        ResourceContents::TextResourceContents { uri, text, .. } => format!("{uri}:\n{text}"),
        ResourceContents::BlobResourceContents { uri, mime_type, blob, .. } => {
            unseen(uri, mime_type.as_deref().unwrap_or("bytes"), blob)
        }
        _ => UNKNOWN.into(),
    }
}

fn unseen(what: &str, kind: &str, base64: &str) -> String {
    let bytes = base64.trim_end_matches('=').len() * 3 / 4;
    format!("[{what}, {kind}, {bytes} bytes, which a text model cannot see]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value as Json, json};

    fn told(result: Json) -> String {
        text(&serde_json::from_value(result).unwrap())
    }

    #[test]
    fn texts_are_told_and_bytes_are_named() {
        let content = json!({ "content": [
            { "type": "text", "text": "two\nlines" },
            { "type": "image", "data": "AAECAwQ=", "mimeType": "image/png" },
            { "type": "audio", "data": "AAEC", "mimeType": "audio/wav" },
            { "type": "resource", "resource": { "uri": "file:///a", "text": "inside" } },
            { "type": "resource", "resource": { "uri": "file:///b", "blob": "AA==" } },
            { "type": "resource_link", "uri": "file:///c", "name": "c" },
        ] });
        let expected = "two\nlines\n\
            [an image, image/png, 5 bytes, which a text model cannot see]\n\
            [a sound, audio/wav, 3 bytes, which a text model cannot see]\n\
            file:///a:\ninside\n\
            [file:///b, bytes, 1 bytes, which a text model cannot see]\n\
            [a link to file:///c: c]";
        assert_eq!(told(content), expected);
    }

    #[test]
    fn a_value_is_told_where_there_is_no_text() {
        assert_eq!(told(json!({ "content": [], "structuredContent": { "n": 1 } })), "{\"n\":1}");
        let both = json!({ "content": [{ "type": "text", "text": "one" }],
                           "structuredContent": { "n": 1 } });
        assert_eq!(told(both), "one");
    }
}
