//! Slash commands: their names, their arguments, help and completion.
//!
//! One table says all of it. A line that begins with one slash is a command or an error, never a
//! message; two slashes begin a message that begins with one. Does nothing itself.

use std::path::{Path, PathBuf};

/// A command that was typed.
#[derive(Clone, PartialEq, Debug)]
pub enum Command {
    Help,
    New,
    Sessions,
    Resume(String),
    Save(String),
    Export(PathBuf),
    System(Option<String>),
    Model(Option<String>),
    Set(Option<(String, String)>),
    Think(Option<Think>),
    Stats,
    Tools(Option<String>),
    Copy,
    Undo,
    Retry,
    Edit,
    Read(PathBuf),
    Quit,
}

/// What `/think` is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Think {
    /// Ask the model to think, or not to, or leave it to the template.
    Ask(Option<bool>),
    /// Show thinking as it comes, or fold it.
    Show(bool),
}

/// Name, arguments, what it does.
pub const COMMANDS: [(&str, &str, &str); 18] = [
    ("/help", "", "this list, and the keys"),
    ("/new", "", "start a new conversation; this one stays among the sessions"),
    ("/sessions", "", "list the conversations that can be resumed"),
    ("/resume", "[ID]", "go on with a conversation, the latest without an ID"),
    ("/save", "NAME", "name this conversation"),
    ("/export", "FILE", "write it as Markdown, or as JSON to a FILE.json"),
    ("/system", "[TEXT]", "set the system prompt; show it without TEXT; - removes it"),
    ("/model", "[NAME]", "show the model, or switch to another"),
    ("/set", "[NAME VALUE]", "set temperature and others; list them without NAME"),
    (
        "/think",
        "[HOW]",
        "show the last thinking; HOW: on, off or auto to think, show or fold it as it comes",
    ),
    ("/stats", "", "tokens, speeds, cache and memory"),
    ("/tools", "[SERVER]", "list tools and MCP servers, or all that is known of one server"),
    ("/copy", "", "copy the last answer (OSC 52)"),
    ("/undo", "", "take the last question and its answer back"),
    ("/retry", "", "answer the last question again"),
    ("/edit", "", "write the message in $VISUAL or $EDITOR"),
    ("/read", "FILE", "send a text file along with the next message"),
    ("/quit", "", "leave"),
];

/// The settings that `/set` knows.
pub const SETTINGS: [&str; 10] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "think_budget",
];

/// What a typed text is.
#[derive(Clone, PartialEq, Debug)]
pub enum Typed {
    /// A message to the model.
    Message(String),
    /// A command.
    Command(Command),
    /// A command that is none, with what to do.
    Wrong(String),
}

/// Tells messages and commands apart.
pub fn typed(text: &str) -> Typed {
    if let Some(message) = text.strip_prefix("//") {
        return Typed::Message(format!("/{message}"));
    }
    if !text.starts_with('/') {
        return Typed::Message(text.into());
    }
    let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    match command(name, rest.trim()) {
        Ok(command) => Typed::Command(command),
        Err(why) => Typed::Wrong(why),
    }
}

fn command(name: &str, rest: &str) -> Result<Command, String> {
    let some = (!rest.is_empty()).then(|| rest.to_string());
    let needed = |what: &str| some.clone().ok_or_else(|| format!("{name} needs {what}"));
    let known = match name {
        "/help" | "/?" => Command::Help,
        "/new" | "/clear" => Command::New,
        "/sessions" => Command::Sessions,
        "/resume" => Command::Resume(rest.into()),
        "/save" => Command::Save(needed("a name")?),
        "/export" => Command::Export(needed("a file")?.into()),
        "/system" => Command::System(some),
        "/model" => Command::Model(some),
        "/set" => Command::Set(setting(rest)?),
        "/think" => Command::Think(think(rest)?),
        "/stats" => Command::Stats,
        "/tools" => Command::Tools(some),
        "/copy" => Command::Copy,
        "/undo" => Command::Undo,
        "/retry" => Command::Retry,
        "/edit" => Command::Edit,
        "/read" => Command::Read(needed("a file")?.into()),
        "/quit" | "/exit" | "/q" => Command::Quit,
        _ => return Err(unknown(name)),
    };
    let takes_none =
        COMMANDS.iter().any(|(known, arguments, _)| *known == name && arguments.is_empty());
    match takes_none && !rest.is_empty() {
        true => Err(format!("{name} takes nothing behind it, got {rest:?}")),
        false => Ok(known),
    }
}

fn unknown(name: &str) -> String {
    let begins = |known: &&str| known.starts_with(&name[..name.len().min(3)]);
    let names = COMMANDS.map(|(name, _, _)| name);
    let near: Vec<&str> =
        names.iter().filter(|known| name.is_ascii() && begins(known)).copied().collect();
    let meant =
        if near.is_empty() { "/help lists them".into() } else { format!("{}?", near.join(", ")) };
    format!("{name} is no command; {meant} A message that begins with / is typed with //")
}

fn setting(rest: &str) -> Result<Option<(String, String)>, String> {
    if rest.is_empty() {
        return Ok(None);
    }
    let (name, value) = rest.split_once([' ', '=']).unwrap_or((rest, ""));
    let (name, value) = (name.trim().replace('-', "_"), value.trim());
    if !SETTINGS.contains(&name.as_str()) {
        return Err(format!("there is no setting {name:?}; there are {}", SETTINGS.join(", ")));
    }
    if value.is_empty() {
        return Err(format!("/set {name} needs a value; \"default\" takes the model's own"));
    }
    Ok(Some((name, value.into())))
}

