//! What a reply is taken apart into, and that it does not depend on how the text was cut.
//!
//! The property tests draw texts from tags, their beginnings and words that are told apart, so that
//! anything lost or reordered shows.

use super::*;
use proptest::prelude::*;
use serde_json::json;

fn tools(format: CallFormat) -> Tools {
    let parameters = json!({ "type": "object", "properties": {
        "city": { "type": "string" }, "days": { "type": "integer" }, "opts": { "type": "object" }
    } });
    let tool = |name: &str| Tool { name: name.into(), parameters: parameters.clone() };
    Tools { format, offered: vec![tool("get"), tool("get_weather")], calls_max: None }
}

/// Parts of a text pushed in pieces of at most `size` characters, neighbours of a kind joined.
fn parts_of(reply: &mut Reply, text: &str, size: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    let characters: Vec<char> = text.chars().collect();
    for piece in characters.chunks(size) {
        reply.push(&piece.iter().collect::<String>(), &mut parts);
    }
    reply.finish(&mut parts);
    joined(parts)
}

fn joined(parts: Vec<Part>) -> Vec<Part> {
    let mut whole: Vec<Part> = Vec::new();
    for part in parts {
        match (whole.last_mut(), part) {
            (Some(Part::Thinking(text)), Part::Thinking(more))
            | (Some(Part::Content(text)), Part::Content(more))
            | (Some(Part::Arguments(text)), Part::Arguments(more)) => text.push_str(&more),
            (_, part) => whole.push(part),
        }
    }
    whole
}

/// The parts, the same for every way of cutting the text.
fn parts(start: Start, stops: &[&str], format: Option<CallFormat>, text: &str) -> Vec<Part> {
    let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
    let reply = || Reply::new(start, stops.clone(), format.map(tools));
    let whole = parts_of(&mut reply(), text, usize::MAX);
    for size in 1..8 {
        assert_eq!(parts_of(&mut reply(), text, size), whole, "{text:?} in pieces of {size}");
    }
    whole
}

fn thinking(text: &str) -> Part {
    Part::Thinking(text.into())
}

fn content(text: &str) -> Part {
    Part::Content(text.into())
}

fn call(name: &str, arguments: &str) -> [Part; 3] {
    [Part::CallBegins(name.into()), Part::Arguments(arguments.into()), Part::CallEnds]
}

#[test]
fn thinking_and_answer_are_told_apart() {
    let hm = [thinking("hm\n so"), content("yes \n")];
    assert_eq!(parts(Start::Thinking, &[], None, "hm\n so\n</think>\n\nyes \n"), hm);
    assert_eq!(parts(Start::Either, &[], None, "\n<think>\nhm\n so</think>yes \n"), hm);
    assert_eq!(parts(Start::Either, &[], None, " a <think>b"), [content(" a <think>b")]);
    assert_eq!(parts(Start::Content, &[], None, "<think>b</think>"), [content("<think>b</think>")]);
    assert_eq!(parts(Start::Thinking, &[], None, "a </thin"), [thinking("a </thin")]);
    assert_eq!(parts(Start::Thinking, &[], None, "\n</think>\n\n"), []);
}

#[test]
fn stop_texts_end_the_answer_and_not_the_thinking() {
    let text = "a END b</think>one END two";
    assert_eq!(
        parts(Start::Thinking, &["END"], None, text),
        [thinking("a END b"), content("one ")]
    );
    assert_eq!(parts(Start::Content, &["ef", "cd"], None, "abcdef"), [content("ab")]);
    assert_eq!(parts(Start::Content, &["END"], None, "ENEN"), [content("ENEN")]);
    let mut reply = Reply::new(Start::Content, vec!["b".into(), String::new()], None);
    parts_of(&mut reply, "abc", 1);
    assert_eq!(reply.ended(), Some(&Ended::StopText("b".into())));
}

#[test]
fn text_is_held_back_no_longer_than_it_must_be() {
    let mut reply = Reply::new(Start::Content, vec!["END".into()], None);
    let mut seen = Vec::new();
    for piece in ["one \n", "E", "N", "x", "EN"] {
        let mut parts = Vec::new();
        reply.push(piece, &mut parts);
        seen.push(parts);
    }
    let expected = [vec![content("one \n")], vec![], vec![], vec![content("ENx")], vec![]];
    assert_eq!(seen, expected);
}

