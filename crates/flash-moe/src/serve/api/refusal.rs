//! Why a request is not answered, in the shape that its interface asks for.
//!
//! Every refusal names the field it is about, where there is one, and what to do.

use serde_json::{Value as Json, json};

/// A request that is not answered.
#[derive(Clone, PartialEq, Debug)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// What is wrong and what to do.
    pub message: String,
    /// The field it is about.
    pub field: Option<String>,
    /// Seconds after which it may be tried again.
    pub retry_after: Option<u64>,
}

/// Result of reading a request.
pub type Parsed<T> = Result<T, Refusal>;

/// Whose error objects a client understands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// `{"error": {"message", "type", "param", "code"}}`.
    OpenAi,
    /// `{"type": "error", "error": {"type", "message"}}`.
    Anthropic,
}

impl Refusal {
    /// A refusal with a status.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), field: None, retry_after: None }
    }

    /// The field at `path` is wrong.
    pub fn field(path: &str, message: impl AsRef<str>) -> Self {
        let message = format!("{path}: {}", message.as_ref());
        Self { field: Some(path.to_string()), ..Self::new(400, message) }
    }

    /// The body in a dialect; `request` is the request's id.
    pub fn body(&self, dialect: Dialect, request: &str) -> Json {
        let kind = self.kind(dialect);
        match dialect {
            Dialect::OpenAi => json!({ "error": {
                "message": self.message, "type": kind, "param": self.field, "code": self.code(),
            } }),
            Dialect::Anthropic => json!({
                "type": "error",
                "error": { "type": kind, "message": self.message },
                "request_id": request,
            }),
        }
    }

    fn kind(&self, dialect: Dialect) -> &'static str {
        match (self.status, dialect) {
            (401, Dialect::Anthropic) => "authentication_error",
            (403, Dialect::Anthropic) => "permission_error",
            (404, Dialect::Anthropic) => "not_found_error",
            (413, Dialect::Anthropic) => "request_too_large",
            (429, Dialect::Anthropic) => "rate_limit_error",
            (503, Dialect::Anthropic) => "overloaded_error",
            (504, Dialect::Anthropic) => "timeout_error",
            (500.., Dialect::Anthropic) => "api_error",
            (401, Dialect::OpenAi) => "authentication_error",
            (403, Dialect::OpenAi) => "permission_error",
            (429, Dialect::OpenAi) => "rate_limit_error",
            (500.., Dialect::OpenAi) => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn code(&self) -> Option<&'static str> {
        match self.status {
            401 => Some("invalid_api_key"),
            404 => Some("not_found"),
            429 => Some("queue_full"),
            504 => Some("timeout"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_dialect_has_its_own_shape() {
        let refusal = Refusal::field("messages[0].role", "unknown");
        assert_eq!(
            refusal.body(Dialect::OpenAi, "r"),
            json!({ "error": { "message": "messages[0].role: unknown",
                               "type": "invalid_request_error", "param": "messages[0].role",
                               "code": null } })
        );
        let full = Refusal::new(429, "full");
        assert_eq!(
            full.body(Dialect::Anthropic, "r"),
            json!({ "type": "error", "request_id": "r",
                    "error": { "type": "rate_limit_error", "message": "full" } })
        );
    }
}
