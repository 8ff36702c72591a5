//! Answers in a file, a line for each as it is given.
//!
//! Owns the files `turns-OWNER.log` of a state directory, of which a process uses the one whose OWNER stands
//! for its model and settings: a first line that says the same in full, then one JSON line an answer, each
//! behind its checksum. Lines are only appended, so a process that is killed loses no more than the
//! line it was writing; a file that has grown too far, or was damaged, is written anew from the
//! answers that are remembered. Nothing here is ever an error of a request.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flash_moe_engine::session::Identity;
use xxhash_rust::xxh3::xxh3_64;

use super::state_dir::remove_damaged;
use crate::convert::files::write_whole;
use crate::serve::log;
use crate::serve::turns::{Turn, Turns};

/// Bytes beyond what is remembered at which the file is written anew.
const GROWTH_MAX: usize = 16 << 20;
/// Hexadecimal digits of a line's checksum.
const SUM_DIGITS: usize = 16;

/// The file.
pub struct TurnLog {
    path: PathBuf,
    owner: String,
    file: Option<File>, // none: it is to be written anew
    grown: usize,       // bytes since it was
    is_closed: bool,    // it is not touched
}

impl TurnLog {
    /// Reads what there is into `turns`. A file that is damaged is removed with a warning; one that
    /// cannot be read is left alone, and then nothing is written either.
    pub fn open(dir: &Path, turns: &Turns, owner: &Identity) -> Self {
        let owner = serde_json::to_string(owner).expect("numbers and texts have a JSON form");
        let path = dir.join(format!("turns-{:016x}.log", xxh3_64(owner.as_bytes())));
        let mut log = Self { path, owner, file: None, grown: 0, is_closed: false };
        let bytes = match std::fs::read(&log.path) {
            Ok(bytes) => bytes,
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    log.is_closed = true;
                    let why = "answers are neither known from before nor kept on disk";
                    log::note(&format!("warning: {}: {error}; {why}", log.path.display()));
                }
                return log;
            }
        };
        let text = String::from_utf8(bytes).context("is no text");
        if let Err(error) = text.and_then(|text| log.take(&text, turns)) {
            remove_damaged(&log.path, &error);
        }
        log
    }

    /// Adds answers; `all` are those that are remembered, these among them. What goes wrong is a
    /// warning, and the file is written anew the next time.
    pub fn append(&mut self, turns: &[Turn], all: &Turns) {
        if self.is_closed {
            return;
        }
        let file = self.file.take().filter(|_| self.grown < GROWTH_MAX);
        let written = match file {
            Some(file) => self.extend(file, turns),
            None => self.rewrite(&all.list()),
        };
        if let Err(error) = written {
            log::note(&format!("warning: answers are not kept on disk: {error:#}"));
        }
    }

    fn take(&mut self, text: &str, turns: &Turns) -> Result<()> {
        let mut lines = text.split_inclusive('\n');
        let owner = checked(lines.next().unwrap_or("")).context("is no file of answers")?;
        ensure!(owner == self.owner, "holds the answers of another model");
        let (mut damaged, mut is_cut) = (0, false);
        for line in lines {
            // A process that was killed leaves the beginning of a line.
            is_cut = !line.ends_with('\n');
            match checked(line).and_then(|json| Ok(serde_json::from_str(json)?)) {
                Ok(turn) => turns.record(turn),
                Err(_) if is_cut => {}
                Err(_) => damaged += 1,
            }
        }
        if damaged > 0 {
            let path = self.path.display();
            log::note(&format!("warning: {path}: {damaged} answers are damaged and left out"));
        } else if !is_cut {
            // One that cannot be opened is written anew.
            self.file = File::options().append(true).open(&self.path).ok();
            self.grown = text.len().saturating_sub(self.text_of(&turns.list()).len());
        }
        Ok(())
    }

    fn extend(&mut self, mut file: File, turns: &[Turn]) -> Result<()> {
        let mut text = String::new();
        turns.iter().for_each(|turn| push_turn(&mut text, turn));
        let named = || self.path.display().to_string();
        file.write_all(text.as_bytes()).with_context(named)?;
        file.sync_data().with_context(named)?;
        self.grown += text.len();
        self.file = Some(file);
        Ok(())
    }

    fn rewrite(&mut self, turns: &[Turn]) -> Result<()> {
        write_whole(&self.path, self.text_of(turns).as_bytes())?;
        self.grown = 0;
        self.file = Some(File::options().append(true).open(&self.path)?);
        Ok(())
    }

    /// The file of these answers.
    fn text_of(&self, turns: &[Turn]) -> String {
        let mut text = String::new();
        push_line(&mut text, &self.owner);
        turns.iter().for_each(|turn| push_turn(&mut text, turn));
        text
    }
}

