//! A JSON object read field by field, until none is left.
//!
//! What is read is checked and what is not known is refused by name, so that nothing a client asks
//! for is ignored silently. A field that is null is a field that is absent.

use serde_json::{Map, Value as Json};

use super::refusal::{Parsed, Refusal};

/// The fields that are still to be read, and where the object stands in the request.
#[derive(Debug)]
pub struct Fields {
    path: String,
    left: Map<String, Json>,
}

impl Fields {
    /// The object at `path`; the request itself has the empty path.
    ///
    /// # Errors
    /// It is no object.
    pub fn of(value: Json, path: &str) -> Parsed<Self> {
        match value {
            Json::Object(left) => Ok(Self { path: path.to_string(), left }),
            other if path.is_empty() => {
                let kind = kind(&other);
                Err(Refusal::new(400, format!("the body is {kind}, expected a JSON object")))
            }
            other => Err(expected(path, &other, "an object")),
        }
    }

    /// The full name of a field.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    /// A refusal about a field.
    pub fn refusal(&self, name: &str, message: impl AsRef<str>) -> Refusal {
        Refusal::field(&self.path(name), message)
    }

    /// A field's value, which stays to be read.
    pub fn peek(&self, name: &str) -> Option<&Json> {
        self.left.get(name)
    }

    /// Lets a field be read under another name.
    pub fn rename(&mut self, name: &str, other: &str) {
        if let Some(value) = self.left.shift_remove(name) {
            self.left.insert(other.to_string(), value);
        }
    }

    /// Sets a field that is still to be read.
    pub fn put(&mut self, name: &str, value: Json) {
        self.left.insert(name.to_string(), value);
    }

    /// A field's value.
    pub fn take(&mut self, name: &str) -> Option<Json> {
        self.left.shift_remove(name).filter(|value| !value.is_null())
    }

    /// A text.
    ///
    /// # Errors
    /// It is something else.
    pub fn text(&mut self, name: &str) -> Parsed<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text)),
            Some(other) => Err(expected(&self.path(name), &other, "a string")),
        }
    }

    /// A text that must be there.
    ///
    /// # Errors
    /// It is absent or something else.
    pub fn needed_text(&mut self, name: &str) -> Parsed<String> {
        self.text(name)?.ok_or_else(|| self.refusal(name, "is required, a string"))
    }

    /// True or false.
    ///
    /// # Errors
    /// It is something else.
    pub fn flag(&mut self, name: &str) -> Parsed<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(expected(&self.path(name), &other, "true or false")),
        }
    }

    /// A number.
    ///
    /// # Errors
    /// It is something else.
    pub fn number(&mut self, name: &str) -> Parsed<Option<f32>> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Number(n)) => Ok(n.as_f64().map(|n| n as f32)),
            Some(other) => Err(expected(&self.path(name), &other, "a number")),
        }
    }

    /// A whole number of at least `least`.
    ///
    /// # Errors
    /// It is something else or less.
    pub fn count(&mut self, name: &str, least: u64) -> Parsed<Option<usize>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64().filter(|&n| n >= least) {
            Some(n) => Ok(Some(n as usize)),
            None => {
                let wanted = format!("a whole number of at least {least}");
                Err(expected(&self.path(name), &value, &wanted))
            }
        }
    }

    /// A list.
    ///
    /// # Errors
    /// It is something else.
    pub fn list(&mut self, name: &str) -> Parsed<Option<Vec<Json>>> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Array(list)) => Ok(Some(list)),
            Some(other) => Err(expected(&self.path(name), &other, "a list")),
        }
    }

    /// An object.
    ///
    /// # Errors
    /// It is something else.
    pub fn object(&mut self, name: &str) -> Parsed<Option<Self>> {
        let path = self.path(name);
        self.take(name).map(|value| Self::of(value, &path)).transpose()
    }

    /// One text or a list of them.
    ///
    /// # Errors
    /// It is something else.
    pub fn texts(&mut self, name: &str) -> Parsed<Vec<String>> {
        let path = self.path(name);
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Json::String(text)) => Ok(vec![text]),
            Some(Json::Array(list)) => list
                .into_iter()
                .map(|item| match item {
                    Json::String(text) => Ok(text),
                    other => Err(expected(&path, &other, "strings")),
                })
                .collect(),
            Some(other) => Err(expected(&path, &other, "a string or a list of strings")),
        }
    }

    /// Takes fields that have no effect on the answer.
    pub fn accept(&mut self, names: &[&str]) {
        for name in names {
            self.left.shift_remove(*name);
        }
    }

    /// Takes a field that may only have one of the values that change nothing.
    ///
    /// # Errors
    /// It has another.
    pub fn only(&mut self, name: &str, allowed: &[Json]) -> Parsed<()> {
        match self.take(name) {
            Some(value) if !allowed.contains(&value) => {
                let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
                let allowed = allowed.join(" or ");
                Err(self.refusal(name, format!("{value} is not supported, only {allowed}")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a field that is there.
    ///
    /// # Errors
    /// It is there.
    pub fn refuse(&mut self, name: &str, why: &str) -> Parsed<()> {
        match self.take(name) {
            Some(_) => Err(self.refusal(name, format!("is not supported: {why}"))),
            None => Ok(()),
        }
    }

    /// Refuses whatever is left.
    ///
    /// # Errors
    /// A field is left that nobody asked for.
    pub fn finish(self) -> Parsed<()> {
        match self.left.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => {
                Err(self.refusal(name, "is not a parameter that this server supports"))
            }
            None => Ok(()),
        }
    }
}

/// A refusal of a value that is not what it should be.
pub fn expected(path: &str, value: &Json, wanted: &str) -> Refusal {
    let shown = match value {
        Json::Number(_) | Json::Bool(_) => value.to_string(),
        other => kind(other).to_string(),
    };
    Refusal::field(path, format!("is {shown}, expected {wanted}"))
}

fn kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_left_or_wrong_is_named() {
        let read = |value: Json| -> Parsed<()> {
            let mut fields = Fields::of(value, "a")?;
            fields.text("text")?;
            fields.count("count", 1)?;
            fields.only("store", &[json!(false)])?;
            fields.refuse("audio", "text alone")?;
            fields.texts("stop")?;
            fields.finish()
        };
        let fine = json!({ "text": "t", "count": 1, "store": false, "stop": ["x"], "z": null });
        assert_eq!(read(fine), Ok(()));
        for (value, expected) in [
            (json!({ "text": 1 }), "a.text: is 1, expected a string"),
            (json!({ "count": 0 }), "a.count: is 0, expected a whole number of at least 1"),
            (json!({ "store": true }), "a.store: true is not supported, only false"),
            (json!({ "audio": {} }), "a.audio: is not supported: text alone"),
            (json!({ "stop": [1] }), "a.stop: is 1, expected strings"),
            (json!({ "z": 1 }), "a.z: is not a parameter that this server supports"),
            (json!([]), "a: is a list, expected an object"),
        ] {
            assert_eq!(read(value).unwrap_err().message, expected);
        }
    }
}
