//! What was said: the messages of a conversation, in our own terms and in those of others.
//!
//! An answer keeps what the model really emitted beside what it says, so that a later run goes on
//! from the same tokens. Nothing here is sent, shown or stored; `sessions` writes it down and the
//! backends ask it for messages.

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::serve::turns::Turn;

/// Letters of a title.
const TITLE_LETTERS: usize = 60;

/// One message.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum Message {
    User {
        content: String,
    },
    Assistant(Answer),
    /// What a tool gave back to the call of this id.
    Tool {
        id: String,
        content: String,
    },
}

/// An answer, whole or as far as it came.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub content: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub thinking: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub calls: Vec<Call>,
    pub end: End,
    /// What the model emitted, and who it was: the identity of its container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub emitted: Option<Emitted>,
}

/// Tokens, and the model whose tokens they are.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Emitted {
    pub model: String,
    pub turn: Turn,
}

/// A call of a tool.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Call {
    pub id: String,
    pub name: String,
    /// A JSON object, as text.
    pub arguments: String,
}

/// Why an answer ended.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The model ended it.
    #[default]
    Stop,
    /// The most tokens, or the context is full.
    Length,
    /// The user stopped it.
    Stopped,
    /// The engine or the connection failed.
    Failed,
}

/// How the arguments of a call are written for somebody else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arguments {
    /// As an object, for a chat template.
    Object,
    /// As text, for OpenAI's interface.
    Text,
}

/// The messages so far, and the system prompt before them.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Conversation {
    pub system: Option<String>,
    pub messages: Vec<Message>,
}

impl Conversation {
    /// The messages as JSON objects.
    pub fn to_json(&self, arguments: Arguments) -> Vec<Json> {
        let system = self.system.iter().map(|text| json!({ "role": "system", "content": text }));
        system.chain(self.messages.iter().map(|message| message.to_json(arguments))).collect()
    }

    /// The messages that are left when the last question and all that followed are taken back; `None`
    /// if there is no question.
    pub fn before_last_question(&self) -> Option<usize> {
        self.messages.iter().rposition(|message| matches!(message, Message::User { .. }))
    }

    /// The last question.
    pub fn last_question(&self) -> Option<&str> {
        self.messages.iter().rev().find_map(|message| match message {
            Message::User { content } => Some(content.as_str()),
            _ => None,
        })
    }

    /// The last answer.
    pub fn last_answer(&self) -> Option<&Answer> {
        self.messages.iter().rev().find_map(|message| match message {
            Message::Assistant(answer) => Some(answer),
            _ => None,
        })
    }

    /// Calls of the last answer that have no result yet.
    pub fn open_calls(&self) -> Vec<Call> {
        let Some(at) = self.messages.iter().rposition(|m| matches!(m, Message::Assistant(_)))
        else {
            return Vec::new();
        };
        let Message::Assistant(answer) = &self.messages[at] else { return Vec::new() };
        let has_result = |call: &&Call| {
            self.messages[at..]
                .iter()
                .any(|m| matches!(m, Message::Tool { id, .. } if *id == call.id))
        };
        answer.calls.iter().filter(|call| !has_result(call)).cloned().collect()
    }

    /// The beginning of the first question, in one line.
    pub fn title(&self) -> String {
        let first = self.messages.iter().find_map(|message| match message {
            Message::User { content } => Some(content.as_str()),
            _ => None,
        });
        let words: Vec<&str> = first.unwrap_or("").split_whitespace().collect();
        words.join(" ").chars().take(TITLE_LETTERS).collect()
    }

    /// The conversation as Markdown.
    pub fn to_markdown(&self) -> String {
        let mut text = String::new();
        if let Some(system) = &self.system {
            text += &format!("## System\n\n{system}\n\n");
        }
        for message in &self.messages {
            text += &match message {
                Message::User { content } => format!("## You\n\n{content}\n\n"),
                Message::Assistant(answer) => answer.to_markdown(),
                Message::Tool { content, .. } => {
                    let fence = fence_for(content);
                    format!("### Result\n\n{fence}\n{}\n{fence}\n\n", content.trim_end())
                }
            };
        }
        text
    }
}