fn think(rest: &str) -> Result<Option<Think>, String> {
    Ok(Some(match rest {
        "" => return Ok(None),
        "on" => Think::Ask(Some(true)),
        "off" => Think::Ask(Some(false)),
        "auto" => Think::Ask(None),
        "show" => Think::Show(true),
        "fold" | "hide" => Think::Show(false),
        other => return Err(format!("/think {other}: expected on, off, auto, show or fold")),
    }))
}

/// What the text before the cursor may become, whole texts in order.
///
/// `names` are those that the command may name: sessions, servers.
pub fn completions(text: &str, names: &[String]) -> Vec<String> {
    if !text.starts_with('/') || text.contains('\n') {
        return Vec::new();
    }
    let Some((name, rest)) = text.split_once(' ') else {
        let known = COMMANDS.iter().filter(|(name, _, _)| name.starts_with(text));
        let with_space = |(name, arguments, _): &(&str, &str, &str)| {
            format!("{name}{}", if arguments.is_empty() { "" } else { " " })
        };
        return known.map(with_space).collect();
    };
    let words: Vec<String> = match name {
        "/resume" | "/tools" => names.to_vec(),
        "/set" => SETTINGS.map(|name| format!("{name} ")).to_vec(),
        "/think" => ["on", "off", "auto", "show", "fold"].map(String::from).to_vec(),
        "/read" | "/export" | "/model" => return files(name, rest),
        _ => Vec::new(),
    };
    let fitting = words.into_iter().filter(|word| word.starts_with(rest) && word != rest);
    fitting.map(|word| format!("{name} {word}")).collect()
}

/// Files and directories that begin with what was typed of a path.
fn files(name: &str, typed: &str) -> Vec<String> {
    let (dir, beginning) = match typed.rfind('/') {
        Some(at) => typed.split_at(at + 1),
        None => ("", typed),
    };
    let place = if dir.is_empty() { Path::new(".") } else { Path::new(dir) };
    // What cannot be listed completes nothing.
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    let mut found: Vec<String> = entries
        .filter_map(|entry| {
            let file = entry.file_name().into_string().ok()?;
            let hidden = file.starts_with('.') && !beginning.starts_with('.');
            let slash = if entry.path().is_dir() { "/" } else { "" };
            let fits = file.starts_with(beginning) && !hidden;
            fits.then(|| format!("{name} {dir}{file}{slash}"))
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_in_the_table_is_understood() {
        for (name, arguments, _) in COMMANDS {
            let argument = match (name, arguments) {
                (_, "") => "",
                ("/set", _) => " top_k 5",
                ("/think", _) => " on",
                _ => " x",
            };
            let got = typed(&format!("{name}{argument}"));
            assert!(matches!(got, Typed::Command(_)), "{name}: {got:?}");
        }
    }

    #[test]
    fn commands_messages_and_mistakes_are_told_apart() {
        use Command::*;
        let set = |name: &str, value: &str| Set(Some((name.into(), value.into())));
        for (text, expected) in [
            ("/set temperature 0.6", set("temperature", "0.6")),
            ("/set top-p=0.9", set("top_p", "0.9")),
            ("/resume", Resume(String::new())),
            ("/system  Be brief. ", System(Some("Be brief.".into()))),
            ("/think", Think(None)),
            ("/read a b.txt", Read("a b.txt".into())),
        ] {
            assert_eq!(typed(text), Typed::Command(expected), "{text}");
        }
        assert_eq!(typed("//etc is a directory"), Typed::Message("/etc is a directory".into()));
        assert_eq!(typed("a /b"), Typed::Message("a /b".into()));
        for (text, expected) in [
            ("/reed x", "/resume, /retry, /read?"),
            ("/\u{e9}t\u{e9}", "/help lists them"),
            ("/save", "needs a name"),
            ("/set warmth 3", "no setting \"warmth\""),
            ("/set seed", "needs a value"),
            ("/think hard", "expected on"),
            ("/undo 3", "takes nothing"),
        ] {
            let Typed::Wrong(why) = typed(text) else { panic!("{text}: {:?}", typed(text)) };
            assert!(why.contains(expected), "{text}: {why}");
        }
    }

    #[test]
    fn completion_knows_names_arguments_and_files() {
        assert_eq!(completions("/re", &[]), ["/resume ", "/retry", "/read "]);
        assert_eq!(completions("/set top", &[]), ["/set top_p ", "/set top_k "]);
        assert_eq!(completions("/resume 20", &["2026a".into(), "1999".into()]), ["/resume 2026a"]);
        assert_eq!(completions("hello /re", &[]), Vec::<String>::new());
        let dir = tempfile::tempdir().unwrap();
        for name in ["alpha.txt", "alpine", ".hidden", "beta"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::fs::create_dir(dir.path().join("alps")).unwrap();
        let base = format!("/read {}/", dir.path().display());
        let expected = ["alpha.txt", "alpine", "alps/"].map(|file| format!("{base}{file}"));
        assert_eq!(completions(&format!("{base}al"), &[]), expected);
    }
}