#[test]
fn tagged_calls_are_typed_by_the_schema() {
    let text = "I look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\n New\n\"York\"\n\
                </parameter>\n<parameter=days>\n5\n</parameter>\n<parameter=opts>\n{\"u\": [1]}\n\
                </parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get>\n</function>\n\
                </tool_call>";
    let arguments = "{\"city\": \" New\\n\\\"York\\\"\", \"days\": 5, \"opts\": {\"u\": [1]}}";
    let mut expected = vec![content("I look.")];
    expected.extend(call("get_weather", arguments));
    expected.extend(call("get", "{}"));
    assert_eq!(parts(Start::Content, &["York"], Some(CallFormat::Tagged), text), expected);
    let forgotten = format!("so\n{text}");
    let got = parts(Start::Thinking, &[], Some(CallFormat::Tagged), &forgotten);
    assert_eq!(got[0], thinking("so\nI look."));
    assert_eq!(got[1..], expected[1..]);
}

#[test]
fn strings_are_passed_on_before_they_are_whole() {
    let mut reply = Reply::new(Start::Content, Vec::new(), Some(tools(CallFormat::Tagged)));
    let mut parts = Vec::new();
    let begun = "<tool_call>\n<function=get>\n<parameter=city>\nPar";
    reply.push(begun, &mut parts);
    let expected = [
        Part::CallBegins("get".into()),
        Part::Arguments("{\"city\": ".into()),
        Part::Arguments("\"Par".into()),
    ];
    assert_eq!(parts, expected);
    parts.clear();
    reply.finish(&mut parts);
    assert_eq!(parts, [Part::Broken(begun.into())]);
}

#[test]
fn what_is_no_call_stays_text() {
    let tagged = Some(CallFormat::Tagged);
    for text in [
        "Use <tool_call> for that",
        "<tool_call>\n<function=unknown>\n</function>\n</tool_call>",
        "<tool_call>\n{\"name\": \"get\"}\n</tool_call>",
        "<tool_call>\n<function=get",
    ] {
        assert_eq!(parts(Start::Content, &[], tagged, text), [content(text)]);
    }
    let (begun, rest) =
        ("<tool_call><function=get>\n<parameter=city>\nx\n</parameter>", "\nno </a>");
    let broken = parts(Start::Content, &[], tagged, &format!("{begun}{rest}"));
    let expected = [
        Part::CallBegins("get".into()),
        Part::Arguments("{\"city\": \"x\"".into()),
        Part::Broken(begun.into()),
        content(rest),
    ];
    assert_eq!(broken, expected);
    let text = "<tool_call>\n<function=get>\n</function>\n</tool_call>";
    assert_eq!(parts(Start::Content, &[], None, text), [content(text)]);
}

#[test]
fn json_calls_are_read_in_either_order() {
    let json = Some(CallFormat::Json);
    let text = "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"city\": \"}\\\"{\", \"n\": [1, {}]}}\n\
                </tool_call>\n<tool_call>{\"arguments\": {\"days\": 2}, \"name\": \"get\"}</tool_call>ok";
    let mut expected = call("get", "{\"city\": \"}\\\"{\", \"n\": [1, {}]}").to_vec();
    expected.extend(call("get", "{\"days\":2}"));
    expected.push(content("ok"));
    assert_eq!(parts(Start::Content, &[], json, text), expected);
    for text in
        ["<tool_call>{\"name\": 5}</tool_call>", "<tool_call>{\"name\": \"got\", \"arguments\": {"]
    {
        assert_eq!(parts(Start::Content, &[], json, text), [content(text)]);
    }
    let begun = "<tool_call>{\"name\": \"get\", \"arguments\": {\"a\": b}}";
    let broken = parts(Start::Content, &[], json, &format!("{begun}</tool_call>"));
    let expected = [
        Part::CallBegins("get".into()),
        Part::Arguments("{\"a\": b".into()),
        Part::Broken(begun.into()),
        content("</tool_call>"),
    ];
    assert_eq!(broken, expected);
}

