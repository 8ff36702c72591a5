//! The generated text on its way out: thinking apart from the answer, stop texts cut off.
//!
//! Text is written as soon as nothing later can change it. What might be the beginning of a stop
//! text is held back until it is one or cannot become one. Thinking is dimmed on a terminal,
//! between its tags elsewhere, and left out when only the answer is wanted.

use std::io::{self, Write};

use flash_moe_engine::reply::longest_beginning;
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::tokenizer::{TokenStream, Tokenizer};

use super::thinking::Turn;

/// What of the text is written as it comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Show {
    /// Nothing: it is only kept.
    Nothing,
    /// The answer without the thinking.
    Answer,
    /// Thinking between `<think>` and `</think>`, then the answer.
    Tagged,
    /// Thinking in dim letters, then the answer.
    Dimmed,
}

/// The text so far.
pub struct Answer<'a, W: Write> {
    out: W,
    show: Show,
    decoder: Decoder<'a>,
    stops: &'a [String],
    held: String, // may begin a stop text
    text: String,
    thinking: String,
    stopped: bool,
    section: Option<usize>, // where in `thinking` the section that is not yet shown begins
    blank: bool,            // the thinking has closed and the answer has not begun
    ends_line: bool,        // nothing, or a whole line, was written last
}

/// How tokens become text.
enum Decoder<'a> {
    Text(TokenStream<'a>),
    /// Without a vocabulary the text is the ids themselves.
    Ids,
}

impl<'a, W: Write> Answer<'a, W> {
    /// An empty text.
    pub fn new(out: W, show: Show, tokenizer: Option<&'a Tokenizer>, stops: &'a [String]) -> Self {
        let decoder = tokenizer.map_or(Decoder::Ids, |t| Decoder::Text(t.stream()));
        Self {
            out,
            show,
            decoder,
            stops,
            held: String::new(),
            text: String::new(),
            thinking: String::new(),
            stopped: false,
            section: Some(0),
            blank: false,
            ends_line: true,
        }
    }

    /// Takes the next token and what it is to the thinking.
    ///
    /// # Errors
    /// Writing failed.
    pub fn push(&mut self, token: TokenId, turn: Turn) -> io::Result<()> {
        match turn {
            Turn::Inside => {
                let piece = self.decode(token);
                self.think(&piece)
            }
            Turn::Outside => {
                let piece = self.decode(token);
                self.answer(&piece)
            }
            Turn::Opens => {
                let rest = self.rest();
                self.section = Some(self.thinking.len());
                self.answer(&rest)
            }
            Turn::Closes => {
                let rest = self.rest();
                self.think(&rest)?;
                self.close()
            }
        }
    }

