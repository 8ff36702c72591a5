//! Masks that make a text parse: JSON schemas, and calls of the tools that a request demands.
//!
//! Grammars are llguidance's; what is ours is the vocabulary's bytes, built once, and the grammar of
//! calls in the model's own format. A constraint holds for the answer, never for the thinking, or
//! for one call that the model has begun. Masks reach the sampler before anything is cut or drawn.

use std::fmt::Write as _;
use std::sync::Arc;

use flash_moe_engine::reply::{CallFormat, Reply, Tool};
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::tokenizer::Tokenizer;
use flash_moe_engine::{Error, Result};
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value as Json, json};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// Bytes that the vocabulary takes for each token once more in the form that masks are made from.
pub const BYTES_PER_TOKEN: u64 = 96;

/// States of a grammar's lexer, of up to 2 kB each: a schema is a stranger's.
const LEXER_STATES_MAX: usize = 50_000;

/// Makes constraints for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
}

/// Calls that a text may or must consist of.
pub struct Calls {
    /// How they are written.
    pub format: CallFormat,
    /// What may be called.
    pub tools: Vec<Tool>,
    /// Whether there may be several.
    pub many: bool,
}

/// What the rest of a text must look like.
pub struct Constraint {
    grammar: Matcher,
    fresh: Option<Matcher>, // for every further call; `None` holds from the answer's beginning
    holds: bool,
}

impl Grammars {
    /// Takes the vocabulary over.
    ///
    /// # Errors
    /// It has no end-of-text token, or llguidance refuses it.
    pub fn new(tokenizer: &Tokenizer, eos: &[TokenId]) -> Result<Self> {
        let count = tokenizer.count() as u32;
        let ends: Vec<u32> = eos.iter().map(|token| token.0).filter(|&id| id < count).collect();
        let Some(&first) = ends.first() else {
            return Err(Error::Tokenizer("the vocabulary has no end-of-text token".into()));
        };
        let words: Vec<Vec<u8>> = (0..count).map(|id| word(tokenizer, TokenId(id))).collect();
        let trie = TokTrie::from(&TokRxInfo::new(count, first), &words).with_eos_tokens(&ends);
        let vocabulary: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&vocabulary)
            .map_err(|e| Error::Tokenizer(format!("masks: {e:#}")))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        limits.max_lexer_states = LEXER_STATES_MAX;
        Ok(Self { factory })
    }

    /// The answer is a JSON value of `schema`, or calls, where both are given either of them.
    /// `blank` allows the blank line that models write after their thinking.
    ///
    /// # Errors
    /// Says what about a schema is not supported.
    pub fn answer(
        &self,
        schema: Option<&Json>,
        calls: Option<&Calls>,
        blank: bool,
    ) -> Result<Constraint, String> {
        let value = schema.map(|schema| format!("value: %json {}\n", spaced(schema)));
        let made = calls.map(|calls| {
            let more = if calls.many { " (\"\\n\" call)*" } else { "" };
            let rules = bodies(calls.format, &calls.tools);
            format!("calls: call{more}\ncall: \"<tool_call>\" body\n{rules}")
        });
        let names = [value.as_ref().map(|_| "value"), made.as_ref().map(|_| "calls")];
        let names: Vec<&str> = names.into_iter().flatten().collect();
        let before = if blank { "\"\\n\\n\"? " } else { "" };
        let start = format!("start: {before}({})\n", names.join(" | "));
        let rules: String = value.into_iter().chain(made).collect();
        Ok(Constraint { grammar: self.matcher(start + &rules)?, fresh: None, holds: false })
    }

    /// Every call that the model begins on its own is one of the tools'.
    ///
    /// # Errors
    /// Says what about a tool's schema is not supported.
    pub fn begun_calls(&self, calls: &Calls) -> Result<Constraint, String> {
        let rules = bodies(calls.format, &calls.tools);
        let grammar = self.matcher(format!("start: body\n{rules}"))?;
        Ok(Constraint { fresh: Some(grammar.deep_clone()), grammar, holds: false })
    }

    fn matcher(&self, grammar: String) -> Result<Matcher, String> {
        let parser = self.factory.create_parser(TopLevelGrammar::from_lark(grammar));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(first_line(&error)),
            None => Ok(matcher),
        }
    }
}

impl Constraint {
    /// The same constraint for another text; this one must not have begun.
    pub fn copy(&self) -> Self {
        Self {
            grammar: self.grammar.deep_clone(),
            fresh: self.fresh.as_ref().map(Matcher::deep_clone),
            holds: false,
        }
    }

    /// Begins or ends to hold, by what the reply has come to.
    pub fn follow(&mut self, reply: &Reply) {
        match &self.fresh {
            None => self.holds |= !reply.is_thinking(),
            Some(fresh) if reply.is_at_call() && !self.holds => {
                self.grammar = fresh.deep_clone();
                self.holds = true;
            }
            Some(_) => self.holds &= !self.grammar.is_stopped(),
        }
    }

    /// Whether there must be an answer: a call that the model may begin need not be.
    pub fn is_demanded(&self) -> bool {
        self.fresh.is_none()
    }

