//! Responses that may be continued by their id, kept in memory.
//!
//! The oldest go first when there are too many or they take too much. Nothing is written to disk, so
//! a restart forgets them, and a client is told so by name.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use serde_json::Value as Json;

use super::refusal::{Parsed, Refusal};

/// Most responses that are kept.
const COUNT_MAX: usize = 512;
/// Bytes of JSON text that they may take together.
const BYTES_MAX: usize = 64 << 20;

/// A response and what was said up to its end.
#[derive(Clone, Debug)]
pub struct Kept {
    /// In the template's terms, without the instructions.
    pub messages: Vec<Json>,
    /// The response as the client got it.
    pub response: Json,
}

/// The responses that are kept.
#[derive(Default)]
pub struct ResponseStore(Mutex<Shelf>);

#[derive(Default)]
struct Shelf {
    kept: HashMap<String, (Kept, usize)>,
    order: VecDeque<String>,
    bytes: usize,
}

impl ResponseStore {
    /// Keeps a response, and lets the oldest go where there is no room.
    pub fn keep(&self, id: &str, kept: Kept) {
        let messages: usize = kept.messages.iter().map(|message| message.to_string().len()).sum();
        let bytes = messages + kept.response.to_string().len();
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.bytes += bytes;
        shelf.order.push_back(id.to_string());
        shelf.kept.insert(id.to_string(), (kept, bytes));
        while shelf.order.len() > COUNT_MAX || shelf.bytes > BYTES_MAX {
            let Some(oldest) = shelf.order.pop_front() else { break };
            shelf.forget(&oldest);
        }
    }

    /// The response of this id.
    ///
    /// # Errors
    /// There is none, or none any more.
    pub fn find(&self, id: &str, field: &str) -> Parsed<Kept> {
        let shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = shelf.kept.get(id).map(|(kept, _)| kept.clone());
        kept.ok_or_else(|| {
            let why = format!(
                "there is no response {id:?}: the last {COUNT_MAX} are kept, until the server stops"
            );
            Refusal { status: 404, ..Refusal::field(field, why) }
        })
    }

    /// Forgets a response; says whether it was there.
    pub fn remove(&self, id: &str) -> bool {
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.order.retain(|kept| kept != id);
        shelf.forget(id)
    }
}

impl Shelf {
    fn forget(&mut self, id: &str) -> bool {
        let gone = self.kept.remove(id);
        self.bytes -= gone.as_ref().map_or(0, |(_, bytes)| *bytes);
        gone.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn kept(bytes: usize) -> Kept {
        Kept { messages: vec![json!("x".repeat(bytes))], response: json!({}) }
    }

    #[test]
    fn the_oldest_go_when_there_is_no_room() {
        let store = ResponseStore::default();
        for id in 0..=COUNT_MAX {
            store.keep(&id.to_string(), kept(1));
        }
        assert!(store.find("0", "id").is_err() && store.find("1", "id").is_ok());
        store.keep("large", kept(BYTES_MAX - 100));
        assert!(store.find("2", "id").is_err() && store.find("large", "id").is_ok());
        assert!(store.remove("large") && !store.remove("large"));
        assert!(store.find("large", "previous_response_id").unwrap_err().status == 404);
    }
}