    /// Whether a stop text was met.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Writes what was held back and ends the line; gives the answer, and the thinking without the
    /// white space around it.
    ///
    /// `inside` says that the text ended inside the thinking.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self, inside: bool) -> io::Result<(String, String)> {
        let rest = self.rest();
        if inside {
            self.think(&rest)?;
        } else {
            self.answer(&rest)?;
        }
        let held = std::mem::take(&mut self.held);
        self.emit(&held)?;
        if !self.ends_line {
            self.write("\n")?;
        }
        Ok((self.text, self.thinking.trim().to_string()))
    }

    fn decode(&mut self, token: TokenId) -> String {
        match &mut self.decoder {
            Decoder::Text(stream) => stream.push(token),
            Decoder::Ids if self.text.is_empty() && self.held.is_empty() => token.0.to_string(),
            Decoder::Ids => format!(" {}", token.0),
        }
    }

    /// An unfinished character that nothing will finish.
    fn rest(&mut self) -> String {
        match &mut self.decoder {
            Decoder::Text(stream) => stream.finish(),
            Decoder::Ids => String::new(),
        }
    }

    /// Thinking is shown from its first word on: a model may close it without having thought.
    fn think(&mut self, piece: &str) -> io::Result<()> {
        self.thinking.push_str(piece);
        let Some(start) = self.section else { return self.show_thought(piece) };
        let thought = self.thinking[start..].trim_start().to_string();
        if thought.is_empty() {
            return Ok(());
        }
        self.section = None;
        if self.show == Show::Tagged {
            self.write("<think>\n")?;
        }
        self.show_thought(&thought)
    }

    fn show_thought(&mut self, piece: &str) -> io::Result<()> {
        match self.show {
            // Each piece on its own, so that no way of ending leaves the terminal dim.
            Show::Dimmed if !piece.is_empty() => {
                self.write(&format!("\x1b[2m{piece}\x1b[22m"))?;
                self.ends_line = piece.ends_with('\n');
                Ok(())
            }
            Show::Tagged => self.write(piece),
            _ => Ok(()),
        }
    }

    fn answer(&mut self, piece: &str) -> io::Result<()> {
        let piece = if self.blank { piece.trim_start() } else { piece };
        if self.stopped || piece.is_empty() {
            return Ok(());
        }
        self.blank = false;
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop)).min();
        let ready = match found {
            Some(start) => self.held[..start].to_string(),
            None => {
                let safe = self.held.len() - longest_beginning(&self.held, self.stops);
                self.held.drain(..safe).collect()
            }
        };
        if found.is_some() {
            self.stopped = true;
            self.held.clear();
        }
        self.emit(&ready)
    }

    fn emit(&mut self, text: &str) -> io::Result<()> {
        self.text.push_str(text);
        if self.show == Show::Nothing { Ok(()) } else { self.write(text) }
    }

    /// Parts thinking and answer by a blank line, whatever the model wrote between them.
    fn close(&mut self) -> io::Result<()> {
        self.blank = true;
        if self.section.is_some() {
            return Ok(());
        }
        match self.show {
            Show::Tagged => self.write("</think>\n\n"),
            Show::Dimmed if self.ends_line => self.write("\n"),
            Show::Dimmed => self.write("\n\n"),
            _ => Ok(()),
        }
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.ends_line = text.ends_with('\n');
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds pieces of answer text and gives what was written after each, and the final text.
    fn written(pieces: &[&str], stops: &[&str]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut out = Vec::new();
        let mut answer = Answer::new(&mut out, Show::Answer, None, &stops);
        let mut seen = Vec::new();
        for piece in pieces {
            let before = answer.out.len();
            answer.answer(piece).unwrap();
            seen.push(String::from_utf8(answer.out[before..].to_vec()).unwrap());
        }
        let stopped = answer.is_stopped();
        let (text, _) = answer.finish(false).unwrap();
        assert_eq!(String::from_utf8(out).unwrap().trim_end_matches('\n'), text);
        (seen, text, stopped)
    }

    #[test]
    fn text_without_stops_comes_at_once() {
        let (seen, text, stopped) = written(&["He", "llo"], &[]);
        assert_eq!(
            (seen, text.as_str(), stopped),
            (vec!["He".into(), "llo".into()], "Hello", false)
        );
    }

    #[test]
    fn a_stop_text_is_found_across_tokens_and_cut_off() {
        let (seen, text, stopped) = written(&["one EN", "D", " two"], &["END"]);
        assert_eq!(seen, ["one ", "", ""]);
        assert_eq!((text.as_str(), stopped), ("one ", true));
    }

    #[test]
    fn what_only_began_like_a_stop_text_is_released() {
        let (seen, text, _) = written(&["a\u{e9}", "\n", "b\n", "\u{e9}"], &["\n\n", "\u{e9}x"]);
        assert_eq!(seen, ["a", "\u{e9}", "\nb", "\n"]);
        assert_eq!(text, "a\u{e9}\nb\n\u{e9}");
    }

    #[test]
    fn the_earliest_of_several_stop_texts_counts() {
        let (_, text, _) = written(&["abcdef"], &["ef", "cd"]);
        assert_eq!(text, "ab");
        let (_, text, stopped) = written(&["ENEND"], &["END"]);
        assert_eq!((text.as_str(), stopped), ("EN", true));
    }

    /// What a thought and an answer look like.
    fn shown(show: Show, thought: &str) -> (String, String, String) {
        let mut out = Vec::new();
        let mut answer = Answer::new(&mut out, show, None, &[]);
        for piece in ["\n", thought, "\n"] {
            answer.think(piece).unwrap();
        }
        answer.push(TokenId(9), Turn::Closes).unwrap();
        for piece in ["\n", "\n so", " it is"] {
            answer.answer(piece).unwrap();
        }
        let (text, thinking) = answer.finish(false).unwrap();
        (String::from_utf8(out).unwrap(), text, thinking)
    }

    #[test]
    fn thinking_is_dimmed_tagged_or_left_out() {
        for (show, expected) in [
            (Show::Nothing, ""),
            (Show::Answer, "so it is\n"),
            (Show::Tagged, "<think>\nhm\n</think>\n\nso it is\n"),
            (Show::Dimmed, "\x1b[2mhm\x1b[22m\x1b[2m\n\x1b[22m\nso it is\n"),
        ] {
            let expected = (expected.into(), "so it is".into(), "hm".into());
            assert_eq!(shown(show, "hm"), expected, "{show:?}");
        }
    }

    #[test]
    fn thinking_without_a_thought_is_not_shown() {
        for show in [Show::Answer, Show::Tagged, Show::Dimmed] {
            let expected = ("so it is\n".into(), "so it is".into(), String::new());
            assert_eq!(shown(show, "\n"), expected, "{show:?}");
        }
    }

    #[test]
    fn without_a_vocabulary_the_text_is_the_ids() {
        let mut answer = Answer::new(Vec::new(), Show::Answer, None, &[]);
        for id in [5, 0, 12] {
            answer.push(TokenId(id), Turn::Outside).unwrap();
        }
        assert_eq!(answer.finish(false).unwrap().0, "5 0 12");
    }
}
