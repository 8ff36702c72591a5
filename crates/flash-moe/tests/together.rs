//! Timelines that step together get the bits that each gets alone, and share what is read.
//!
//! On every variant, in several formats of the KV cache, with timelines that join one after the other
//! and with more of them than one pass takes. What goes wrong for one stays with that one.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use flash_moe_engine::Arithmetic;
use flash_moe_engine::budget::Budget;
use flash_moe_engine::container::Container;
use flash_moe_engine::engine::{Engine, Options};
use flash_moe_engine::session::{Session, Together};
use flash_moe_engine::shape::TokenId;
use flash_moe_kernels::Isa;

use crate::fixture::{VARIANTS, converted_variant};
use crate::ledger;
use crate::program::text;

const STEPS: usize = 20;

fn open(dir: &Path, change: impl FnOnce(&mut Options)) -> Arc<Engine> {
    let container = Container::open(dir).expect("a model");
    let mut options = ledger::options(&container, Isa::detect());
    options.memory_bytes = Some(1 << 30);
    options.sessions = 20;
    change(&mut options);
    Arc::new(Engine::open(container, &options).expect("it opens"))
}

/// With a pool of one token's experts.
fn open_small(dir: &Path) -> Arc<Engine> {
    open(dir, |options| {
        let container = Container::open(dir).expect("a model");
        let plan = Budget::plan(&container, options).expect("a plan");
        options.memory_bytes = Some(plan.smallest());
    })
}

/// Timeline number i after a prompt of its own.
fn timeline(engine: &Arc<Engine>, i: usize) -> Session {
    let mut session = Session::new(engine);
    let prompt: Vec<TokenId> =
        (0..1 + 13 * i).map(|t| TokenId((t * 31 + i) as u32 % 400)).collect();
    session.prefill(&prompt, &mut |_| ControlFlow::Continue(())).expect("a prefill");
    session
}

fn token(timeline: usize, step: usize) -> TokenId {
    TokenId(((timeline + 1) * (step + 3) * 17 % 400) as u32)
}

fn bits(session: &Session) -> Vec<u32> {
    session.logits().iter().map(|l| l.to_bits()).collect()
}

/// Logits of every step of every timeline, each alone.
fn alone(engine: &Arc<Engine>, timelines: usize) -> Vec<Vec<Vec<u32>>> {
    let of = |i| {
        let mut session = timeline(engine, i);
        let step = |s| {
            session.step(token(i, s)).expect("a step");
            bits(&session)
        };
        (0..STEPS).map(step).collect()
    };
    (0..timelines).map(of).collect()
}

/// As [`alone`], with all that are there stepping together; timeline i joins at step i.
fn together(engine: &Arc<Engine>, timelines: usize) -> Vec<Vec<Vec<u32>>> {
    let mut together = Together::new(engine);
    let mut sessions: Vec<Session> = (0..timelines).map(|i| timeline(engine, i)).collect();
    let mut all = vec![Vec::new(); timelines];
    for round in 0..STEPS + timelines {
        let there = sessions.iter_mut().enumerate();
        let there = there.filter(|(i, _)| (*i..*i + STEPS).contains(&round));
        let mut steps: Vec<_> = there.map(|(i, s)| (s, token(i, round - i))).collect();
        for outcome in together.step(&mut steps) {
            outcome.expect("a step");
        }
        for (i, session) in sessions.iter().enumerate() {
            if (i..i + STEPS).contains(&round) {
                all[i].push(bits(session));
            }
        }
    }
    all
}

#[test]
fn every_timeline_gets_the_bits_it_gets_alone() {
    for variant in VARIANTS {
        let home = converted_variant(variant, &[]);
        let dir = home.path("container");
        for arithmetic in [Arithmetic::Exact, Arithmetic::Fixed16] {
            let engine = open(&dir, |options| options.arithmetic = arithmetic);
            let same = together(&engine, 3) == alone(&engine, 3);
            assert!(same, "{variant}, {}", arithmetic.name());
        }
    }
    // 18: more than one pass holds.
    for (format, threads, timelines) in
        [("f32", 3, 18), ("f16", 1, 2), ("int8", 2, 3), ("tq2", 2, 3)]
    {
        let engine = open(&ledger::tiny(), |options| {
            options.kv_cache = format.parse().expect("a format");
            options.threads = threads;
        });
        assert!(together(&engine, timelines) == alone(&engine, timelines), "{format}");
    }
}

