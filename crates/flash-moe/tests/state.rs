//! Checkpoints of a session: what follows one is bit for bit what would have followed anyway.
//!
//! On the built-in model, around the borders of pages. Timelines that share pages must not see each
//! other, a session that met an error must work again, and what a checkpoint is said to hold must be
//! what it holds. A file of a state gives the same state or an error, whatever its bytes.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flash_moe_engine::container::Container;
use flash_moe_engine::engine::{Engine, Options};
use flash_moe_engine::kv_cache::KvFormat;
use flash_moe_engine::session::{Checkpoint, Session, StateReader};
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::{Arithmetic, Error, Result};
use flash_moe_kernels::Isa;

use crate::ledger;

/// Bytes of a page of the built-in model: keys and values of its KV heads at 64 positions.
fn page_bytes(engine: &Engine) -> u64 {
    let a = &engine.shape().attention;
    (2 * a.kv_heads * a.head_dim * 64 * size_of::<f32>()) as u64
}

fn engine(change: impl FnOnce(&mut Options)) -> Arc<Engine> {
    let container = Container::open(&ledger::tiny()).expect("the built-in model");
    let mut options = ledger::options(&container, Isa::detect());
    options.memory_bytes = Some(1 << 30);
    options.prefill_chunk = 50;
    change(&mut options);
    Arc::new(Engine::open(container, &options).expect("it opens"))
}

fn prompt(tokens: usize) -> Vec<TokenId> {
    (0..tokens).map(|i| TokenId((i * 37 % 4000) as u32)).collect()
}

fn at(engine: &Arc<Engine>, tokens: usize) -> Session {
    let mut session = Session::new(engine);
    session.prefill(&prompt(tokens), &mut |_| ControlFlow::Continue(())).expect("a prefill");
    session
}

/// Takes tokens of its own choice that begin with `seed`, and gives all logits.
fn continued(session: &mut Session, seed: u32, steps: usize) -> Vec<u32> {
    let mut bits = Vec::new();
    for step in 0..steps as u32 {
        session.step(TokenId((seed + 91 * step) % 4000)).expect("a step");
        bits.extend(session.logits().iter().map(|l| l.to_bits()));
    }
    bits
}

fn kept(session: &Session) -> Checkpoint {
    session.checkpoint().expect("a session without an error")
}

#[test]
fn after_a_restore_the_continuation_is_bit_identical() {
    let engine = engine(|_| {});
    for tokens in [1, 3, 63, 64, 65, 100, 128] {
        let mut session = at(&engine, tokens);
        let first = session.logits().to_vec();
        let checkpoint = kept(&session);
        let never_left = continued(&mut session, 5, 70);
        session.restore(&checkpoint).expect("the same engine");
        assert_eq!((session.position(), session.logits()), (tokens, &first[..]));
        assert_eq!(session.tokens(), prompt(tokens));
        assert!(continued(&mut session, 5, 70) == never_left, "{tokens} tokens, same session");
        let mut other = Session::new(&engine);
        continued(&mut other, 9, 2);
        other.restore(&checkpoint).expect("the same engine");
        assert!(continued(&mut other, 5, 70) == never_left, "{tokens} tokens, another session");
    }
}

#[test]
fn formats_with_codes_are_kept_and_restored_alike() {
    for format in ["int8", "tq2", "k4v3"] {
        let kept_so = format.parse::<KvFormat>().expect("a format").with_window(1, 1);
        let engine = engine(|options| options.kv_cache = kept_so);
        // The second page is coded at position 192: before the checkpoint, and after it.
        for tokens in [150, 200] {
            let mut session = at(&engine, tokens);
            let checkpoint = kept(&session);
            let file = file_of(&checkpoint);
            let never_left = continued(&mut session, 5, 50);
            session.restore(&checkpoint).expect("the same engine");
            assert!(continued(&mut session, 5, 50) == never_left, "{format}, {tokens} tokens");
            let from_file = read(&engine, &file).expect("what was written");
            session.restore(&from_file).expect("the same engine");
            assert!(continued(&mut session, 5, 50) == never_left, "{format}, {tokens} from a file");
        }
    }
}

#[test]
fn timelines_from_one_checkpoint_do_not_disturb_each_other() {
    let engine = engine(|_| {});
    for tokens in [40, 64, 90] {
        let checkpoint = kept(&at(&engine, tokens));
        let restored = || {
            let mut session = Session::new(&engine);
            session.restore(&checkpoint).expect("the same engine");
            session
        };
        let alone = [11, 12].map(|seed| continued(&mut restored(), seed, 40));
        let (mut one, mut two) = (restored(), restored());
        let mut together = [Vec::new(), Vec::new()];
        for step in 0..40 {
            together[0].extend(continued(&mut one, 11 + 91 * step, 1));
            together[1].extend(continued(&mut two, 12 + 91 * step, 1));
        }
        assert!(alone == together && alone[0] != alone[1], "{tokens} tokens");
    }
}

