//! Every arithmetic on the built-in model: how far its logits are from f32, and what changes nothing.
//!
//! A distance is the root mean square of the differences over that of the f32 logits. Within one
//! arithmetic threads change no bit; whether tokens come one by one or together changes the order
//! of sums, no more.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use flash_moe_engine::Arithmetic;
use flash_moe_engine::container::Container;
use flash_moe_engine::engine::{Engine, Options};
use flash_moe_engine::session::Session;
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::store::IoMode;

const PROMPT: usize = 24;

/// Logits after a prompt and after each of six more tokens.
fn logits(arithmetic: Arithmetic, threads: usize, prefill_chunk: usize) -> Vec<f32> {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    let container = Container::open(&tiny).expect("the built-in model");
    let options = Options {
        threads,
        arithmetic,
        memory_bytes: Some(512 << 20),
        context: Some(64),
        io: IoMode::Buffered,
        prefill_chunk,
        readers: 2,
        ..Options::default()
    };
    let engine = Arc::new(Engine::open(container, &options).expect("it opens"));
    let mut session = Session::new(&engine);
    let token = |i: usize| TokenId((i * 91 % 4000) as u32);
    let prompt: Vec<TokenId> = (0..PROMPT).map(token).collect();
    session.prefill(&prompt, &mut |_| ControlFlow::Continue(())).expect("a prompt");
    let mut all = session.logits().to_vec();
    for i in PROMPT..PROMPT + 6 {
        session.step(token(i)).expect("a step");
        all.extend(session.logits());
    }
    all
}

fn distance(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (error / want.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
}

#[test]
fn logits_are_as_near_to_f32_as_documented() {
    for chunk in [1, PROMPT] {
        let exact = logits(Arithmetic::Exact, 2, chunk);
        for (arithmetic, limit) in [(Arithmetic::Fixed16, 3e-4), (Arithmetic::Fast8, 2e-1)] {
            let distance = distance(&logits(arithmetic, 2, chunk), &exact);
            println!("{arithmetic:?}, chunks of {chunk}: {distance:.1e}");
            assert!(distance <= limit, "{arithmetic:?}, chunks of {chunk}: {distance:e}");
            assert!(distance > 0.0, "{arithmetic:?} was not used");
        }
    }
}

#[test]
fn threads_change_no_bit_and_chunks_only_the_order_of_sums() {
    for arithmetic in [Arithmetic::Exact, Arithmetic::Fixed16, Arithmetic::Fast8] {
        let one = logits(arithmetic, 1, PROMPT);
        assert_eq!(logits(arithmetic, 3, PROMPT), one, "{arithmetic:?}");
        let apart = distance(&logits(arithmetic, 1, 7), &one);
        println!("{arithmetic:?}, other chunks: {apart:.1e}");
        // A sum in another order may round an activation to the next integer.
        let limit = if arithmetic == Arithmetic::Fast8 { 1e-1 } else { 2e-4 };
        assert!(apart <= limit, "{arithmetic:?}: {apart:e}");
    }
}
