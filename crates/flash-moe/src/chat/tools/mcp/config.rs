//! The file that names MCP servers, in the form that other clients read as well.
//!
//! `{"mcpServers": {NAME: {"command", "args", "env", "cwd", "disabled", "alwaysAllow", "includeTools"}}}`.
//! Refuses a file that is not of this form, with the server and the field. What other clients put beside
//! these fields is passed over, and said so: a field that is believed to work and does not is worse.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value as Json};

/// Most bytes of the file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest name of a server: a tool's name stands behind it within the bound of both.
const KEY_LETTERS_MAX: usize = 32;

/// What the file says of one server.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct ServerConfig {
    pub name: String,
    /// The name that its tools begin with.
    pub key: String,
    pub command: String,
    pub args: Vec<String>,
    /// Variables beside those of this process.
    pub env: BTreeMap<String, String>,
    pub cwd: Option<PathBuf>,
    /// Tools that need no decision, by the server's own names.
    pub always_allow: Vec<String>,
    /// The only tools that are offered, if it says any.
    pub include: Option<Vec<String>>,
}

/// What a file says.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Config {
    pub servers: Vec<ServerConfig>,
    /// What the user should know of it.
    pub notes: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    command: Option<String>,
    url: Option<String>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    cwd: Option<PathBuf>,
    #[serde(default)]
    disabled: bool,
    #[serde(default)]
    always_allow: Vec<String>,
    include_tools: Option<Vec<String>>,
    #[serde(flatten)]
    rest: Map<String, Json>,
}

impl Config {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read, or is not of the form.
    pub fn read(path: &Path) -> Result<Self> {
        let named = || path.display().to_string();
        let bytes = std::fs::metadata(path).with_context(named)?.len();
        ensure!(bytes <= FILE_BYTES_MAX, "{}: has {bytes} bytes, is that the file?", named());
        let text = std::fs::read_to_string(path).with_context(named)?;
        Self::parse(&text).with_context(named)
    }

    fn parse(text: &str) -> Result<Self> {
        let file: Json = serde_json::from_str(text).context("not JSON")?;
        let Some(servers) = file.get("mcpServers").and_then(Json::as_object) else {
            bail!("expected {{\"mcpServers\": {{NAME: {{\"command\": ..., \"args\": [...]}}}}}}");
        };
        let mut config = Self::default();
        let mut keys = HashMap::new();
        for (name, entry) in servers {
            let server = config.server(name, entry)?;
            if let Some(other) = keys.insert(key(name), name) {
                bail!(
                    "the servers {other:?} and {name:?} have the same name for a model: rename one"
                );
            }
            config.servers.extend(server);
        }
        Ok(config)
    }

    fn server(&mut self, name: &str, entry: &Json) -> Result<Option<ServerConfig>> {
        let key = key(name);
        ensure!(!key.is_empty(), "the server's name {name:?} has no letter or digit");
        ensure!(key.len() <= KEY_LETTERS_MAX, "the server's name {name:?} is too long for a model");
        let entry: Entry = serde_json::from_value(entry.clone())
            .with_context(|| format!("the server {name:?}"))?;
        // Clients that know other transports say `stdio` where they mean a command.
        let is_known = |(field, value): &(&String, &Json)| *field == "type" && *value == "stdio";
        let unknown: Vec<&str> =
            entry.rest.iter().filter(|field| !is_known(field)).map(|(field, _)| &**field).collect();
        if entry.disabled {
            return Ok(None);
        }
        if !unknown.is_empty() {
            let fields = unknown.join(", ");
            self.notes.push(format!("MCP server {name}: has no use here for {fields}"));
        }
        let Some(command) = entry.command.filter(|command| !command.trim().is_empty()) else {
            ensure!(entry.url.is_some(), "the server {name:?} needs a \"command\"");
            let why = "is reached by URL, which is not spoken here; only a \"command\" is";
            self.notes.push(format!("MCP server {name}: {why}"));
            return Ok(None);
        };
        Ok(Some(ServerConfig {
            name: name.into(),
            key,
            command,
            args: entry.args,
            env: entry.env,
            cwd: entry.cwd,
            always_allow: entry.always_allow,
            include: entry.include_tools,
        }))
    }
}

/// A name of letters, digits, `-` and single `_` inside it: two of them before a tool's name are then
/// always where the name of the server ends.
fn key(name: &str) -> String {
    let mut key = String::new();
    for letter in spelled(name).chars() {
        if letter != '_' || !key.ends_with('_') {
            key.push(letter);
        }
    }
    key.trim_matches('_').into()
}

/// A name in the letters that formats of calls can carry.
pub fn spelled(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    name.chars().map(|c| if is_plain(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_other_clients_is_read_and_what_has_no_use_is_told() {
        let config = Config::parse(
            r#"{ "inputs": [], "mcpServers": {
                "files v1.2": { "type": "stdio", "command": "mcp-files", "args": ["--root", "/a b"],
                    "env": { "KEY": "x" }, "cwd": "/srv", "alwaysAllow": ["stat"],
                    "includeTools": ["stat", "read"] },
                "off": { "command": "x", "disabled": true, "timeout": 4 },
                "far": { "url": "https://example.org/mcp" },
                "_git__": { "command": "git-mcp", "autoApprove": ["log"], "timeout": 60 } } }"#,
        )
        .unwrap();
        let files = ServerConfig {
            name: "files v1.2".into(),
            key: "files_v1_2".into(),
            command: "mcp-files".into(),
            args: vec!["--root".into(), "/a b".into()],
            env: BTreeMap::from([("KEY".into(), "x".into())]),
            cwd: Some("/srv".into()),
            always_allow: vec!["stat".into()],
            include: Some(vec!["stat".into(), "read".into()]),
        };
        let git = ServerConfig {
            name: "_git__".into(),
            key: "git".into(),
            command: "git-mcp".into(),
            ..ServerConfig::default()
        };
        assert_eq!(config.servers, [files, git]);
        let notes = config.notes.join("\n");
        assert!(notes.contains("far: is reached by URL") && notes.contains("autoApprove, timeout"));
        assert!(!notes.contains("off") && !notes.contains("type"), "{notes}");
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for (text, why) in [
            ("[", "not JSON"),
            ("{}", "expected {\"mcpServers\""),
            (r#"{"mcpServers": []}"#, "expected {\"mcpServers\""),
            (r#"{"mcpServers": {"a": {}}}"#, "\"a\" needs a \"command\""),
            (r#"{"mcpServers": {"a": {"command": " "}}}"#, "\"a\" needs a \"command\""),
            (r#"{"mcpServers": {"a": {"command": "x", "args": "y"}}}"#, "expected a sequence"),
            (r#"{"mcpServers": {"a": {"command": "x", "env": {"A": 1}}}}"#, "expected a string"),
            (r#"{"mcpServers": {"\u4e2d": {"command": "x"}}}"#, "no letter or digit"),
            (r#"{"mcpServers": {"a b": {"command": "x"}, "a_b": {"command": "y"}}}"#, "rename one"),
        ] {
            let error = format!("{:#}", Config::parse(text).unwrap_err());
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
