//! Reads and heap allocations of decoding, counted in a program of its own.
//!
//! A counting allocator counts every thread of its process, so this program has one test and nothing
//! runs beside it. After the warm-up every buffer has its size: what is left is memory that grows
//! with the conversation, and `counts.json` says how much that is.

mod ledger;

use std::alloc::System;
use std::ops::ControlFlow;
use std::sync::Arc;

use flash_moe_engine::container::Container;
use flash_moe_engine::engine::Engine;
use flash_moe_engine::session::Session;
use flash_moe_engine::shape::TokenId;
use flash_moe_kernels::Isa;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const STEPS: usize = 64;

/// Takes the likeliest token so many times.
fn decode(session: &mut Session, steps: usize) {
    for _ in 0..steps {
        let logits = session.logits();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        session.step(TokenId(best.expect("logits") as u32)).expect("a step");
    }
}

#[test]
fn decoding_costs_no_more_than_the_counts_say() {
    let container = Container::open(&ledger::tiny()).expect("the built-in model");
    let options = ledger::options(&container, Isa::scalar());
    let engine = Arc::new(Engine::open(container, &options).expect("it opens"));
    assert_eq!(engine.budget().slots, ledger::SLOTS);
    let mut session = Session::new(&engine);
    let prompt: Vec<TokenId> = ledger::prompt().into_iter().map(TokenId).collect();
    session.prefill(&prompt, &mut |_| ControlFlow::Continue(())).expect("a prefill");
    decode(&mut session, STEPS);
    let (slots, used) = engine.store().occupancy();
    assert_eq!(slots, used, "the warm-up fills the pool");

    let before = engine.store().counters();
    let region = Region::new(ALLOCATOR);
    decode(&mut session, STEPS);
    let heap = region.change();
    let reads = engine.store().counters().since(&before);
    println!("{heap:?} {reads:?}");
    ledger::hold("allocations_in_64_steps", (heap.allocations + heap.reallocations) as u64);
    ledger::hold("reads_in_64_steps", reads.misses);
    ledger::hold("read_bytes_in_64_steps", reads.demanded_bytes());
    assert_eq!(reads.read_bytes, reads.demanded_bytes(), "nothing is read that no token needs");
}
