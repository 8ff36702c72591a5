//! For people and monitors: the page, `/health`, `/metrics` and the numbers of the live panel.
//!
//! The page is one file inside the program and asks for nothing from elsewhere. The panel's numbers
//! only grow; whoever shows them makes rates of their differences.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::{CONTENT_SECURITY_POLICY, HeaderValue};
use axum::response::Response;
use serde_json::{Value as Json, json};

use super::metrics::{Gauges, Kind};
use super::route::{Server, health_json, json_response, text_response};

/// The page.
const PAGE: &str = include_str!("page.html");
/// The page may load nothing but itself and talk to nobody but us.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                      connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'";

/// `GET /`
pub async fn page() -> Response {
    let mut response = text_response("text/html; charset=utf-8", PAGE.into());
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

/// `GET /health`
pub async fn health(State(server): State<Arc<Server>>) -> Response {
    json_response(&health_json(&server))
}

/// `GET /metrics`
pub async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    text_response(kind, server.metrics.text(&gauges(&server)))
}

fn gauges(server: &Server) -> Gauges {
    use Kind::{Counter, Gauge};
    let store = server.model.engine.store();
    let (reads, (used, slots)) = (store.counters(), store.occupancy());
    let (live, waiting) = server.schedule.load();
    let kv = server.metrics.positions.get() as f64;
    let room = server.model.engine.context() * server.model.engine.budget().sessions;
    let metrics = &server.metrics;
    let (cached, evicted) = (metrics.cached_tokens.get(), metrics.prefix_evictions.get());
    let (prefixes, bytes) = (metrics.prefixes.get(), metrics.prefix_bytes.get());
    let loads = metrics.prefix_loads.get();
    let (writing, losses) = (metrics.prefix_writing.get(), metrics.prefix_losses.get());
    let values = vec![
        ("flash_moe_expert_hits_total", "Experts found in the pool.", Counter, reads.hits as f64),
        ("flash_moe_expert_misses_total", "Experts read.", Counter, reads.misses as f64),
        ("flash_moe_read_bytes_total", "Bytes read.", Counter, reads.read_bytes as f64),
        (
            "flash_moe_stall_seconds_total",
            "Time that compute waited for reads.",
            Counter,
            reads.wait_ns as f64 / 1e9,
        ),
        ("flash_moe_expert_hit_rate", "Hits over hits and misses.", Gauge, reads.hit_rate()),
        ("flash_moe_pool_slots", "Slots of the pool.", Gauge, slots as f64),
        ("flash_moe_pool_slots_used", "Slots that hold an expert.", Gauge, used as f64),
        ("flash_moe_context_tokens", "Tokens that all contexts hold.", Gauge, room as f64),
        ("flash_moe_context_tokens_used", "Tokens in live contexts.", Gauge, kv),
        ("flash_moe_cached_tokens_total", "Prompt tokens not computed.", Counter, cached as f64),
        ("flash_moe_prefixes", "Checkpoints in memory.", Gauge, prefixes as f64),
        ("flash_moe_prefix_bytes", "Memory of the checkpoints.", Gauge, bytes as f64),
        (
            "flash_moe_prefix_evictions_total",
            "Checkpoints that made room.",
            Counter,
            evicted as f64,
        ),
        ("flash_moe_prefix_loads_total", "Checkpoints read from disk.", Counter, loads as f64),
        (
            "flash_moe_prefix_writing",
            "Checkpoints and answers to be written.",
            Gauge,
            writing as f64,
        ),
        ("flash_moe_prefix_losses_total", "Checkpoints not written.", Counter, losses as f64),
        ("flash_moe_live", "Texts that have their turn.", Gauge, live as f64),
        ("flash_moe_waiting", "Texts that wait for it.", Gauge, waiting as f64),
    ];
    Gauges { values }
}

/// `GET /live`
pub async fn live(State(server): State<Arc<Server>>) -> Response {
    let store = server.model.engine.store();
    let (reads, (used, slots)) = (store.counters(), store.occupancy());
    let (live, waiting) = server.schedule.load();
    let metrics = &server.metrics;
    let heat: Vec<Json> = store
        .uses()
        .iter()
        .map(|(layer, uses)| json!({ "layer": layer.0, "uses": uses }))
        .collect();
    json_response(&json!({
        "model": server.model.name,
        "live": live,
        "waiting": waiting,
        "prompt_tokens": metrics.prompt_tokens.get(),
        "generated_tokens": metrics.generated_tokens.get(),
        "prefill_seconds": metrics.prefill_seconds.seconds(),
        "decode_seconds": metrics.decode_seconds.seconds(),
        "hits": reads.hits,
        "misses": reads.misses,
        "read_bytes": reads.read_bytes,
        "stall_seconds": reads.wait_ns as f64 / 1e9,
        "slots": slots,
        "slots_used": used,
        "context_tokens_used": metrics.positions.get(),
        "heat": heat,
    }))
}