impl Message {
    fn to_json(&self, arguments: Arguments) -> Json {
        match self {
            Self::User { content } => json!({ "role": "user", "content": content }),
            Self::Tool { id, content } => {
                json!({ "role": "tool", "tool_call_id": id, "content": content })
            }
            Self::Assistant(answer) => answer.to_json(arguments),
        }
    }
}

impl Answer {
    fn to_json(&self, arguments: Arguments) -> Json {
        let mut message = json!({ "role": "assistant", "content": self.content });
        // Other servers' interfaces have no field for thinking that is sent back.
        if arguments == Arguments::Object && !self.thinking.is_empty() {
            message["reasoning_content"] = json!(self.thinking);
        }
        if !self.calls.is_empty() {
            let calls = self.calls.iter().map(|call| call.to_json(arguments));
            message["tool_calls"] = calls.collect();
        }
        message
    }

    fn to_markdown(&self) -> String {
        let mut text = "## Assistant\n\n".to_string();
        if !self.thinking.is_empty() {
            let thinking = self.thinking.trim().replace('\n', "\n> ");
            text += &format!("> {thinking}\n\n");
        }
        if !self.content.is_empty() {
            text += &format!("{}\n\n", self.content.trim_end());
        }
        for call in &self.calls {
            let body = format!("{} {}", call.name, call.arguments);
            let fence = fence_for(&body);
            text += &format!("### Call\n\n{fence}\n{body}\n{fence}\n\n");
        }
        text
    }
}

impl Call {
    fn to_json(&self, arguments: Arguments) -> Json {
        let object = serde_json::from_str(&self.arguments).unwrap_or_else(|_| json!({}));
        let written = match arguments {
            Arguments::Object => object,
            Arguments::Text => json!(self.arguments),
        };
        let function = json!({ "name": self.name, "arguments": written });
        json!({ "id": self.id, "type": "function", "function": function })
    }
}

/// A fence that a text does not have in it.
pub fn fence_for(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    "`".repeat(longest.max(2) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(content: &str) -> Message {
        Message::User { content: content.into() }
    }

    fn called() -> Conversation {
        let call = |id: &str| Call {
            id: id.into(),
            name: "shell".into(),
            arguments: "{\"command\":\"ls\"}".into(),
        };
        let answer = Answer {
            content: "Looking.".into(),
            thinking: "hm".into(),
            calls: vec![call("a"), call("b")],
            ..Answer::default()
        };
        let result = Message::Tool { id: "a".into(), content: "x ``` y".into() };
        Conversation {
            system: Some("Be brief.".into()),
            messages: vec![user("List\nfiles"), Message::Assistant(answer), result],
        }
    }

    #[test]
    fn a_template_gets_objects_and_thinking_others_get_text_without_it() {
        let object = called().to_json(Arguments::Object);
        assert_eq!(object[2]["tool_calls"][0]["function"]["arguments"], json!({ "command": "ls" }));
        assert_eq!(object[2]["reasoning_content"], "hm");
        let text = called().to_json(Arguments::Text);
        assert_eq!(text[2]["tool_calls"][1]["function"]["arguments"], "{\"command\":\"ls\"}");
        assert_eq!(text[2].get("reasoning_content"), None);
        let result = json!({ "role": "tool", "tool_call_id": "a", "content": "x ``` y" });
        assert_eq!((&text[0]["role"], &text[3]), (&json!("system"), &result));
    }

    #[test]
    fn calls_without_a_result_are_open() {
        let open: Vec<String> = called().open_calls().into_iter().map(|call| call.id).collect();
        assert_eq!(open, ["b"]);
        assert_eq!(Conversation::default().open_calls(), []);
    }

    #[test]
    fn an_export_reads_as_markdown() {
        let call = "```\nshell {\"command\":\"ls\"}\n```";
        let expected = format!(
            "## System\n\nBe brief.\n\n## You\n\nList\nfiles\n\n## Assistant\n\n> hm\n\nLooking.\n\n\
             ### Call\n\n{call}\n\n### Call\n\n{call}\n\n### Result\n\n````\nx ``` y\n````\n\n"
        );
        assert_eq!(called().to_markdown(), expected);
        assert_eq!(called().title(), "List files");
        assert_eq!(called().before_last_question(), Some(0));
    }
}
