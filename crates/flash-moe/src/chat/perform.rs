//! What the slash commands do, for the screen and the plain mode alike.
//!
//! A command changes the talk and says what is to be shown or done by whoever has the terminal.
//! Nothing is printed here.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flash_moe_engine::budget::gib;
use flash_moe_engine::chat_template::clock::strftime;
use flash_moe_engine::sampler::Sampling;
use serde_json::json;

use super::backend::{Backend, Settings};
use super::commands::{COMMANDS, Command, SETTINGS, Think};
use super::conversation::Arguments;
use super::private;
use super::sessions::Summary;
use super::talk::{Figures, Talk};
use super::view::grouped;
use crate::say;

/// Sessions that a list shows.
const SESSIONS_MAX: usize = 30;
/// What `/help` says of the keys.
const KEYS: [(&str, &str); 10] = [
    ("Enter", "send; Alt-Enter, Ctrl-J or a backslash at the end start a new line"),
    ("Ctrl-C", "stop the answer; with none coming, clear the line; twice leaves"),
    ("Ctrl-D", "leave, on an empty line"),
    ("Up, Down", "rows, and beyond them earlier messages; Ctrl-P, Ctrl-N messages at once"),
    ("Ctrl-R", "search earlier messages; again goes further back"),
    ("Tab", "complete a command, a setting, a session, a file"),
    ("Alt-B, -F, -D, Ctrl-W", "words: back, forth, kill forth, kill back"),
    ("Ctrl-A, -E, -U, -K, -Y", "line: start, end, kill to either, put back"),
    ("Ctrl-X, Ctrl-_", "open the text in your editor; undo typing"),
    ("Ctrl-L, Ctrl-Z", "clear the screen; suspend"),
];

/// What is left to do for whoever has the terminal.
#[derive(Debug)]
pub enum Effect {
    /// Show these lines.
    Say(Vec<String>),
    /// Show these names with what they mean.
    Explain(Vec<(String, String)>),
    /// An answer is coming.
    Asked,
    /// Put this text into the editor; show the line.
    Refill(String, String),
    /// Open the user's editor on what is typed.
    Edit,
    /// Give this text to the clipboard.
    Copy(String),
    /// Show this thinking.
    Thinking(String),
    /// Show thinking as it comes, or fold it.
    ShowThinking(bool),
    /// Another conversation is here: show it.
    Replay,
    /// Another model is being loaded.
    Loading(String),
    /// Leave.
    Quit,
}

fn say(line: impl Into<String>) -> Result<Effect> {
    Ok(Effect::Say(vec![line.into()]))
}

/// Does what a command says.
///
/// # Errors
/// It cannot be done; the words say why and what to do.
pub fn perform(talk: &mut Talk, command: Command) -> Result<Effect> {
    match command {
        Command::Help => Ok(Effect::Explain(help())),
        Command::New => {
            talk.start_anew()?;
            say("a new conversation; /resume goes back")
        }
        Command::Sessions => Ok(Effect::Say(listed(&talk.store.list()?))),
        Command::Resume(wanted) => talk.resume(&wanted).map(|()| Effect::Replay),
        Command::Save(name) => {
            talk.name(&name)?;
            say(format!("this conversation is called {name:?}"))
        }
        Command::Export(path) => export(talk, &path),
        Command::System(text) => system(talk, text),
        Command::Model(name) => model(talk, name),
        Command::Set(None) => Ok(Effect::Say(settings(&talk.settings))),
        Command::Set(Some((name, value))) => {
            ensure!(
                name != "think_budget" || !matches!(talk.backend, Backend::Remote(_)),
                "think_budget is about a model in this process; servers have no such setting"
            );
            talk.settings = set(&talk.settings, &name, &value)?;
            say(format!("{name} is {value}"))
        }
        Command::Think(wanted) => think(talk, wanted),
        Command::Stats => Ok(Effect::Say(stats(talk))),
        Command::Tools(server) => talk.tools.listed(server.as_deref()).map(Effect::Explain),
        Command::Copy => {
            let answer = talk.conversation.last_answer().context("there is no answer yet")?;
            Ok(Effect::Copy(answer.content.clone()))
        }
        Command::Undo => Ok(Effect::Refill(talk.undo()?, "taken back".into())),
        Command::Retry => talk.retry().map(|()| Effect::Asked),
        Command::Edit => Ok(Effect::Edit),
        Command::Read(path) => {
            let bytes = talk.attach(&path)?;
            let size = gib(bytes as u64);
            say(format!("{} ({size}) goes with the next message", path.display()))
        }
        Command::Quit => Ok(Effect::Quit),
    }
}