    /// Whether the answer is whole, so that nothing may follow.
    pub fn is_fulfilled(&self) -> bool {
        self.holds && self.fresh.is_none() && self.grammar.is_stopped() && !self.grammar.is_error()
    }

    /// The tokens that may follow, a bit each; `None` for all.
    ///
    /// # Errors
    /// The grammar outgrew its limits.
    pub fn mask(&mut self) -> Result<Option<Vec<u32>>> {
        if !self.holds {
            return Ok(None);
        }
        let mask = self.grammar.compute_mask().map_err(|e| failed(&e))?;
        Ok(Some(mask.as_slice().to_vec()))
    }

    /// The token that followed.
    ///
    /// # Errors
    /// The grammar outgrew its limits.
    pub fn take(&mut self, token: TokenId) -> Result<()> {
        match self.holds {
            true => self.grammar.consume_token(token.0).map_err(|e| failed(&e)),
            false => Ok(()),
        }
    }
}

fn failed(error: &anyhow::Error) -> Error {
    Error::Sampling(format!("constrained output: {}", first_line(&error.to_string())))
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("unknown").to_string()
}

/// A token as masks know it: its text, or the name of a special one behind a byte no text has.
fn word(tokenizer: &Tokenizer, token: TokenId) -> Vec<u8> {
    match (tokenizer.bytes(token), tokenizer.name(token)) {
        ([], Some(name)) => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
        (bytes, _) => bytes.to_vec(),
    }
}

/// A schema with white space bounded, so that a text cannot consist of it.
fn spaced(schema: &Json) -> Json {
    let mut schema = match schema {
        Json::Object(fields) => Json::Object(fields.clone()),
        Json::Bool(false) => json!({ "not": {} }),
        _ => json!({}),
    };
    schema["x-guidance"] = json!({ "whitespace_pattern": r" |\n[ \t]{0,20}" });
    schema
}

/// The rules of what follows `<tool_call>`.
fn bodies(format: CallFormat, tools: &[Tool]) -> String {
    let names: Vec<String> = (0..tools.len()).map(|tool| format!("tool_{tool}")).collect();
    let mut rules = format!(
        "body: \"\\n\" ({}) \"\\n</tool_call>\"\ntext[lazy]: /(?s:.*)/ \"\\n</parameter>\\n\"\n",
        names.join(" | ")
    );
    for (name, tool) in names.iter().zip(tools) {
        match format {
            CallFormat::Json => json_body(&mut rules, name, tool),
            CallFormat::Tagged => tagged_body(&mut rules, name, tool),
        }
    }
    rules
}

fn json_body(rules: &mut String, name: &str, tool: &Tool) {
    let head = format!("{{\"name\": {}, \"arguments\": ", Json::from(tool.name.as_str()));
    let schema = spaced(&object_schema(&tool.parameters));
    rule(rules, name, &format!("{} {name}_arguments \"}}\"", literal(&head)));
    rule(rules, &format!("{name}_arguments"), &format!("%json {schema}"));
}

/// Arguments in the order of the schema; those that are not required may be left out.
fn tagged_body(rules: &mut String, name: &str, tool: &Tool) {
    let mut line = literal(&format!("<function={}>\n", tool.name));
    let properties = tool.parameters.get("properties").and_then(Json::as_object);
    let required = tool.parameters.get("required").and_then(Json::as_array);
    for (at, (argument, schema)) in properties.into_iter().flatten().enumerate() {
        let part = format!("{name}_{at}");
        let must = required.is_some_and(|names| names.iter().any(|n| n == argument));
        let open = literal(&format!("<parameter={argument}>\n"));
        let value = value(rules, &part, schema, &tool.parameters);
        rule(rules, &part, &format!("{open} {value}"));
        let optional = if must { "" } else { "?" };
        write!(line, " {part}{optional}").expect("writing to a string does not fail");
    }
    line += " \"</function>\"";
    rule(rules, name, &line);
}

/// The rule's text for a value and what closes it.
fn value(rules: &mut String, part: &str, schema: &Json, root: &Json) -> String {
    let close = "\"\\n</parameter>\\n\"";
    let texts: Option<Vec<String>> = schema
        .get("enum")
        .and_then(Json::as_array)
        .and_then(|values| values.iter().map(|v| v.as_str().map(literal)).collect());
    match texts {
        Some(texts) if !texts.is_empty() => return format!("({}) {close}", texts.join(" | ")),
        _ if may_be_text(schema) => return "text".into(),
        _ => {}
    }
    let mut whole = schema.clone();
    for key in ["$defs", "definitions"] {
        if let (Some(definitions), Some(fields)) = (root.get(key), whole.as_object_mut()) {
            fields.entry(key).or_insert_with(|| definitions.clone());
        }
    }
    rule(rules, &format!("{part}_value"), &format!("%json {}", spaced(&whole)));
    format!("{part}_value {close}")
}

