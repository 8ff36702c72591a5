//! Answers that are sent as they come, as server-sent events.
//!
//! An interface says what each event of a text looks like; this sends it, with a comment where a
//! client would otherwise hear nothing: while the text waits for its turn and while its prompt is
//! computed. When the client goes away the body is dropped, and with it the receiver.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use axum::response::Response;
use futures_util::stream;
use serde_json::Value as Json;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;

use super::schedule::{Event, Failure};

/// Longest silence.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// How an interface writes the events of its texts.
pub trait Translate: Send + 'static {
    /// What is sent for an event of the text `index`; possibly nothing.
    fn event(&mut self, index: usize, event: Event) -> String;

    /// What is sent at the end when all texts are over.
    fn end(&mut self) -> String;
}

struct Pump<T> {
    events: UnboundedReceiver<(usize, Event)>,
    translate: T,
    open: usize, // texts that are not over
    prompt: usize,
}

/// The response that sends `texts` texts.
pub fn response(
    events: UnboundedReceiver<(usize, Event)>,
    texts: usize,
    translate: impl Translate,
) -> Response {
    let pump = Pump { events, translate, open: texts, prompt: 0 };
    let body = Body::from_stream(stream::unfold(Some(pump), |pump| async {
        let mut pump = pump?;
        let text = pump.next().await;
        let bytes = Ok::<_, Infallible>(Bytes::from(text));
        Some((bytes, (pump.open > 0).then_some(pump)))
    }));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies such as nginx would otherwise collect the events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<T: Translate> Pump<T> {
    /// The next text to send.
    async fn next(&mut self) -> String {
        loop {
            let text = match timeout(SILENCE_MAX, self.events.recv()).await {
                Err(_) => ": waiting\n\n".into(),
                Ok(Some((index, event))) => self.say(index, event),
                Ok(None) => {
                    self.open = 1;
                    self.say(0, Event::Failed(Failure::Shutdown))
                }
            };
            if !text.is_empty() {
                return text;
            }
        }
    }

    fn say(&mut self, index: usize, event: Event) -> String {
        match &event {
            Event::Started(usage) => self.prompt = usage.prompt,
            Event::Prefilled(done) => return format!(": prompt {done}/{}\n\n", self.prompt),
            // What has failed for one text is told once and ends them all.
            Event::Failed(_) => self.open = 1,
            Event::Token { .. } | Event::Done(_) => {}
        }
        let over = matches!(event, Event::Done(_) | Event::Failed(_));
        let mut text = self.translate.event(index, event);
        if over {
            self.open -= 1;
            if self.open == 0 {
                text += &self.translate.end();
            }
        }
        text
    }
}

/// An event without a name.
pub fn data(value: &Json) -> String {
    format!("data: {value}\n\n")
}

/// An event with a name.
pub fn named(name: &str, value: &Json) -> String {
    format!("event: {name}\ndata: {value}\n\n")
}
