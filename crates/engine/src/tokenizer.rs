//! Text to token ids and back.
//!
//! Encoding is the reference tokenizer library itself, reading the model's `tokenizer.json`. Decoding
//! is a table of bytes, one run for each id: the family's vocabularies are byte-level, so a token is
//! a run of bytes and text is their concatenation. [`TokenStream`] turns that into whole characters
//! as tokens arrive. Refuses vocabularies that are not byte-level.

use std::path::Path;

use tokenizers::DecoderWrapper;

use crate::error::{Error, Result};
use crate::shape::TokenId;

/// Name of the vocabulary in a model directory.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// A model's vocabulary and segmentation rules.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Pieces,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory.
    ///
    /// # Errors
    /// The file is missing, unreadable, refused by the tokenizer library or not byte-level.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(TOKENIZER_FILE);
        if !path.exists() {
            return Err(Error::Tokenizer(format!(
                "{} is missing; copy it from the model's source, or pass token ids",
                path.display()
            )));
        }
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        Self::from_json(&bytes).map_err(|e| match e {
            Error::Tokenizer(what) => Error::Tokenizer(format!("{}: {what}", path.display())),
            other => other,
        })
    }

    /// Parses the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// Refused by the tokenizer library, or not byte-level.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let refused = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(refused)?;
        // A file may ask for truncation or padding, which suit training and corrupt a prompt.
        inner.with_truncation(None).map_err(refused)?;
        inner.with_padding(None);
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(Error::Tokenizer("the decoder is not byte-level".into()));
        }
        let pieces = Pieces::of(&inner);
        Ok(Self { inner, pieces })
    }

    /// Token ids of `text`. Special tokens written in the text are recognised; none is added.
    ///
    /// # Errors
    /// The tokenizer library gave up on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    /// Text of `tokens` as one piece, special tokens left out.
    pub fn decode(&self, tokens: &[TokenId]) -> String {
        let mut stream = self.stream();
        let mut text: String = tokens.iter().map(|&t| stream.push(t)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// A decoder for tokens that arrive one by one.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream { pieces: &self.pieces, pending: Vec::new() }
    }

    /// One more than the largest id: embedding rows from here on belong to no token.
    pub fn count(&self) -> usize {
        self.pieces.count()
    }

    /// The id of a token by its exact text: `<think>`, `<|im_end|>`.
    pub fn id(&self, text: &str) -> Option<TokenId> {
        self.inner.token_to_id(text).map(TokenId)
    }

    /// The text that a token stands for, which may be part of a character; empty for a special one.
    pub fn bytes(&self, token: TokenId) -> &[u8] {
        self.pieces.bytes(token)
    }

    /// Bytes of text that a token stands for; of a special token, the bytes of its name.
    pub fn byte_count(&self, token: TokenId) -> usize {
        match self.pieces.bytes(token).len() {
            0 => self.name(token).map_or(0, |name| name.len()),
            bytes => bytes,
        }
    }

    /// How a token is written in the vocabulary file, for messages.
    pub fn name(&self, token: TokenId) -> Option<String> {
        self.inner.id_to_token(token.0)
    }
}

/// Decodes tokens as they arrive, never splitting a character.
///
/// Bytes that may still become a character are held back; bytes that cannot are replaced by U+FFFD,
/// as the reference decoder does with the whole text.
pub struct TokenStream<'a> {
    pieces: &'a Pieces,
    pending: Vec<u8>, // at most 3 bytes between calls
}

impl TokenStream<'_> {
    /// The text that `token` completes; empty while a character is unfinished.
    pub fn push(&mut self, token: TokenId) -> String {
        self.pending.extend_from_slice(self.pieces.bytes(token));
        take_text(&mut self.pending)
    }

    /// What is left at the end: U+FFFD for an unfinished character, otherwise nothing.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Removes and returns the longest prefix of `pending` that no later byte can change.
fn take_text(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        let (valid, invalid) = match std::str::from_utf8(pending) {
            Ok(all) => (all.len(), Some(0)),
            Err(e) => (e.valid_up_to(), e.error_len()),
        };
        text.push_str(std::str::from_utf8(&pending[..valid]).expect("checked on the line above"));
        pending.drain(..valid);
        match invalid {
            Some(0) | None => return text,
            Some(bytes) => {
                text.push(char::REPLACEMENT_CHARACTER);
                pending.drain(..bytes);
            }
        }
    }
}

/// The bytes of every token, by id, in one run.
struct Pieces {
    bytes: Vec<u8>,
    starts: Vec<u32>, // [count + 1]
}

impl Pieces {
    fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        let vocab = tokenizer.get_vocab(true);
        let count = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let added = tokenizer.get_added_tokens_decoder();
        let byte_of = byte_alphabet();
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for id in 0..count as u32 {
            let hidden = added.get(&id).is_some_and(|token| token.special);
            if let Some(name) = tokenizer.id_to_token(id).filter(|_| !hidden) {
                let decoded: Option<Vec<u8>> =
                    name.chars().map(|c| *byte_of.get(c as usize)?).collect();
                // An added token with a character outside the alphabet stands for itself.
                bytes.extend(decoded.unwrap_or_else(|| name.into_bytes()));
            }
            starts.push(bytes.len() as u32);
        }
        Self { bytes, starts }
    }

    fn count(&self) -> usize {
        self.starts.len() - 1
    }

    /// Empty for special tokens and for ids that the vocabulary does not have.
    fn bytes(&self, token: TokenId) -> &[u8] {
        let id = token.0 as usize;
        match id < self.count() {
            true => &self.bytes[self.starts[id] as usize..self.starts[id + 1] as usize],
            false => &[],
        }
    }
}

