//! Which of a server's tools the model is offered, and under which names.
//!
//! A tool is `SERVER__TOOL`, spelled so that every format of calls can carry it. Its schema goes to the
//! model as it is; one that could speak for somebody else in the prompt, and what is too long or too
//! much, is left out with a reason. Starts nothing and asks nobody.

use std::collections::HashSet;

use rmcp::model;
use serde_json::Value as Json;

use super::config::{ServerConfig, spelled};
use crate::chat::backend::Tool;
use crate::chat::tools::outcome::{defused, has_mark};

/// Most tools of a server: each is read by the model before it reads the user.
const TOOLS_MAX: usize = 128;
/// Most bytes of a tool's description and schema.
const TOOL_BYTES_MAX: usize = 16 << 10;
/// Longest name that interfaces take.
const NAME_LETTERS_MAX: usize = 64;

/// A tool that is offered.
#[derive(Clone, PartialEq, Debug)]
pub struct Offer {
    /// The server's own name for it.
    pub own_name: String,
    pub tool: Tool,
    /// Whether the file says that it needs no decision.
    pub is_allowed: bool,
}

/// What became of a server's list.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Offers {
    pub offered: Vec<Offer>,
    /// Names that are not offered, with the reason.
    pub left_out: Vec<(String, String)>,
    /// Names in the file that the server does not have.
    pub unknown: Vec<String>,
}

impl Offers {
    /// Sorts a list.
    pub fn of(config: &ServerConfig, listed: Vec<model::Tool>) -> Self {
        let mut offers = Self::default();
        let names: HashSet<&str> = listed.iter().map(|tool| &*tool.name).collect();
        let wanted = config.include.iter().flatten().chain(&config.always_allow);
        offers.unknown = wanted.filter(|name| !names.contains(&***name)).cloned().collect();
        let mut taken = HashSet::new();
        for tool in listed {
            let name = tool.name.to_string();
            match offer(config, tool, &mut taken, offers.offered.len()) {
                Ok(offer) => offers.offered.push(offer),
                Err(why) => offers.left_out.push((name, why)),
            }
        }
        offers
    }
}

fn offer(
    config: &ServerConfig,
    tool: model::Tool,
    taken: &mut HashSet<String>,
    before: usize,
) -> Result<Offer, String> {
    let own_name = tool.name.to_string();
    let included = config.include.as_ref().is_none_or(|names| names.contains(&own_name));
    refuse(!included, || "includeTools does not name it".into())?;
    refuse(before >= TOOLS_MAX, || {
        format!("{TOOLS_MAX} are the most of a server; includeTools chooses")
    })?;
    let name = format!("{}__{}", config.key, spelled(&own_name));
    refuse(own_name.is_empty(), || "it has no name".into())?;
    refuse(name.len() > NAME_LETTERS_MAX, || {
        format!("{name} is longer than {NAME_LETTERS_MAX} letters")
    })?;
    let schema = Json::Object(tool.input_schema.as_ref().clone());
    let text = schema.to_string();
    refuse(has_mark(&text), || "its schema has a mark of chat templates".into())?;
    let description = defused(tool.description.as_deref().unwrap_or(""));
    let bytes = text.len() + description.len();
    refuse(bytes > TOOL_BYTES_MAX, || {
        format!("its description and schema have {bytes} bytes, the most is {TOOL_BYTES_MAX}")
    })?;
    refuse(!taken.insert(name.clone()), || format!("another tool is {name} already"))?;
    let is_allowed = config.always_allow.contains(&own_name);
    Ok(Offer { own_name, tool: Tool { name, description, parameters: schema }, is_allowed })
}

fn refuse(refuses: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if refuses { Err(why()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn listed(tools: &[Json]) -> Vec<model::Tool> {
        tools.iter().map(|tool| serde_json::from_value(tool.clone()).unwrap()).collect()
    }

    fn config() -> ServerConfig {
        ServerConfig { name: "my files".into(), key: "my_files".into(), ..Default::default() }
    }

    #[test]
    fn a_tool_goes_to_the_model_with_its_schema_as_it_is() {
        let schema = json!({ "type": "object", "properties": { "path": { "type": "string" } },
                             "required": ["path"], "x-own": [1, null] });
        let tool = json!({ "name": "fs.read", "description": "Reads <|im_end|>\u{1b}[1m",
                           "inputSchema": schema });
        let allows = ServerConfig { always_allow: vec!["fs.read".into()], ..config() };
        let offers = Offers::of(&allows, listed(&[tool]));
        let tool = Tool {
            name: "my_files__fs_read".into(),
            description: "Reads < |im_end|>[1m".into(),
            parameters: schema,
        };
        assert_eq!(offers.offered, [Offer { own_name: "fs.read".into(), tool, is_allowed: true }]);
        assert_eq!((offers.left_out, offers.unknown), (vec![], vec![]));
    }

    #[test]
    fn what_cannot_be_carried_is_left_out_with_a_reason() {
        let tool = |name: &str, text: &str| json!({ "name": name, "description": text, "inputSchema": {} });
        let speaks = json!({ "name": "speaks", "inputSchema": { "title": "</tool_response>" } });
        let long = "x".repeat(TOOL_BYTES_MAX);
        let name = "n".repeat(NAME_LETTERS_MAX);
        let all = [
            tool("a.b", ""),
            tool("a/b", ""),
            tool("", ""),
            tool("big", &long),
            tool(&name, ""),
            speaks,
            tool("other", ""),
        ];
        let config = ServerConfig {
            include: Some(
                ["a.b", "a/b", "", "big", &name, "speaks", "gone"].map(Into::into).into(),
            ),
            ..config()
        };
        let offers = Offers::of(&config, listed(&all));
        assert_eq!(offers.offered.len(), 1);
        assert_eq!(offers.unknown, ["gone"]);
        let reasons = [
            ("a/b", "another tool is my_files__a_b"),
            ("", "no name"),
            ("big", "16386 bytes"),
            (&name, "longer than 64"),
            ("speaks", "mark of chat templates"),
            ("other", "includeTools"),
        ];
        assert_eq!(offers.left_out.len(), reasons.len());
        for ((name, why), (expected, reason)) in offers.left_out.iter().zip(reasons) {
            assert!(name == expected && why.contains(reason), "{name}: {why}");
        }
    }

    #[test]
    fn of_too_many_tools_the_first_are_offered() {
        let tool = |at| json!({ "name": format!("t{at}"), "inputSchema": {} });
        let offers = Offers::of(&config(), listed(&(0..10_000).map(tool).collect::<Vec<_>>()));
        assert_eq!((offers.offered.len(), offers.left_out.len()), (TOOLS_MAX, 10_000 - TOOLS_MAX));
    }
}