fn system(talk: &mut Talk, text: Option<String>) -> Result<Effect> {
    let Some(text) = text else {
        return say(talk.conversation.system.as_deref().unwrap_or("there is no system prompt"));
    };
    let system = Some(text).filter(|text| text != "-");
    let said = if system.is_some() { "the system prompt is set" } else { "no system prompt" };
    talk.set_system(system);
    say(said)
}

fn model(talk: &mut Talk, name: Option<String>) -> Result<Effect> {
    let Some(name) = name else {
        let place = talk.backend.place();
        let lines = [talk.backend.model()].into_iter().chain(place.lines());
        return Ok(Effect::Say(lines.map(String::from).collect()));
    };
    talk.switch(&name)?;
    Ok(Effect::Loading(name))
}

fn think(talk: &mut Talk, wanted: Option<Think>) -> Result<Effect> {
    match wanted {
        None => {
            let answer = talk.conversation.last_answer();
            let thinking = answer.map(|answer| answer.thinking.trim());
            let thinking = thinking.filter(|text| !text.is_empty());
            Ok(Effect::Thinking(thinking.context("the last answer had no thinking")?.into()))
        }
        Some(Think::Show(shown)) => Ok(Effect::ShowThinking(shown)),
        Some(Think::Ask(wanted)) => {
            talk.settings.thinking = wanted;
            say(match wanted {
                Some(true) => "the model is asked to think",
                Some(false) => "the model is asked not to think",
                None => "whether to think is the model's own choice",
            })
        }
    }
}

fn help() -> Vec<(String, String)> {
    let commands = COMMANDS.iter().map(|(name, arguments, what)| {
        (format!("{name} {arguments}").trim_end().to_string(), (*what).to_string())
    });
    let keys = KEYS.iter().map(|(key, what)| ((*key).to_string(), (*what).to_string()));
    commands.chain(keys).collect()
}

/// Sessions, one a line, the latest first.
pub fn listed(sessions: &[Summary]) -> Vec<String> {
    if sessions.is_empty() {
        return vec!["there are no sessions yet".into()];
    }
    let line = |session: &Summary| {
        if let Some(damage) = &session.damage {
            return format!("{}  cannot be read: {damage}", session.id);
        }
        let when = strftime("%Y-%m-%d %H:%M", session.changed);
        let when = when.unwrap_or_else(|_| String::new());
        let (id, title) = (&session.id, &session.title);
        format!("{id}  {when}  {:>3} messages  {title}", session.messages)
    };
    let mut lines: Vec<String> = sessions.iter().take(SESSIONS_MAX).map(line).collect();
    let more = sessions.len().saturating_sub(SESSIONS_MAX);
    lines.extend((more > 0).then(|| format!("and {more} older ones")));
    lines
}

fn export(talk: &Talk, path: &Path) -> Result<Effect> {
    let is_json = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("json"));
    let text = match is_json {
        true => {
            serde_json::to_string_pretty(&json!({
                "model": talk.backend.model(),
                "session": talk.session.id(),
                "messages": talk.conversation.to_json(Arguments::Object),
            }))? + "\n"
        }
        false => talk.conversation.to_markdown(),
    };
    if path.exists() {
        bail!("{}: is there already; give another name", path.display());
    }
    private::replace(path, text.as_bytes()).with_context(|| path.display().to_string())?;
    say(format!("{} ({} bytes)", path.display(), text.len()))
}

/// The settings with one of them changed.
fn set(settings: &Settings, name: &str, value: &str) -> Result<Settings> {
    let mut new = settings.clone();
    let s = &mut new.sampling;
    let given = Some(value).filter(|value| *value != "default");
    match name {
        "temperature" => {
            s.greedy = false;
            s.temperature = parsed(name, given)?;
        }
        "top_p" => s.top_p = parsed(name, given)?,
        "top_k" => s.top_k = parsed(name, given)?,
        "min_p" => s.min_p = parsed(name, given)?,
        "repetition_penalty" => s.repetition_penalty = parsed(name, given)?,
        "presence_penalty" => s.presence_penalty = parsed(name, given)?,
        "frequency_penalty" => s.frequency_penalty = parsed(name, given)?,
        "seed" => s.seed = parsed(name, given)?,
        "think_budget" => new.think_budget = parsed(name, given)?,
        "max_tokens" => {
            new.max_tokens = parsed(name, given)?;
            ensure!(new.max_tokens != Some(0), "max_tokens is 0, expected at least 1");
        }
        _ => bail!("there is no setting {name:?}; there are {}", SETTINGS.join(", ")),
    }
    let s = &new.sampling;
    let plain = Sampling::greedy();
    Sampling {
        temperature: s.temperature.unwrap_or(plain.temperature),
        top_p: s.top_p.unwrap_or(plain.top_p),
        min_p: s.min_p.unwrap_or(plain.min_p),
        repetition_penalty: s.repetition_penalty.unwrap_or(plain.repetition_penalty),
        presence_penalty: s.presence_penalty.unwrap_or(plain.presence_penalty),
        frequency_penalty: s.frequency_penalty.unwrap_or(plain.frequency_penalty),
        ..plain
    }
    .check()?;
    Ok(new)
}