#[test]
fn an_expert_is_read_once_for_all() {
    let read = |step: fn(&Arc<Engine>, &mut [(&mut Session, TokenId)])| {
        let engine = open_small(&ledger::tiny());
        let mut sessions: Vec<Session> = (0..8).map(|i| timeline(&engine, i)).collect();
        let before = engine.store().counters();
        for s in 0..STEPS {
            let steps = sessions.iter_mut().enumerate().map(|(i, session)| (session, token(i, s)));
            step(&engine, &mut steps.collect::<Vec<_>>());
        }
        engine.store().counters().since(&before).read_bytes
    };
    let one_by_one = read(|_, steps| {
        for (session, token) in steps {
            session.step(*token).expect("a step");
        }
    });
    let at_once = read(|engine, steps| {
        for outcome in Together::new(engine).step(steps) {
            outcome.expect("a step");
        }
    });
    // Of the 4 experts of each of 8 tokens, among 48, about 23 differ.
    assert!(5 * at_once < 4 * one_by_one, "{at_once} bytes together, {one_by_one} alone");
}

#[test]
fn what_is_wrong_with_one_timeline_does_not_touch_the_others() {
    let engine = open(&ledger::tiny(), |_| {});
    let want = alone(&engine, 2);
    let mut together = Together::new(&engine);
    let mut sessions: Vec<Session> = [0, 1, 1].map(|i| timeline(&engine, i)).into();
    let [first, second, third] = &mut sessions[..] else { unreachable!("three timelines") };
    let beyond = TokenId(engine.shape().vocab as u32);
    let mut steps = [(first, token(0, 0)), (third, beyond), (second, token(1, 0))];
    let outcomes = together.step(&mut steps);
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok());
    let error = outcomes[1].as_ref().expect_err("no such token").to_string();
    assert!(error.contains(&beyond.0.to_string()), "{error}");
    assert_eq!([bits(&sessions[0]), bits(&sessions[1])], [want[0][0].clone(), want[1][0].clone()]);
    // It refused before it took anything.
    sessions[2].step(token(1, 0)).expect("a whole session");
    assert_eq!(bits(&sessions[2]), want[1][0]);
}

#[test]
fn a_failed_read_fails_those_that_needed_it_and_a_checkpoint_brings_them_back() {
    let home = converted_variant("q35-r2", &[]);
    let dir = home.path("container");
    let engine = open_small(&dir);
    let want = alone(&engine, 2);
    let mut sessions: Vec<Session> = (0..2).map(|i| timeline(&engine, i)).collect();
    let kept: Vec<_> = sessions.iter().map(|s| s.checkpoint().expect("a whole session")).collect();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir.join("experts")).expect("expert files") {
        let path = entry.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("a layer file");
        // Cut in place: the engine has it open.
        std::fs::write(&path, []).unwrap_or_else(|e| panic!("{}: {e}", text(&path)));
        files.push((path, bytes));
    }
    let mut together = Together::new(&engine);
    let mut step = |sessions: &mut [Session], number| {
        let steps = sessions.iter_mut().enumerate().map(|(i, s)| (s, token(i, number)));
        together.step(&mut steps.collect::<Vec<_>>())
    };
    // What is in the pool may be enough for a while.
    let mut number = 0;
    while step(&mut sessions, number).iter().all(Result::is_ok) {
        number += 1;
        assert!(number < STEPS, "some expert must be read");
    }
    for outcome in step(&mut sessions, number) {
        let error = outcome.expect_err("both were in that pass").to_string();
        assert!(error.contains("met an error before"), "{error}");
    }
    files.iter().for_each(|(path, bytes)| std::fs::write(path, bytes).expect("a layer file"));
    for (session, kept) in sessions.iter_mut().zip(&kept) {
        session.restore(kept).expect("the same engine");
    }
    for outcome in step(&mut sessions, 0) {
        outcome.expect("all can be read again");
    }
    for (session, want) in sessions.iter().zip(&want) {
        assert_eq!(bits(session), want[0]);
    }
}
