//! Conversations to prompt text, by the template that the model was trained with.
//!
//! Templates are Jinja programs written against Python: [`python`] holds the two conversions whose
//! Python form shows in the text, [`clock`] the date. White space is trimmed around blocks as the
//! hub's reference library does. Refuses to guess: without a template there is no prompt text, and
//! what a template refuses (`raise_exception`) is an error with the template's own words.

pub mod clock;
pub mod python;

use std::path::Path;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::reply::CallFormat;

/// Name of a template that stands in a file of its own.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Name of the file whose `chat_template` field is used where there is no [`TEMPLATE_FILE`].
pub const CONFIG_FILE: &str = "tokenizer_config.json";

/// A parsed chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

/// What a template is asked to render.
#[derive(Clone, Debug)]
pub struct Conversation<'a> {
    /// Objects with `role` and `content`, in order.
    pub messages: &'a [Json],
    /// Function descriptions; an empty slice is no tools at all.
    pub tools: &'a [Json],
    /// Whether the text ends with the opening of the assistant's turn.
    pub generation_prompt: bool,
    /// Whether the model should think first; `None` leaves it to the template.
    pub thinking: Option<bool>,
}

/// What a template passed to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

impl ChatTemplate {
    /// Reads the template of a model directory.
    ///
    /// # Errors
    /// Neither file has one; a file is unreadable or malformed; the template does not parse.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = read_config(&dir.join(CONFIG_FILE))?;
        let path = dir.join(TEMPLATE_FILE);
        let source = match path.exists() {
            true => std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?,
            false => template_field(&config).map_err(|what| {
                Error::Template(format!("{}: no {TEMPLATE_FILE}, and {what}", dir.display()))
            })?,
        };
        Self::new(source, &config)
    }

    /// Parses `source`; `config` is the object in `tokenizer_config.json`, for `bos_token` and others.
    ///
    /// # Errors
    /// The template does not parse.
    pub fn new(source: String, config: &Json) -> Result<Self> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().map_err(|e| template_error(&e))?);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_formatter(|out, _, value| {
            write!(out, "{}", python::text(value)).map_err(minijinja::Error::from)
        });
        environment.add_filter("string", |value: Value| python::text(&value));
        environment.add_filter("tojson", |value: Value, options: Kwargs| {
            // Text is never escaped to ASCII, whatever `ensure_ascii` says: no template asks for it.
            options.get::<Option<bool>>("ensure_ascii")?;
            let indent = options.get::<Option<usize>>("indent")?;
            options.assert_all_used()?;
            python::json(&value, indent)
        });
        environment.add_function("raise_exception", |message: String| {
            let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
            Err::<Value, _>(error.with_source(Refusal(message)))
        });
        environment.add_function("strftime_now", |format: String| {
            clock::strftime(&format, SystemTime::now())
                .map_err(|what| minijinja::Error::new(ErrorKind::InvalidOperation, what))
        });
        for (name, text) in token_names(config) {
            environment.add_global(name, text);
        }
        environment.add_template_owned("chat", source.clone()).map_err(|e| template_error(&e))?;
        Ok(Self { environment, source })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// The template refuses the conversation or fails on it.
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        let tools = (!conversation.tools.is_empty()).then_some(conversation.tools);
        let mut values = context! {
            messages => Value::from(Serde(conversation.messages)),
            tools => Value::from(Serde(tools)),
            add_generation_prompt => conversation.generation_prompt,
        };
        // A template tells "not said" from "said to be false" by whether the name is defined.
        if let Some(thinking) = conversation.thinking {
            values = context! { enable_thinking => thinking, ..values };
        }
        let template = self.environment.get_template("chat").map_err(|e| template_error(&e))?;
        template.render(values).map_err(|e| template_error(&e))
    }

    /// How the template writes a tool call; `None` where it knows no tools.
    pub fn call_format(&self) -> Option<CallFormat> {
        let tools = self.source.contains("tools") && self.source.contains("<tool_call>");
        let tagged = self.source.contains("<function=");
        tools.then_some(if tagged { CallFormat::Tagged } else { CallFormat::Json })
    }

    /// Whether the template can be told to think or not to.
    pub fn has_thinking_switch(&self) -> bool {
        self.source.contains("enable_thinking")
    }
}

fn read_config(path: &Path) -> Result<Json> {
    if !path.exists() {
        return Ok(Json::Null);
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::Template(format!("{}: not JSON: {e}", path.display())))
}

/// The `chat_template` field: the text itself, or the one named `default` of a list.
fn template_field(config: &Json) -> Result<String, String> {
    match config.get("chat_template") {
        Some(Json::String(source)) => Ok(source.clone()),
        Some(Json::Array(list)) => {
            let named = |entry: &&Json| entry.get("name").and_then(Json::as_str) == Some("default");
            let default = list.iter().find(named).and_then(|entry| entry.get("template"));
            let source = default.and_then(Json::as_str).map(str::to_string);
            source.ok_or_else(|| format!("none of {CONFIG_FILE}'s templates is named default"))
        }
        Some(_) => Err(format!("chat_template in {CONFIG_FILE} is neither text nor a list")),
        None => Err(format!("no chat_template in {CONFIG_FILE}")),
    }
}