fn parsed<T: std::str::FromStr>(name: &str, value: Option<&str>) -> Result<Option<T>> {
    let number = |text: &str| {
        text.parse().ok().with_context(|| format!("{name}: {text:?} is no number for it"))
    };
    value.map(number).transpose()
}

fn settings(settings: &Settings) -> Vec<String> {
    let s = &settings.sampling;
    let shown = |value: Option<String>| value.unwrap_or_else(|| "default".into());
    let value = |name: &str| match name {
        "temperature" if s.greedy => "0 (greedy)".into(),
        "temperature" => shown(s.temperature.map(|v| v.to_string())),
        "top_p" => shown(s.top_p.map(|v| v.to_string())),
        "top_k" => shown(s.top_k.map(|v| v.to_string())),
        "min_p" => shown(s.min_p.map(|v| v.to_string())),
        "repetition_penalty" => shown(s.repetition_penalty.map(|v| v.to_string())),
        "presence_penalty" => shown(s.presence_penalty.map(|v| v.to_string())),
        "frequency_penalty" => shown(s.frequency_penalty.map(|v| v.to_string())),
        "seed" => shown(s.seed.map(|v| v.to_string())),
        "max_tokens" => shown(settings.max_tokens.map(|v| v.to_string())),
        _ => shown(settings.think_budget.map(|v| v.to_string())),
    };
    SETTINGS.iter().map(|name| format!("{name:<20} {}", value(name))).collect()
}

fn stats(talk: &Talk) -> Vec<String> {
    let mut lines = vec![
        format!("model      {}", talk.backend.model()),
        format!("session    {}", talk.session.id()),
        format!("messages   {}", talk.conversation.messages.len()),
    ];
    if let Some(figures) = &talk.last {
        lines.extend(figure_lines(figures));
    }
    if let Some(gauges) = talk.backend.gauges() {
        let all = gauges.hits + gauges.misses;
        let rate = if all == 0 { 0.0 } else { 100.0 * gauges.hits as f64 / all as f64 };
        lines.push(format!(
            "experts    {rate:.1} % hits of {} since the start",
            grouped(all as usize)
        ));
        lines.push(format!("disk       {} since the start", gib(gauges.read_bytes)));
        lines.extend(gauges.memory_bytes.map(|bytes| format!("memory     {}", gib(bytes))));
    }
    lines
}

fn figure_lines(figures: &Figures) -> Vec<String> {
    let done = &figures.done;
    let tokens = |count: Option<usize>| count.map_or("?".into(), grouped);
    let mut lines = vec![
        format!(
            "prompt     {} tokens, {} of them not computed again; first token after {:.2} s",
            tokens(done.prompt),
            tokens(done.cached),
            done.first_token.as_secs_f64()
        ),
        format!(
            "answer     {} tokens{}",
            tokens(done.generated),
            figures.speed().map_or_else(String::new, |speed| format!(", {speed:.1} tok/s"))
        ),
    ];
    if let (Some(hits), Some(rate)) = (figures.hit_rate, figures.read_rate()) {
        let (percent, speed) = (hits * 100.0, rate / 1e9);
        lines.push(format!("its reads  {percent:.1} % hits, {speed:.2} GB/s from the disk"));
    }
    lines
}

/// The first lines of a list of sessions, as `--sessions` prints them.
///
/// # Errors
/// Standard output takes no more.
pub fn print_sessions(sessions: &[Summary]) -> Result<()> {
    listed(sessions).iter().try_for_each(|line| say::line(&super::line::harmless(line)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::run::SamplingArgs;

    fn plain() -> Settings {
        Settings {
            sampling: SamplingArgs::none(),
            thinking: None,
            think_budget: None,
            max_tokens: None,
        }
    }

    #[test]
    fn every_setting_can_be_set_and_taken_back() {
        for name in SETTINGS {
            let changed = set(&plain(), name, "1").unwrap();
            assert_ne!(changed, plain(), "{name}");
            assert!(
                settings(&changed)
                    .iter()
                    .any(|line| line.starts_with(name) && line.ends_with(" 1"))
            );
            assert_eq!(set(&changed, name, "default").unwrap(), plain(), "{name}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused_at_once() {
        for (name, value, why) in [
            ("temperature", "-1", "temperature is -1"),
            ("temperature", "nan", "temperature is NaN"),
            ("temperature", "hot", "\"hot\" is no number"),
            ("top_p", "0", "top_p is 0"),
            ("max_tokens", "0", "at least 1"),
            ("seed", "1.5", "no number"),
        ] {
            let error = set(&plain(), name, value).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