/// Whether bare text fits the schema, so that any text parses.
fn may_be_text(schema: &Json) -> bool {
    let alternatives = ["anyOf", "oneOf"].iter().find_map(|key| schema.get(key)?.as_array());
    match (schema.get("type"), alternatives) {
        (Some(Json::String(name)), _) => name == "string",
        (Some(Json::Array(names)), _) => names.iter().any(|name| name == "string"),
        (_, Some(parts)) => parts.iter().any(may_be_text),
        _ => {
            schema.get("$ref").is_none()
                && schema.get("const").is_none()
                && schema.get("enum").is_none()
        }
    }
}

fn object_schema(parameters: &Json) -> Json {
    match parameters {
        Json::Object(fields) if !fields.is_empty() => parameters.clone(),
        _ => json!({ "type": "object" }),
    }
}

fn rule(rules: &mut String, name: &str, body: &str) {
    writeln!(rules, "{name}: {body}").expect("writing to a string does not fail");
}

/// A text as a grammar's string literal.
fn literal(text: &str) -> String {
    Json::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flash_moe_engine::reply::{Start, Tools};

    fn grammars() -> (Grammars, Tokenizer) {
        let file = include_bytes!("../../../../models/tiny/tokenizer.json");
        let tokenizer = Tokenizer::from_json(file).unwrap();
        let eos = tokenizer.id("<|im_end|>").unwrap();
        (Grammars::new(&tokenizer, &[eos]).unwrap(), tokenizer)
    }

    /// How many tokens of `text` are allowed one after the other, and whether it may end there.
    fn follows(constraint: &mut Constraint, tokenizer: &Tokenizer, text: &str) -> (bool, bool) {
        let reply = Reply::new(Start::Content, Vec::new(), None);
        constraint.holds = false;
        for token in tokenizer.encode(text).unwrap() {
            constraint.holds |= constraint.fresh.is_some();
            constraint.follow(&reply);
            let mask = if constraint.is_fulfilled() {
                vec![]
            } else {
                constraint.mask().unwrap().unwrap()
            };
            let word = mask.get(token.0 as usize / 32).copied().unwrap_or(0);
            if word >> (token.0 % 32) & 1 == 0 {
                return (false, false);
            }
            constraint.take(token).unwrap();
        }
        let ends = constraint.grammar.is_stopped() || constraint.grammar.is_accepting().unwrap();
        (true, ends)
    }

    fn tool() -> Tool {
        let parameters = json!({ "type": "object", "required": ["city"], "properties": {
            "city": { "type": "string" }, "days": { "type": "integer" },
            "unit": { "enum": ["C", "F"] }
        } });
        Tool { name: "weather".into(), parameters }
    }

    fn calls(format: CallFormat, many: bool) -> Calls {
        Calls { format, tools: vec![tool()], many }
    }

    #[test]
    fn a_schema_allows_its_values_and_nothing_else() {
        let (grammars, tokenizer) = grammars();
        let schema = json!({ "type": "object", "properties": { "a": { "type": "integer" } },
                             "required": ["a"], "additionalProperties": false });
        for (text, expected) in [
            ("{\"a\": 12}", (true, true)),
            ("\n\n{\n  \"a\": 12\n}", (true, true)),
            ("{\"a\":", (true, false)),
            ("{\"b\"", (false, false)),
            ("hello", (false, false)),
            ("{      \"a\"", (false, false)),
        ] {
            let mut constraint = grammars.answer(Some(&schema), None, true).unwrap();
            assert_eq!(follows(&mut constraint, &tokenizer, text), expected, "{text:?}");
        }
        let error =
            grammars.answer(Some(&json!({ "type": "nonsense" })), None, false).err().unwrap();
        assert!(error.contains("nonsense"), "{error}");
    }

    #[test]
    fn calls_are_those_of_the_tools_in_either_format() {
        let (grammars, tokenizer) = grammars();
        let tagged = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n\n in <x>\n</parameter>\n\
                      <parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>";
        let lacking = "<tool_call>\n<function=weather>\n<parameter=days>";
        let json = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>";
        for (format, text, expected) in [
            (CallFormat::Tagged, tagged, (true, true)),
            (CallFormat::Tagged, lacking, (false, false)),
            (CallFormat::Tagged, "<tool_call>\n<function=other>", (false, false)),
            (CallFormat::Json, json, (true, true)),
            (CallFormat::Json, tagged, (false, false)),
        ] {
            let mut constraint = grammars.answer(None, Some(&calls(format, false)), false).unwrap();
            assert_eq!(follows(&mut constraint, &tokenizer, text), expected, "{text:?}");
            let tools = Tools { format, offered: vec![tool()], calls_max: None };
            let mut parts = Vec::new();
            let mut reply = Reply::new(Start::Content, Vec::new(), Some(tools));
            reply.push(text, &mut parts);
            assert_eq!(reply.calls() == 1, expected.1, "{parts:?}");
        }
        let twice = format!("{tagged}\n{tagged}");
        let mut one =
            grammars.answer(None, Some(&calls(CallFormat::Tagged, false)), false).unwrap();
        assert_eq!(follows(&mut one, &tokenizer, &twice), (false, false));
        let mut many =
            grammars.answer(None, Some(&calls(CallFormat::Tagged, true)), false).unwrap();
        assert_eq!(follows(&mut many, &tokenizer, &twice), (true, true));
    }
}
