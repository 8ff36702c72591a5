//! The type of a tagged argument, told by the tool's JSON schema.
//!
//! In the tagged format every value is bare text: `5` may be a number or a string. The schema says
//! which; what does not fit its type stays a string, so that nothing is lost. Values that are JSON
//! already are kept letter by letter.

use serde_json::Value as Json;

/// References followed before a schema is taken to say nothing.
const DEPTH_MAX: usize = 8;

/// The JSON types that a schema allows; none is any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Types(Vec<String>);

impl Types {
    /// The types of the argument `name` of a tool whose arguments are `parameters`.
    pub fn of(parameters: &Json, name: &str) -> Self {
        let mut types = Vec::new();
        if let Some(schema) = parameters.get("properties").and_then(|p| p.get(name)) {
            collect(schema, parameters, 0, &mut types);
        }
        Self(types)
    }

    /// Whether only a string fits, so that the text need not be whole before it is passed on.
    pub fn is_text(&self) -> bool {
        !self.0.is_empty() && self.0.iter().all(|name| name == "string")
    }

    /// JSON for a bare text.
    pub fn json(&self, text: &str) -> String {
        let bare = text.trim();
        let python = match bare {
            "True" => "true",
            "False" => "false",
            "None" => "null",
            other => other,
        };
        let fits = serde_json::from_str::<Json>(python).is_ok_and(|value| self.fits(&value));
        if fits { python.to_string() } else { Json::from(text).to_string() }
    }

    fn fits(&self, value: &Json) -> bool {
        let may = |name: &str| self.0.is_empty() || self.0.iter().any(|n| n == name);
        let text = self.0.iter().any(|n| n == "string");
        match value {
            Json::Null => may("null"),
            Json::Object(_) => may("object"),
            Json::Array(_) => may("array"),
            // Where a string is allowed too, bare text is one.
            Json::Bool(_) => may("boolean") && !text,
            Json::Number(n) => {
                (may("number") || (may("integer") && (n.is_i64() || n.is_u64()))) && !text
            }
            Json::String(_) => false,
        }
    }
}

fn collect(schema: &Json, root: &Json, depth: usize, types: &mut Vec<String>) {
    if depth > DEPTH_MAX {
        return;
    }
    match schema.get("type") {
        Some(Json::String(name)) => types.push(name.clone()),
        Some(Json::Array(names)) => {
            types.extend(names.iter().filter_map(Json::as_str).map(str::to_string));
        }
        _ => {}
    }
    if !types.is_empty() {
        return;
    }
    let values = schema.get("enum").and_then(Json::as_array).into_iter().flatten();
    types.extend(values.chain(schema.get("const")).map(|value| type_name(value).to_string()));
    for key in ["anyOf", "oneOf", "allOf"] {
        for part in schema.get(key).and_then(Json::as_array).into_iter().flatten() {
            let mut more = Vec::new();
            collect(part, root, depth + 1, &mut more);
            types.append(&mut more);
        }
    }
    if let Some(path) = schema.get("$ref").and_then(Json::as_str)
        && let Some(target) = path.strip_prefix('#').and_then(|path| root.pointer(path))
    {
        collect(target, root, depth + 1, types);
    }
}

fn type_name(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "boolean",
        Json::Number(_) => "number",
        Json::String(_) => "string",
        Json::Array(_) => "array",
        Json::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn typed(schema: Json, text: &str) -> String {
        let parameters = json!({
            "properties": { "a": schema },
            "$defs": { "n": { "type": "integer" }, "loop": { "$ref": "#/$defs/loop" } }
        });
        Types::of(&parameters, "a").json(text)
    }

    #[test]
    fn values_take_the_type_that_the_schema_names() {
        for (schema, text, expected) in [
            (json!({ "type": "string" }), "5", "\"5\""),
            (json!({ "type": "string" }), " a\n\"b\" ", "\" a\\n\\\"b\\\" \""),
            (json!({ "type": "integer" }), "5", "5"),
            (json!({ "type": "integer" }), "5.5", "\"5.5\""),
            (json!({ "type": "number" }), "1.10", "1.10"),
            (json!({ "type": "boolean" }), "True", "true"),
            (json!({ "type": "boolean" }), "maybe", "\"maybe\""),
            (json!({ "type": "null" }), "None", "null"),
            (json!({ "type": ["string", "null"] }), "null", "null"),
            (json!({ "type": ["string", "null"] }), "nil", "\"nil\""),
            (json!({ "type": "array" }), "[1, \"x\"]", "[1, \"x\"]"),
            (json!({ "type": "object" }), "{\"a\": 1e999}", "\"{\\\"a\\\": 1e999}\""),
            (json!({ "anyOf": [{ "type": "string" }, { "type": "object" }] }), "{}", "{}"),
            (json!({ "anyOf": [{ "type": "string" }, { "type": "integer" }] }), "7", "\"7\""),
            (json!({ "enum": [1, 2] }), "2", "2"),
            (json!({ "enum": ["1", "2"] }), "2", "\"2\""),
            (json!({ "$ref": "#/$defs/n" }), "2", "2"),
            (json!({ "$ref": "#/$defs/loop" }), "2", "2"),
            (json!({}), "2", "2"),
            (json!({}), "two", "\"two\""),
            (json!({}), "\"two\"", "\"\\\"two\\\"\""),
        ] {
            assert_eq!(typed(schema.clone(), text), expected, "{schema} {text}");
        }
    }

    #[test]
    fn only_plain_strings_may_be_passed_on_early() {
        let types = |schema: Json| Types::of(&json!({ "properties": { "a": schema } }), "a");
        assert!(types(json!({ "type": "string" })).is_text());
        assert!(types(json!({ "enum": ["x", "y"] })).is_text());
        assert!(!types(json!({ "type": ["string", "null"] })).is_text());
        assert!(!types(json!({})).is_text());
        assert!(!Types::of(&json!({}), "a").is_text());
    }
}