#[test]
fn a_prefix_is_held_once() {
    let engine = engine(|_| {});
    let layers = 3;
    let mut session = at(&engine, 130);
    let [first, again] = [kept(&session), kept(&session)];
    let copies = first.own_bytes();
    assert_eq!(Checkpoint::bytes_of_all([&first]), copies + layers * 3 * page_bytes(&engine));
    let both = Checkpoint::bytes_of_all([&first, &again]);
    assert_eq!(both, 2 * copies + layers * 3 * page_bytes(&engine));
    drop(again);
    // The session goes on in a copy of the page that was not full.
    continued(&mut session, 1, 1);
    assert_eq!(first.own_bytes(), copies + layers * page_bytes(&engine));
    drop(session);
    assert_eq!(first.own_bytes(), Checkpoint::bytes_of_all([&first]));
}

#[test]
fn a_checkpoint_of_other_settings_or_beyond_the_context_is_refused() {
    let small = engine(|_| {});
    let checkpoint = kept(&at(&small, 30));
    let refused = |change: fn(&mut Options), says: &str| {
        let engine = engine(change);
        let mut session = at(&engine, 2);
        let error = session.restore(&checkpoint).expect_err(says).to_string();
        assert!(error.starts_with("state: ") && error.contains(says), "{error}");
        assert_eq!(session.position(), 2);
        continued(&mut session, 1, 1);
    };
    refused(|options| options.arithmetic = Arithmetic::Exact, "--exact");
    refused(|options| options.experts_per_token = Some(2), "--experts-per-token 4");
    refused(|options| options.context = Some(29), "--context 30");
    refused(|options| options.kv_cache = KvFormat::F16, "give --kv-cache f32");
}

#[test]
fn a_chunk_that_is_given_up_leaves_a_session_that_a_checkpoint_brings_back() {
    let engine = engine(|_| ());
    let expected = continued(&mut at(&engine, 70), 5, 3);
    let mut session = at(&engine, 70);
    let before = kept(&session);
    let switch = Arc::new(AtomicBool::new(true));
    session.give_up_on(Arc::clone(&switch));
    let outcome = session.prefill(&prompt(9), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(outcome, Err(Error::Stopped)), "{outcome:?}");
    assert_eq!(session.position(), 70);
    switch.store(false, Ordering::Relaxed);
    let refused = session.step(TokenId(1)).unwrap_err().to_string();
    assert!(refused.contains("restore a checkpoint"), "{refused}");
    session.restore(&before).expect("a checkpoint of this engine");
    // A token is never given up: what has begun is said.
    switch.store(true, Ordering::Relaxed);
    assert_eq!(continued(&mut session, 5, 3), expected);
}

fn file_of(checkpoint: &Checkpoint) -> Vec<u8> {
    let mut bytes = Vec::new();
    checkpoint.write(&mut bytes).expect("memory takes what is written");
    bytes
}

fn read(engine: &Engine, bytes: &[u8]) -> Result<Checkpoint> {
    StateReader::new(bytes)?.read(engine)
}

#[test]
fn a_state_from_a_file_continues_bit_for_bit() {
    let engine = engine(|_| {});
    for tokens in [1, 64, 100] {
        let mut session = at(&engine, tokens);
        let file = file_of(&kept(&session));
        let mut of_session = Vec::new();
        session.write_state(&mut of_session).expect("memory takes what is written");
        assert_eq!(of_session, file, "{tokens} tokens");
        let never_left = continued(&mut session, 5, 70);
        let checkpoint = read(&engine, &file).expect("what was written");
        assert_eq!(file_of(&checkpoint), file, "{tokens} tokens");
        assert_eq!(checkpoint.tokens(), prompt(tokens));
        session.restore(&checkpoint).expect("the same engine");
        assert!(continued(&mut session, 5, 70) == never_left, "{tokens} tokens");
    }
}

#[test]
fn every_flipped_or_missing_byte_of_a_file_is_an_error_that_says_what_to_do() {
    let engine = engine(|_| {});
    let whole = file_of(&kept(&at(&engine, 66)));
    let refused = |bytes: &[u8], what: &str| {
        let error = read(&engine, bytes).err().unwrap_or_else(|| panic!("{what} was taken"));
        let error = error.to_string();
        assert!(error.starts_with("state: "), "{what}: {error}");
        error
    };
    // All of the header, all of the end, and places all over the rest.
    let header = 600;
    let places = (0..header).chain((header..whole.len()).step_by(whole.len() / 150));
    for at in places.chain(whole.len() - 16..whole.len()) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        refused(&bytes, &format!("byte {at} flipped"));
        if at % 7 == 0 {
            let said = refused(&whole[..at], &format!("{at} bytes"));
            assert!(said.contains("--save-state"), "{said}");
        }
    }
    let longer = [&whole[..], &[0]].concat();
    assert!(refused(&longer, "a byte more").contains("goes on after its end"));
    assert!(refused(b"\x89PNG\r\n\x1a\n plain bytes", "a picture").contains("no file of"));
    let mut later = whole.clone();
    later[8] = 2;
    assert!(refused(&later, "a later version").contains("version 2, this build reads 1"));
    read(&engine, &whole).expect("the file itself");
}

#[test]
fn a_file_of_other_settings_is_refused_before_its_contents_are_read() {
    let here = engine(|_| {});
    let file = file_of(&kept(&at(&here, 5)));
    let other = engine(|options| options.arithmetic = Arithmetic::Fast8);
    let error = read(&other, &file[..file.len() / 2]).err().expect("other activations");
    assert!(error.to_string().contains("made with activations fixed16"), "{error}");
}