fn push_turn(text: &mut String, turn: &Turn) {
    push_line(text, &serde_json::to_string(turn).expect("numbers and texts have a JSON form"));
}

fn push_line(text: &mut String, json: &str) {
    let sum = xxh3_64(json.as_bytes());
    writeln!(text, "{sum:0SUM_DIGITS$x} {json}").expect("writing to a string does not fail");
}

/// The JSON of a whole line.
fn checked(line: &str) -> Result<&str> {
    let line = line.strip_suffix('\n').context("is cut off")?;
    let (sum, json) = line.split_once(' ').context("has no checksum")?;
    ensure!(sum == format!("{:0SUM_DIGITS$x}", xxh3_64(json.as_bytes())), "is damaged");
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::turns::{Before, Said};

    fn owner(model: &str) -> Identity {
        Identity {
            model: model.into(),
            attention: String::new(),
            activations: String::new(),
            kv_cache: String::new(),
            experts_per_token: 2,
        }
    }

    fn turn(number: u32) -> Turn {
        let said = Said { content: format!("answer {number}\n"), ..Said::default() };
        Turn { before: Before::new(&[], "prompt"), said, tokens: vec![number; 3] }
    }

    fn opened(dir: &Path, model: &str) -> (TurnLog, Turns) {
        let turns = Turns::default();
        (TurnLog::open(dir, &turns, &owner(model)), turns)
    }

    fn append(log: &mut TurnLog, all: &Turns, numbers: impl Iterator<Item = u32>) {
        for turn in numbers.map(turn) {
            all.record(turn.clone());
            log.append(&[turn], all);
        }
    }

    #[test]
    fn answers_are_there_after_any_end_but_for_what_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, all) = opened(dir.path(), "a");
        append(&mut log, &all, 0..4);
        let whole = std::fs::read(&log.path).unwrap();
        let line = whole.len() - 1;
        for (cut, flipped, expected) in [
            (line, None, vec![0, 1, 2]),
            (line + 1, Some(line - 9), vec![0, 1, 2]),
            (line + 1, None, vec![0, 1, 2, 3]),
            (20, None, vec![]),
            (0, None, vec![]),
        ] {
            let mut bytes = whole[..cut].to_vec();
            flipped.into_iter().for_each(|at: usize| bytes[at] ^= 1);
            std::fs::write(&log.path, bytes).unwrap();
            let (mut log, all) = opened(dir.path(), "a");
            let mut expected: Vec<Turn> = expected.into_iter().map(turn).collect();
            assert_eq!(all.list(), expected, "{cut} {flipped:?}");
            append(&mut log, &all, 9..10);
            expected.push(turn(9));
            assert_eq!(opened(dir.path(), "a").1.list(), expected, "{cut} {flipped:?}");
        }
    }

    #[test]
    fn models_have_files_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        for model in ["a", "b"] {
            let (mut log, all) = opened(dir.path(), model);
            assert_eq!(all.list(), []);
            append(&mut log, &all, 0..2);
        }
        for model in ["a", "b"] {
            assert_eq!(opened(dir.path(), model).1.list(), [turn(0), turn(1)]);
        }
    }

    #[test]
    fn a_file_that_has_grown_is_written_anew_in_whatever_run() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, all) = opened(dir.path(), "a");
        append(&mut log, &all, 0..2);
        let bytes = || std::fs::metadata(&log.path).unwrap().len() as usize;
        let short = bytes();
        // The same answers again and again, in one run and another.
        let mut text = std::fs::read_to_string(&log.path).unwrap();
        let lines = text.split_once('\n').unwrap().1.to_string();
        while text.len() < short + GROWTH_MAX {
            text += &lines;
        }
        std::fs::write(&log.path, text).unwrap();
        let (mut log, all) = opened(dir.path(), "a");
        assert_eq!(all.list(), [turn(0), turn(1)]);
        append(&mut log, &all, 1..3);
        assert!(bytes() < 2 * short, "{} of {short}", bytes());
        assert_eq!(opened(dir.path(), "a").1.list(), all.list());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = opened(dir.path(), "a").0.path;
        std::fs::create_dir(&path).unwrap();
        let (mut log, all) = opened(dir.path(), "a");
        append(&mut log, &all, 0..1);
        assert!(path.is_dir());
    }
}
