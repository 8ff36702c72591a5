//! The prompt as token ids: from the argument, a file or standard input, as text or as ids.
//!
//! Text goes through the chat template unless it is to be continued as it stands. Every way in which
//! input can be unusable (no text, not UTF-8, not a number) is told apart and located.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use flash_moe_engine::chat_template::{ChatTemplate, Conversation};
use flash_moe_engine::shape::TokenId;
use serde_json::json;

use crate::options::engine::Model;
use crate::options::environment;
use crate::options::run::RunArgs;

/// A prompt that is ready for the model.
#[derive(Debug)]
pub struct Prompt {
    /// Its ids; at least one, unless a state is continued as it is.
    pub tokens: Vec<TokenId>,
    /// What the user should know about how it was made.
    pub notes: Vec<String>,
}

/// Reads the prompt that the flags name.
///
/// # Errors
/// No prompt, an empty one, a file that cannot be read or is not UTF-8, ids that are not numbers, a
/// model without a tokenizer or template, a template that refuses.
pub fn read(args: &RunArgs, model: &Model) -> Result<Prompt> {
    if let Some(path) = &args.prompt.prompt_tokens {
        let tokens = token_ids(&read_bytes(path)?).with_context(|| name(path))?;
        return Ok(Prompt { tokens, notes: Vec::new() });
    }
    let Some(tokenizer) = &model.tokenizer else {
        bail!(
            "{} has no tokenizer.json, so it takes token ids alone: --prompt-tokens FILE",
            model.container.dir().display()
        );
    };
    let text = text(args)?;
    let is_empty = if args.prompt.raw { text.is_empty() } else { text.trim().is_empty() };
    if is_empty && args.prompt.raw && args.state.load_state.is_some() {
        return Ok(Prompt { tokens: Vec::new(), notes: Vec::new() });
    }
    if is_empty {
        bail!("the prompt is empty");
    }
    let mut notes = Vec::new();
    let text = if args.prompt.raw { text } else { chat(args, model, &text, &mut notes)? };
    let tokens = tokenizer.encode(&text)?;
    if tokens.is_empty() {
        bail!("the prompt has no tokens");
    }
    Ok(Prompt { tokens, notes })
}

fn text(args: &RunArgs) -> Result<String> {
    let path = match (&args.prompt.prompt, &args.prompt.file) {
        (Some(prompt), _) if prompt != "-" => return Ok(prompt.clone()),
        (Some(_), _) => Path::new("-"),
        (None, Some(path)) => path,
        (None, None) if environment::input_is_terminal() => {
            bail!("no prompt: give it as an argument, with --file, or on standard input")
        }
        (None, None) => Path::new("-"),
    };
    let mut text = String::from_utf8(read_bytes(path)?).map_err(|e| {
        anyhow!("{}: not UTF-8 text, from byte {} on", name(path), e.utf8_error().valid_up_to())
    })?;
    if !args.prompt.raw && text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

/// Stands for the answer that a state ends with.
const ANSWER: &str = "[the answer before]";

/// The text of a conversation with one user turn, open for the answer; for a state that is loaded,
/// what follows its answer in a conversation with one more turn.
fn chat(args: &RunArgs, model: &Model, text: &str, notes: &mut Vec<String>) -> Result<String> {
    let template = ChatTemplate::open(model.container.dir())
        .context("--raw continues the prompt without a template")?;
    let mut messages = Vec::new();
    if let Some(system) = &args.prompt.system {
        messages.push(json!({ "role": "system", "content": system }));
    }
    if args.state.load_state.is_some() {
        messages.push(json!({ "role": "user", "content": "" }));
        messages.push(json!({ "role": "assistant", "content": ANSWER }));
    }
    messages.push(json!({ "role": "user", "content": text }));
    let thinking = args.length.thinking();
    if thinking.is_some() && !template.has_thinking_switch() {
        notes.push("this model's chat template has no choice about thinking".into());
    }
    let conversation =
        Conversation { messages: &messages, tools: &[], generation_prompt: true, thinking };
    let rendered = template.render(&conversation)?;
    if args.state.load_state.is_none() {
        return Ok(rendered);
    }
    match rendered.split_once(ANSWER) {
        Some((_, follows)) => Ok(follows.into()),
        None => bail!(
            "this model's chat template does not show earlier answers, so no turn can follow one; \
             --raw continues the text as it stands"
        ),
    }
}

/// Ids written as numbers, or as the original engine writes them: a 32-bit count, then 32-bit ids.
fn token_ids(bytes: &[u8]) -> Result<Vec<TokenId>> {
    let (words, rest) = bytes.as_chunks::<4>();
    let words: Vec<u32> = words.iter().map(|&word| u32::from_le_bytes(word)).collect();
    if let Some((&count, ids)) = words.split_first()
        && rest.is_empty()
        && count as usize == ids.len()
        && count > 0
    {
        return Ok(ids.iter().copied().map(TokenId).collect());
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|e| anyhow!("not a list of token ids: byte {} is not text", e.valid_up_to()))?;
    let pieces = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|p| !p.is_empty());
    let ids: Result<Vec<TokenId>> = pieces
        .enumerate()
        .map(|(i, piece)| match piece.parse() {
            Ok(id) => Ok(TokenId(id)),
            Err(_) => Err(anyhow!("token {i} is {piece:?}, expected a number")),
        })
        .collect();
    match ids?.as_slice() {
        [] => bail!("no token ids"),
        ids => Ok(ids.to_vec()),
    }
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    if path != Path::new("-") {
        return fs::read(path).with_context(|| name(path));
    }
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes).context("standard input")?;
    Ok(bytes)
}

fn name(path: &Path) -> String {
    if path == Path::new("-") { "standard input".into() } else { path.display().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(bytes: &[u8]) -> Result<Vec<u32>, String> {
        token_ids(bytes).map(|ids| ids.iter().map(|t| t.0).collect()).map_err(|e| e.to_string())
    }

    #[test]
    fn ids_are_separated_by_commas_or_white_space() {
        assert_eq!(ids(b"1,2, 3\n4\t5,,\n"), Ok(vec![1, 2, 3, 4, 5]));
    }

    #[test]
    fn ids_of_the_original_engine_are_counted_words() {
        let bytes: Vec<u8> = [3u32, 7, 0, 248_045].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(ids(&bytes), Ok(vec![7, 0, 248_045]));
    }

    #[test]
    fn what_is_not_a_list_of_ids_is_located() {
        assert_eq!(ids(b"1, two"), Err("token 1 is \"two\", expected a number".into()));
        assert_eq!(ids(b"-1"), Err("token 0 is \"-1\", expected a number".into()));
        assert_eq!(ids(b" ,\n"), Err("no token ids".into()));
        assert_eq!(ids(b"1 2 \xff"), Err("not a list of token ids: byte 4 is not text".into()));
    }
}
