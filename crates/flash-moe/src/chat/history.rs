//! What was typed in earlier messages, across runs, and the search through it.
//!
//! One JSON string a line, appended as it is sent, so that two chats at once lose nothing. The file is
//! a convenience: one that cannot be read or written never keeps anybody from chatting.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::private;

/// Entries that are kept.
const ENTRIES_MAX: usize = 2000;
/// A longer message is not remembered.
const ENTRY_BYTES_MAX: usize = 64 << 10;

/// The entries, the oldest first, and where in them the user is.
#[derive(Default)]
pub struct History {
    entries: Vec<String>,
    path: Option<PathBuf>,
    at: Option<usize>, // the entry that is shown
    draft: String,     // what had been typed before looking back
}

/// A search backwards for the latest entry that has a text in it.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Search {
    pub wanted: String,
    found: Option<usize>,
}

impl Search {
    /// A search from the latest entry on.
    pub fn of(wanted: String) -> Self {
        Self { wanted, found: None }
    }
}

impl History {
    /// What the file has; nothing if there is none.
    pub fn open(path: Option<PathBuf>) -> Self {
        let text = path.as_ref().and_then(|path| fs::read_to_string(path).ok());
        // Without a file there is no history yet.
        let text = text.unwrap_or_default();
        // A line that another version wrote is no entry.
        let entries = text.lines().filter_map(|line| serde_json::from_str::<String>(line).ok());
        let mut entries: Vec<String> = entries.collect();
        let surplus = entries.len().saturating_sub(ENTRIES_MAX);
        if surplus > ENTRIES_MAX / 2 {
            let kept = entries[surplus..].iter().map(|entry| line(entry)).collect::<String>();
            // The old file is as good.
            path.iter().for_each(|path| private::replace(path, kept.as_bytes()).unwrap_or(()));
        }
        entries.drain(..surplus);
        Self { entries, path, ..Self::default() }
    }

    /// Remembers a message, unless it is the last one again.
    ///
    /// # Errors
    /// The file cannot be written; the entry is there all the same.
    pub fn add(&mut self, entry: &str) -> io::Result<()> {
        self.at = None;
        let is_known = self.entries.last().is_some_and(|last| last == entry);
        if entry.trim().is_empty() || is_known || entry.len() > ENTRY_BYTES_MAX {
            return Ok(());
        }
        self.entries.push(entry.into());
        match &self.path {
            Some(path) => private::append(path, line(entry).as_bytes()),
            None => Ok(()),
        }
    }

    /// The entry before the one that is shown; `typed` is what stands in the editor.
    pub fn back(&mut self, typed: &str) -> Option<&str> {
        let at = self.at.unwrap_or(self.entries.len()).checked_sub(1)?;
        if self.at.is_none() {
            self.draft = typed.into();
        }
        self.at = Some(at);
        self.entries.get(at).map(String::as_str)
    }

    /// The entry behind the one that is shown, at last what had been typed.
    pub fn forth(&mut self) -> Option<&str> {
        let at = self.at? + 1;
        self.at = (at < self.entries.len()).then_some(at);
        Some(self.entries.get(at).unwrap_or(&self.draft))
    }

    /// Looks for the text from the latest entry back, or from the one before the last find.
    pub fn search(&self, search: &mut Search, again: bool) -> Option<&str> {
        let end = match search.found {
            Some(found) if again => found,
            Some(found) => found + 1,
            None => self.entries.len(),
        };
        let wanted = search.wanted.to_lowercase();
        let has = |entry: &String| entry.to_lowercase().contains(&wanted);
        let found = self.entries[..end.min(self.entries.len())].iter().rposition(has);
        search.found = found.or(search.found.filter(|_| again));
        search.found.map(|found| self.entries[found].as_str())
    }
}

fn line(entry: &str) -> String {
    format!("{}\n", serde_json::Value::from(entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(entries: &[&str]) -> History {
        let entries = entries.iter().map(ToString::to_string).collect();
        History { entries, ..History::default() }
    }

    #[test]
    fn entries_survive_and_are_walked_through_to_the_draft() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        let mut first = History::open(Some(path.clone()));
        for entry in ["one", "two\nlines", "two\nlines", "  "] {
            first.add(entry).unwrap();
        }
        fs::write(&path, fs::read_to_string(&path).unwrap() + "{not json\n").unwrap();
        let mut history = History::open(Some(path));
        assert_eq!(history.back("dra"), Some("two\nlines"));
        assert_eq!(history.back("two\nlines"), Some("one"));
        assert_eq!(history.back("one"), None);
        assert_eq!(history.forth(), Some("two\nlines"));
        assert_eq!(history.forth(), Some("dra"));
        assert_eq!(history.forth(), None);
    }

    #[test]
    fn a_search_finds_the_latest_and_goes_back_from_there() {
        let history = history(&["Alpha", "beta", "alphabet"]);
        let mut search = Search { wanted: "ALPHA".into(), ..Search::default() };
        assert_eq!(history.search(&mut search, false), Some("alphabet"));
        search.wanted.push('b');
        assert_eq!(history.search(&mut search, false), Some("alphabet"));
        search.wanted.pop();
        assert_eq!(history.search(&mut search, true), Some("Alpha"));
        assert_eq!(history.search(&mut search, true), Some("Alpha"));
        search.wanted = "zzz".into();
        assert_eq!(history.search(&mut search, false), None);
    }

    #[test]
    fn a_file_that_has_grown_too_long_is_shortened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        let all: String = (0..2 * ENTRIES_MAX).map(|n| line(&n.to_string())).collect();
        fs::write(&path, all).unwrap();
        let history = History::open(Some(path.clone()));
        assert_eq!(history.entries.len(), ENTRIES_MAX);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), ENTRIES_MAX);
    }
}