#[test]
fn a_reply_is_over_after_the_calls_it_may_make() {
    let one = Tools { calls_max: Some(1), ..tools(CallFormat::Tagged) };
    let mut reply = Reply::new(Start::Content, Vec::new(), Some(one));
    let text = "<tool_call>\n<function=get>\n</function>\n</tool_call>\nmore";
    assert_eq!(parts_of(&mut reply, text, 3), call("get", "{}"));
    assert_eq!((reply.ended(), reply.calls()), (Some(&Ended::Calls), 1));
}

const FRAGMENTS: [&str; 30] = [
    "<think>",
    "</think>",
    "</thi",
    "<tool_call>",
    "</tool_call>",
    "<tool_",
    "\n",
    "\n\n",
    " ",
    "<function=get>",
    "<function=get_weather>",
    "<function=",
    "</function>",
    "<parameter=city>",
    "<parameter=days>",
    "<parameter=other>",
    "</parameter>",
    "\n</parameter>",
    "</par",
    "{",
    "}",
    "{\"name\": \"get\", \"arguments\": {",
    "\"a\": 1",
    "}}",
    "\"",
    "\\",
    "\u{e9}",
    "STOP",
    "ST",
    "<",
];

fn texts() -> impl Strategy<Value = String> {
    let fragment = prop_oneof![
        3 => prop::sample::select(FRAGMENTS.to_vec()).prop_map(str::to_string),
        1 => (0..1000u32).prop_map(|n| format!("w{n:04}")),
        1 => Just("<tool_call>\n<function=get>\n<parameter=city>\n".to_string()),
    ];
    prop::collection::vec(fragment, 0..24).prop_map(|fragments| fragments.concat())
}

fn starts() -> impl Strategy<Value = Start> {
    prop::sample::select(vec![Start::Thinking, Start::Either, Start::Content])
}

fn formats() -> impl Strategy<Value = Option<CallFormat>> {
    prop::sample::select(vec![None, Some(CallFormat::Tagged), Some(CallFormat::Json)])
}

/// All text of the parts, calls by what was given of them.
fn text_of(parts: &[Part]) -> String {
    let texts = parts.iter().map(|part| match part {
        Part::Thinking(text) | Part::Content(text) | Part::Arguments(text) | Part::Broken(text) => {
            text.as_str()
        }
        Part::CallBegins(_) | Part::CallEnds => "",
    });
    texts.collect()
}

/// The words `w1234` of a text.
fn words(text: &str) -> Vec<String> {
    let places = text.match_indices('w').map(|(at, _)| text[at..].chars().take(5).collect());
    places
        .filter(|word: &String| word[1..].chars().filter(char::is_ascii_digit).count() == 4)
        .collect()
}

proptest! {
    #[test]
    fn the_parts_do_not_depend_on_how_the_text_is_cut(
        text in texts(), start in starts(), format in formats(), cuts in prop::collection::vec(1..9usize, 1..6),
    ) {
        let reply = || Reply::new(start, vec!["STOP".into(), "\n\n\n".into()], format.map(tools));
        let whole = parts_of(&mut reply(), &text, usize::MAX);
        for size in cuts {
            prop_assert_eq!(parts_of(&mut reply(), &text, size), whole.clone());
        }
    }

    #[test]
    fn no_word_is_lost_and_finished_calls_are_json(
        text in texts(), start in starts(), format in formats(),
    ) {
        let mut reply = Reply::new(start, Vec::new(), format.map(tools));
        let parts = parts_of(&mut reply, &text, 3);
        let shown = text_of(&parts);
        for word in words(&text) {
            prop_assert!(shown.contains(&word), "{} of {:?} is not in {:?}", word, text, parts);
        }
        for window in parts.windows(2) {
            if let [Part::Arguments(json), end] = window {
                let is_object = serde_json::from_str::<Json>(json).is_ok_and(|v| v.is_object());
                prop_assert_eq!(is_object, *end == Part::CallEnds, "{:?}", json);
            }
        }
    }

    #[test]
    fn without_tools_and_thinking_the_answer_is_the_text(text in texts()) {
        let mut reply = Reply::new(Start::Content, Vec::new(), None);
        prop_assert_eq!(text_of(&parts_of(&mut reply, &text, 2)), text);
    }
}
