//! Two conversions as Python makes them: `str(value)` and `json.dumps(value, ensure_ascii=False)`.
//!
//! Models were trained on text from Python's Jinja, where true is `True`, ten quadrillion is `1e+16`
//! and JSON has a space after each comma. [`float`] is shared by both.

use std::fmt::Write as _;

use minijinja::value::{ValueIter, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// `str(value)` for scalars and text; containers are left to the template engine.
///
/// An undefined value is empty, as it is in Jinja.
pub fn text(value: &Value) -> String {
    match as_float(value) {
        Some(number) => float(number),
        None => value.to_string(),
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
///
/// # Errors
/// A value that JSON cannot hold: undefined, a number that is not finite, a function.
pub fn json(value: &Value, indent: Option<usize>) -> Result<String, Error> {
    let mut writer = Json { out: String::new(), indent, depth: 0 };
    writer.value(value)?;
    Ok(writer.out)
}

/// `repr(number)`: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub fn float(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() { "nan".into() } else { number.to_string() };
    }
    let magnitude = number.abs();
    if number == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{number:?}");
    }
    let shortest = format!("{number:e}");
    let (digits, exponent) = shortest.split_once('e').expect("`e` formatting writes an exponent");
    let exponent: i32 = exponent.parse().expect("`e` formatting writes a whole exponent");
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn as_float(value: &Value) -> Option<f64> {
    if value.kind() != ValueKind::Number || value.is_integer() {
        return None;
    }
    f64::try_from(value.clone()).ok()
}

struct Json {
    out: String,
    indent: Option<usize>,
    depth: usize,
}

impl Json {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match as_float(value) {
                Some(number) if !number.is_finite() => return Err(refused(value)),
                Some(number) => self.out.push_str(&float(number)),
                None => self.out.push_str(&value.to_string()),
            },
            ValueKind::String => self.string(value.as_str().ok_or_else(|| refused(value))?),
            ValueKind::Seq | ValueKind::Iterable => self.items(value, ['[', ']'])?,
            ValueKind::Map => self.items(value, ['{', '}'])?,
            _ => return Err(refused(value)),
        }
        Ok(())
    }

    /// The items of a list, or the keys of a map with their values.
    fn items(&mut self, value: &Value, [open, close]: [char; 2]) -> Result<(), Error> {
        let items: ValueIter = value.try_iter()?;
        self.out.push(open);
        self.depth += 1;
        let mut empty = true;
        for item in items {
            if !empty {
                self.out.push_str(if self.indent.is_some() { "," } else { ", " });
            }
            empty = false;
            self.line();
            if open == '{' {
                self.string(&text(&item));
                self.out.push_str(": ");
                self.value(&value.get_item(&item)?)?;
            } else {
                self.value(&item)?;
            }
        }
        self.depth -= 1;
        if !empty {
            self.line();
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' => write!(self.out, "\\u{:04x}", u32::from(c))
                    .expect("writing to a string does not fail"),
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn refused(value: &Value) -> Error {
    let what = format!("{} cannot be written as JSON", value.kind());
    Error::new(ErrorKind::InvalidOperation, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::value::Serde;

    #[test]
    fn floats_read_as_python_writes_them() {
        for (number, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.5, "1.5"),
            (3.0, "3.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (1e15, "1000000000000000.0"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float(number), expected);
        }
    }

    #[test]
    fn json_reads_as_python_dumps_it() {
        let value = Value::from(Serde(serde_json::json!({
            "b": [1, -2.0, 1e22, true, null, [], {}],
            "a": "\u{e9}<&'\"\\\u{1}\u{7f}\t"
        })));
        assert_eq!(
            json(&value, None).unwrap(),
            "{\"b\": [1, -2.0, 1e+22, true, null, [], {}], \
             \"a\": \"\u{e9}<&'\\\"\\\\\\u0001\u{7f}\\t\"}"
        );
        let value = Value::from(Serde(serde_json::json!({ "k": [1, { "x": "y" }], "e": [] })));
        assert_eq!(
            json(&value, Some(1)).unwrap(),
            "{\n \"k\": [\n  1,\n  {\n   \"x\": \"y\"\n  }\n ],\n \"e\": []\n}"
        );
    }

    #[test]
    fn what_json_cannot_hold_is_refused() {
        assert!(json(&Value::UNDEFINED, None).unwrap_err().to_string().contains("undefined"));
        assert!(json(&Value::from(f64::NAN), None).unwrap_err().to_string().contains("number"));
    }
}