/// `bos_token`, `eos_token` and their like: text, or an object whose `content` is the text.
fn token_names(config: &Json) -> Vec<(String, String)> {
    let Some(fields) = config.as_object() else { return Vec::new() };
    let named = fields.iter().filter(|(name, _)| name.ends_with("_token"));
    named
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name.clone(), text.to_string()))
        })
        .collect()
}

/// The template's own words where it refused; otherwise the engine's message, which has the line.
fn template_error(error: &minijinja::Error) -> Error {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(Refusal(message)) = inner.downcast_ref() {
            return Error::Template(message.clone());
        }
        source = inner.source();
    }
    Error::Template(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn user(text: &str) -> Vec<Json> {
        vec![json!({ "role": "user", "content": text })]
    }

    fn render(source: &str, messages: &[Json], thinking: Option<bool>) -> Result<String> {
        let conversation = Conversation { messages, tools: &[], generation_prompt: true, thinking };
        ChatTemplate::new(source.into(), &json!({ "bos_token": { "content": "<s>" } }))?
            .render(&conversation)
    }

    #[test]
    fn blocks_take_their_line_with_them() {
        let source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source, &user("hi"), None).unwrap(), "hi\n");
    }

    #[test]
    fn thinking_is_defined_only_when_it_is_said() {
        let source = "{{ enable_thinking is defined }} {{ enable_thinking is false }}";
        assert_eq!(render(source, &[], None).unwrap(), "False False");
        assert_eq!(render(source, &[], Some(false)).unwrap(), "True True");
        assert_eq!(render(source, &[], Some(true)).unwrap(), "True False");
    }

    #[test]
    fn no_tools_are_not_an_empty_list() {
        assert_eq!(render("{{ tools is none }}", &[], None).unwrap(), "True");
    }

    #[test]
    fn tokens_of_the_configuration_are_names() {
        assert_eq!(render("{{ bos_token }}", &[], None).unwrap(), "<s>");
    }

    #[test]
    fn python_shows_in_the_text() {
        let source =
            "{{ 'a,b'.split(',')[-1] }} {{ true }} {{ none }} {{ 1e16 }} {{ 1.5 | string }}";
        assert_eq!(render(source, &[], None).unwrap(), "b True None 1e+16 1.5");
        let source = "{{ messages | tojson }} {{ [1] | tojson(indent=2, ensure_ascii=false) }}";
        assert_eq!(
            render(source, &user("<\u{e9}'>\n"), None).unwrap(),
            "[{\"role\": \"user\", \"content\": \"<\u{e9}'>\\n\"}] [\n  1\n]"
        );
    }

    #[test]
    fn refusals_come_in_the_template_s_words_others_with_their_line() {
        let refused = render("{{ raise_exception('No ' ~ 'way.') }}", &[], None).unwrap_err();
        assert_eq!(refused.to_string(), "chat template: No way.");
        let nested = "{% macro m() %}{{ raise_exception('In a macro.') }}{% endmacro %}{{ m() }}";
        let refused = render(nested, &[], None).unwrap_err();
        assert_eq!(refused.to_string(), "chat template: In a macro.");
        let malformed = render("\n{% if %}", &[], None).unwrap_err().to_string();
        assert!(malformed.contains(":2"), "{malformed}");
    }

    #[test]
    fn the_file_wins_over_the_field_and_the_default_over_its_siblings() {
        let dir = tempfile::tempdir().unwrap();
        let conversation =
            Conversation { messages: &[], tools: &[], generation_prompt: true, thinking: None };
        let text = || ChatTemplate::open(dir.path())?.render(&conversation);

        let missing = text().unwrap_err().to_string();
        assert!(missing.contains("no chat_template in tokenizer_config.json"), "{missing}");
        let config = dir.path().join(CONFIG_FILE);
        std::fs::write(&config, r#"{ "chat_template": [{ "name": "rag", "template": "r" }] }"#)
            .unwrap();
        assert!(text().unwrap_err().to_string().contains("named default"));
        std::fs::write(
            &config,
            r#"{ "chat_template": [{ "name": "rag", "template": "r" },
                                   { "name": "default", "template": "d" }] }"#,
        )
        .unwrap();
        assert_eq!(text().unwrap(), "d");
        std::fs::write(&config, r#"{ "chat_template": "field" }"#).unwrap();
        assert_eq!(text().unwrap(), "field");
        std::fs::write(dir.path().join(TEMPLATE_FILE), "file").unwrap();
        assert_eq!(text().unwrap(), "file");
        std::fs::write(&config, "{").unwrap();
        assert!(text().unwrap_err().to_string().contains("tokenizer_config.json: not JSON"));
    }
}
