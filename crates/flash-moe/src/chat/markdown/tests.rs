//! What Markdown looks like, and that its arrival in pieces changes nothing.
//!
//! The streaming claim is held against texts put together from every kind of block and cut anywhere.

use proptest::prelude::*;

use super::*;
use crate::chat::line::{Color, Style, width};

fn texts(source: &str, columns: usize) -> Vec<String> {
    lines(source, columns).iter().map(|line| line.text().trim_end().to_string()).collect()
}

#[test]
fn blocks_look_like_what_they_are() {
    let family = "\u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467}";
    for (source, expected) in [
        (
            "# Title\n\nOne *two* **three** `four`\nfive",
            vec!["Title", "", "One two three four five"],
        ),
        ("a  \nb\n***\nc", vec!["a", "b", "", &"\u{2500}".repeat(30), "", "c"]),
        (
            "- a\n- b\n  - c\n\n    d\n- e",
            vec!["\u{2022} a", "\u{2022} b", "  \u{25e6} c", "", "    d", "\u{2022} e"],
        ),
        ("7. x\n8. y", vec!["7. x", "8. y"]),
        ("- [x] done\n- [ ] not", vec!["\u{2022} [x] done", "\u{2022} [ ] not"]),
        ("> q\n> > r\n\np", vec!["\u{2502} q", "\u{2502}", "\u{2502} \u{2502} r", "", "p"]),
        (
            "```rust\nlet x = 1;\n\nf(x)\n```\nafter",
            vec!["  let x = 1;", "", "  f(x)", "", "after"],
        ),
        ("[t](http://x) <http://y> ![p](z)", vec!["t (http://x) http://y image: p", "(z)"]),
        ("~~old~~ \\*raw\\* &lt;b&gt; <b>", vec!["old *raw* <b> <b>"]),
        ("one two three four five six seven", vec!["one two three four five six", "seven"]),
        (
            &format!("- {family} {} x", "\u{4f60}".repeat(14)),
            vec![
                &format!("\u{2022} {family} {}", "\u{4f60}".repeat(12)),
                &format!("  {} x", "\u{4f60}".repeat(2)),
            ],
        ),
        ("&#27;[2J a\u{1b}[31m", vec!["\u{241b}[2J a\u{241b}[31m"]),
        ("", vec![]),
    ] {
        assert_eq!(texts(source, 30), expected, "{source:?}");
    }
}

#[test]
fn tables_are_aligned_narrowed_or_told_as_records() {
    let table = "| name | n |\n|:--|--:|\n| \u{4f60}\u{597d} | 1 |\n| a long cell of words | 22 |";
    assert_eq!(
        texts(table, 60),
        [
            "name                 \u{2502}  n",
            "\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{2500}\u{253c}\u{2500}\u{2500}\u{2500}",
            "\u{4f60}\u{597d}                 \u{2502}  1",
            "a long cell of words \u{2502} 22",
        ]
    );
    let narrow = texts(table, 16);
    assert!(narrow.iter().all(|row| width(row) <= 16), "{narrow:?}");
    assert_eq!(narrow[3], "a long cell \u{2502} 22");
    let wide = "|alpha|beta|gamma|delta|\n|-|-|-|-|\n|1|two words of text|3|4|";
    assert_eq!(
        texts(wide, 20),
        ["alpha: 1", "beta: two words of", "  text", "gamma: 3", "delta: 4"]
    );
}

#[test]
fn code_has_the_colours_of_its_language() {
    let code = lines("```rust\nfn f() -> u8 { 7 } // x\n```", 80);
    let style = |text: &str| code[0].spans.iter().find(|s| s.text.contains(text)).map(|s| s.style);
    assert_eq!(style("fn"), Some(Style::of(Color::Magenta)));
    assert_eq!(style("7"), Some(Style::of(Color::Cyan)));
    assert_eq!(style("x"), Some(Style::DIM));
    let plain = lines("```nonsense\nfn f()\n```", 80);
    assert!(plain[0].spans.iter().all(|span| span.style == Style::PLAIN));
    let long = format!("```rust\n{}\n```", "a = 1; ".repeat(1000));
    assert!(lines(&long, 80).iter().all(|line| line.width() <= 80));
}