/// The byte that each character of GPT-2's printable alphabet stands for, by code point.
///
/// Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100.
fn byte_alphabet() -> Vec<Option<u8>> {
    let mut byte_of = vec![None; 0x200];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let code = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => usize::from(byte),
            _ => {
                next += 1;
                next - 1
            }
        };
        byte_of[code] = Some(byte);
    }
    byte_of
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// 256 single bytes, then `add`ed tokens: `<end>` special, `<think>` and one with a space not.
    fn bytes_only() -> Tokenizer {
        let mut names = vec![String::new(); 256];
        for (code, byte) in byte_alphabet().into_iter().enumerate() {
            if let Some(byte) = byte {
                names[usize::from(byte)] = char::from_u32(code as u32).unwrap().to_string();
            }
        }
        let vocab: serde_json::Map<_, _> =
            names.into_iter().zip(0..).map(|(name, id)| (name, json!(id))).collect();
        let added = |id: u32, content: &str, special: bool| {
            json!({ "id": id, "content": content, "special": special, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false })
        };
        let file = json!({
            "version": "1.0",
            "added_tokens": [added(256, "<end>", true), added(257, "<think>", false),
                             added(258, "a b", false)],
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false,
                               "trim_offsets": true, "use_regex": false },
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                         "use_regex": true },
            "truncation": { "max_length": 2, "strategy": "LongestFirst", "stride": 0,
                            "direction": "Right" },
            "model": { "type": "BPE", "vocab": vocab, "merges": [] }
        });
        Tokenizer::from_json(file.to_string().as_bytes()).unwrap()
    }

    fn ids(list: &[u32]) -> Vec<TokenId> {
        list.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn special_tokens_in_the_text_are_recognised_and_none_is_added() {
        let tokenizer = bytes_only();
        assert_eq!(tokenizer.encode("A<end>B").unwrap(), ids(&[65, 256, 66]));
        assert_eq!(tokenizer.encode("").unwrap(), []);
        assert_eq!(tokenizer.count(), 259);
        assert_eq!(tokenizer.id("<think>"), Some(TokenId(257)));
        assert_eq!(tokenizer.id("<absent>"), None);
    }

    #[test]
    fn a_truncation_in_the_file_does_not_shorten_a_prompt() {
        assert_eq!(bytes_only().encode("abcdef").unwrap().len(), 6);
    }

    #[test]
    fn special_and_unknown_ids_decode_to_nothing_others_to_their_text() {
        let tokenizer = bytes_only();
        assert_eq!(tokenizer.decode(&ids(&[65, 256, 9999, 257, 258])), "A<think>a b");
        let bytes = [65, 256, 9999, 258].map(|id| tokenizer.byte_count(TokenId(id)));
        assert_eq!(bytes, [1, 5, 0, 3]);
    }

    #[test]
    fn a_character_is_held_back_until_it_is_whole() {
        let tokenizer = bytes_only();
        let mut stream = tokenizer.stream();
        let parts: Vec<String> =
            [0xF0, 0x9F, 0x98, 0x80, 0x41].iter().map(|&b| stream.push(TokenId(b))).collect();
        assert_eq!(parts, ["", "", "", "\u{1F600}", "A"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn broken_bytes_become_replacement_characters_at_once() {
        let tokenizer = bytes_only();
        let mut stream = tokenizer.stream();
        assert_eq!(stream.push(TokenId(0xE2)), "");
        assert_eq!(stream.push(TokenId(0x41)), "\u{FFFD}A");
        assert_eq!(stream.push(TokenId(0xFF)), "\u{FFFD}");
        assert_eq!(stream.push(TokenId(0xC3)), "");
        assert_eq!(stream.finish(), "\u{FFFD}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let Err(error) = Tokenizer::open(dir.path()) else { panic!("opened nothing") };
        assert!(error.to_string().contains("tokenizer.json is missing"), "{error}");
        std::fs::write(dir.path().join(TOKENIZER_FILE), "{").unwrap();
        let Err(error) = Tokenizer::open(dir.path()) else { panic!("opened rubbish") };
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }

    #[test]
    fn a_vocabulary_that_is_not_byte_level_is_refused() {
        let file = json!({ "version": "1.0", "added_tokens": [], "decoder": null,
                           "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [] } });
        let Err(error) = Tokenizer::from_json(file.to_string().as_bytes()) else {
            panic!("accepted a decoder that is absent")
        };
        assert!(error.to_string().contains("not byte-level"), "{error}");
    }

    proptest! {
        #[test]
        fn streamed_text_equals_the_lossy_text_of_all_bytes(bytes: Vec<u8>) {
            let tokens: Vec<TokenId> = bytes.iter().map(|&b| TokenId(u32::from(b))).collect();
            prop_assert_eq!(bytes_only().decode(&tokens), String::from_utf8_lossy(&bytes));
        }
    }
}
