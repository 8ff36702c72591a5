//! Which key does what: the one table from a terminal's keys to the chat's own actions.
//!
//! The habits are those of a shell's line editor. A terminal cannot tell all keys apart, so each
//! action has one that every terminal sends.

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::editor::Edit;

/// What a key asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    Edit(Edit),
    /// Send the text, or start a new line behind a backslash.
    Enter,
    NewLine,
    Up,
    Down,
    Earlier,
    Later,
    Search,
    Complete,
    /// Ctrl-C.
    Stop,
    /// Ctrl-D: leave, or remove what is behind the cursor.
    Leave,
    /// Escape.
    Cancel,
    Redraw,
    Suspend,
    /// Ctrl-X: the user's own editor.
    External,
}

/// The action of a key; `None` where it has none.
pub fn action(key: KeyEvent) -> Option<Action> {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let alt = key.modifiers.contains(KeyModifiers::ALT);
    let shift = key.modifiers.contains(KeyModifiers::SHIFT);
    let edit = |edit| Some(Action::Edit(edit));
    match key.code {
        KeyCode::Enter if alt || shift || control => Some(Action::NewLine),
        KeyCode::Enter => Some(Action::Enter),
        KeyCode::Tab => Some(Action::Complete),
        KeyCode::Esc => Some(Action::Cancel),
        KeyCode::Up => Some(Action::Up),
        KeyCode::Down => Some(Action::Down),
        KeyCode::Left if control || alt => edit(Edit::WordLeft),
        KeyCode::Right if control || alt => edit(Edit::WordRight),
        KeyCode::Left => edit(Edit::Left),
        KeyCode::Right => edit(Edit::Right),
        KeyCode::Home if control => edit(Edit::Start),
        KeyCode::End if control => edit(Edit::End),
        KeyCode::Home => edit(Edit::LineStart),
        KeyCode::End => edit(Edit::LineEnd),
        KeyCode::Backspace if control || alt => edit(Edit::KillWordBack),
        KeyCode::Backspace => edit(Edit::Backspace),
        KeyCode::Delete if control || alt => edit(Edit::KillWord),
        KeyCode::Delete => edit(Edit::Delete),
        KeyCode::Char(c) if control => control_action(c.to_ascii_lowercase()),
        KeyCode::Char(c) if alt => match c.to_ascii_lowercase() {
            'b' => edit(Edit::WordLeft),
            'f' => edit(Edit::WordRight),
            'd' => edit(Edit::KillWord),
            '<' => edit(Edit::Start),
            '>' => edit(Edit::End),
            _ => None,
        },
        KeyCode::Char(c) => edit(Edit::Insert(c.to_string())),
        _ => None,
    }
}

fn control_action(c: char) -> Option<Action> {
    Some(match c {
        'a' => Action::Edit(Edit::LineStart),
        'b' => Action::Edit(Edit::Left),
        'c' => Action::Stop,
        'd' => Action::Leave,
        'e' => Action::Edit(Edit::LineEnd),
        'f' => Action::Edit(Edit::Right),
        'g' => Action::Cancel,
        'h' => Action::Edit(Edit::Backspace),
        'j' => Action::NewLine,
        'k' => Action::Edit(Edit::KillToEnd),
        'l' => Action::Redraw,
        'm' => Action::Enter,
        'n' => Action::Later,
        'p' => Action::Earlier,
        'r' => Action::Search,
        'u' => Action::Edit(Edit::KillToStart),
        'w' => Action::Edit(Edit::KillWordBack),
        'x' => Action::External,
        'y' => Action::Edit(Edit::Yank),
        'z' => Action::Suspend,
        // Terminals send one byte for these three.
        '_' | '/' | '7' => Action::Edit(Edit::Undo),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_action_and_others_none() {
        let got = |code, modifiers| action(KeyEvent::new(code, modifiers));
        let (control, alt, none) = (KeyModifiers::CONTROL, KeyModifiers::ALT, KeyModifiers::NONE);
        let insert = |text: &str| Some(Action::Edit(Edit::Insert(text.into())));
        assert_eq!(got(KeyCode::Enter, none), Some(Action::Enter));
        assert_eq!(got(KeyCode::Enter, alt), Some(Action::NewLine));
        assert_eq!(got(KeyCode::Char('j'), control), Some(Action::NewLine));
        assert_eq!(got(KeyCode::Char('C'), control), Some(Action::Stop));
        assert_eq!(got(KeyCode::Char('X'), KeyModifiers::SHIFT), insert("X"));
        assert_eq!(got(KeyCode::Char('x'), alt), None);
        assert_eq!(got(KeyCode::Char('q'), control), None);
        assert_eq!(got(KeyCode::F(5), none), None);
        assert_eq!(got(KeyCode::Left, control), Some(Action::Edit(Edit::WordLeft)));
    }
}