#[test]
fn what_is_final_is_given_at_once_and_the_rest_is_small() {
    let mut stream = Stream::default();
    let given = |piece: &str, stream: &mut Stream| -> (Vec<String>, Vec<String>) {
        stream.push(piece);
        let settled = stream.settled(40).iter().map(Line::text).collect();
        (settled, stream.tail(40).iter().map(Line::text).collect())
    };
    let texts = |rows: &[&str]| rows.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(given("# He", &mut stream), (texts(&[]), texts(&["He"])));
    assert_eq!(given("ad\nSome **bo", &mut stream), (texts(&["Head"]), texts(&["", "Some bo"])));
    assert_eq!(given("ld**\n\n", &mut stream), (texts(&["", "Some bold"]), texts(&[])));
    assert_eq!(given("1. a\n1. b\n1. c", &mut stream).0, texts(&["", "1. a"]));
    assert_eq!(
        given("\n```py\nx = 1\ny", &mut stream),
        (texts(&["2. b", "3. c", "", "  x = 1"]), texts(&["  y"]))
    );
    assert_eq!(given("\n``", &mut stream), (texts(&["  y"]), texts(&[])));
    assert_eq!(given("`\nend", &mut stream), (texts(&[]), texts(&["", "end"])));
    assert_eq!(stream.finish(40).iter().map(Line::text).collect::<Vec<_>>(), ["", "end"]);
}

/// Work that a token costs does not grow with the answer: what is kept is the last block.
#[test]
fn a_long_answer_keeps_only_its_last_block() {
    let mut stream = Stream::default();
    let mut most = 0;
    for n in 0..2000 {
        stream
            .push(&format!("Paragraph {n} of the answer.\n\n- item\n- item\n\n```\ncode\n```\n\n"));
        stream.settled(80);
        most = most.max(stream.text.len());
    }
    assert!(most < 100, "{most} bytes are kept");
}

const BLOCKS: [&str; 14] = [
    "# Heading\n",
    "Words in *a* paragraph\nof **two** lines.\n\n",
    "- one\n- two\n  more of two\n- three\n",
    "- one\n\n- two\n\n",
    "1. one\n2. two\n   - nested\n3. three\n\n",
    "> quoted\n> text\n\n",
    "```rust\nlet a = 1;\n\n// x\n```\n",
    "~~~\n``` not an end\n~~~\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    "---\n\n",
    "Setext\n======\n\n",
    "\u{4f60}\u{597d} \u{1f600} wide\n\n",
    "<div>\nhtml\n</div>\n\n",
    "-not a list\n\n",
];

proptest! {
    #[test]
    fn pieces_give_the_lines_of_the_whole(
        blocks in prop::collection::vec(0..BLOCKS.len(), 1..7),
        cuts in prop::collection::vec(1usize..9, 1..60),
        columns in 20usize..60,
    ) {
        let text: String = blocks.iter().map(|&block| BLOCKS[block]).collect();
        let whole: Vec<String> = lines(&text, columns).iter().map(Line::text).collect();
        let mut stream = Stream::default();
        let mut streamed = Vec::new();
        let mut rest = text.as_str();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let cut = rest.char_indices().map(|(at, _)| at).nth(*cut).unwrap_or(rest.len());
            stream.push(&rest[..cut]);
            rest = &rest[cut..];
            streamed.extend(stream.settled(columns));
            // The rows of what is not final are never wider than the screen either.
            prop_assert!(stream.tail(columns).iter().all(|line| line.width() <= columns));
        }
        streamed.extend(stream.finish(columns));
        prop_assert!(streamed.iter().all(|line| line.width() <= columns));
        let streamed: Vec<String> = streamed.iter().map(Line::text).collect();
        prop_assert_eq!(streamed, whole, "{}", text);
    }
}
