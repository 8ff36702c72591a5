//! The countable rules of STYLE.md, one test a rule.
//!
//! A rule is only as good as its scanner, so the first tests hold the scanner to small pieces of
//! source that break every rule. Each failure lists all places, so that one run shows all there is
//! to do.

use crate::source::{Source, root, sources, word};

/// Fails with every place that breaks a rule.
fn none(rule: &str, broken: impl IntoIterator<Item = String>) {
    let broken: Vec<String> = broken.into_iter().collect();
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

/// Applies a rule to every file.
fn every(rule: &str, check: impl Fn(&Source) -> Vec<String>) {
    none(rule, sources().iter().flat_map(check));
}

fn has_word(line: &str, wanted: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(wanted).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + wanted.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

const SAMPLE: &str = r##"//! One line.
/// Doc with a { brace.
pub(crate) fn odd<'a>(&self, f: fn(u8, u8) -> Vec<(u8, u8)>, [a, b]: [char; 2],) -> &'a str {
    let quotes = ('"', '\'', '{', "}\" {", r#"fn no() { " }"#);
    "fn not_this(a: u8) {"
}
struct Three<T> { a: Vec<(T, T)>, b: [u8; 2], c: fn(u8, u8) -> u8 }
struct Unit; struct Pair(u8, u8);
fn header_only();
fn after() { /* fn hidden() { */ }
"##;

#[test]
fn the_scanner_tells_code_from_comments_and_literals() {
    let sample = Source::new("sample.rs".into(), SAMPLE.into());
    let found: Vec<(String, usize, usize, usize)> =
        sample.functions().into_iter().map(|f| (f.name, f.line, f.lines, f.parameters)).collect();
    assert_eq!(found, [("odd".into(), 3, 4, 3), ("after".into(), 10, 1, 0)]);
    assert_eq!(sample.structs(), [("Three".into(), 7, 3)]);
    assert!(sample.comments.contains("Doc with a { brace.") && !sample.code.contains("Doc"));
    assert_eq!(sample.code.lines().count(), SAMPLE.lines().count());
    assert!(!sample.comments.contains("odd") && !sample.code.contains("hidden"));
}

#[test]
fn words_are_found_whole() {
    assert!(has_word("a for now.", "for now") && !has_word("therefor nowhere", "for now"));
}

#[test]
fn files_have_at_most_800_lines() {
    every("longer than 800 lines", |file| {
        let lines = file.text.lines().count();
        (lines > 800).then(|| format!("{}: {lines}", file.path)).into_iter().collect()
    });
}

#[test]
fn files_open_with_what_they_are_about() {
    every("3 to 15 lines of //! first", |file| {
        let lines = file.text.lines().take_while(|line| line.starts_with("//!")).count();
        (!(3..=15).contains(&lines))
            .then(|| format!("{}: {lines}", file.path))
            .into_iter()
            .collect()
    });
}

#[test]
fn source_is_ascii() {
    every("not ASCII", |file| file.hits(&file.text, |line| !line.is_ascii()));
}

#[test]
fn no_file_is_a_junk_drawer() {
    const STEMS: [&str; 8] =
        ["util", "helper", "common", "misc", "manager", "handler", "service", "processor"];
    every("a name that says nothing", |file| {
        let parts = file.path.trim_end_matches(".rs").split('/');
        let junk = parts.into_iter().any(|part| {
            let ends = |stem: &&str| part.ends_with(stem) || part.ends_with(&format!("{stem}s"));
            let suffixed = ["_v2", "_new", "_old"].iter().any(|suffix| part.ends_with(suffix));
            STEMS.iter().any(ends) || suffixed
        });
        junk.then(|| file.path.clone()).into_iter().collect()
    });
}

#[test]
fn no_type_is_named_for_doing_things() {
    const ENDS: [&str; 9] = [
        "Manager",
        "Handler",
        "Helper",
        "Service",
        "Processor",
        "Orchestrator",
        "Coordinator",
        "Factory",
        "Wrapper",
    ];
    every("a type named for doing things", |file| {
        file.hits(&file.code, |line| {
            ["struct ", "enum ", "trait "].iter().any(|kind| {
                let name = line.find(kind).map(|at| word(&line[at + kind.len()..]));
                name.is_some_and(|name| ENDS.iter().any(|end| name.ends_with(end)))
            })
        })
    });
}

#[test]
fn comments_do_not_narrate_or_decorate() {
    const STARTS: [&str; 5] = ["Now ", "First,", "Finally", "Loop", "Iterate"];
    every("a step, an echo or a banner", |file| {
        file.hits(&file.comments, |line| {
            let text = line.trim().trim_start_matches('/').trim_start();
            let is_plain = line.trim_start().starts_with("// ");
            let is_step = text
                .strip_prefix("Step ")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
            let narrates = is_plain && (is_step || STARTS.iter().any(|s| text.starts_with(s)));
            narrates || text.starts_with("-----") || text.starts_with("=====")
        })
    });
}

#[test]
fn comments_hold_no_plans_and_no_history() {
    const NUMBERED: [&str; 5] = ["phase", "tier", "stage", "milestone", "pr"];
    every("a plan or history", |file| {
        file.hits(&file.comments, |line| {
            let line = line.to_ascii_lowercase();
            let numbered = NUMBERED.iter().any(|kind| {
                (0..10).any(|n| {
                    let forms =
                        [format!("{kind} {n}"), format!("{kind}{n}"), format!("{kind} #{n}")];
                    forms.iter().any(|form| has_word(&line, form))
                })
            });
            numbered || ["legacy", "previously", "for now"].iter().any(|w| has_word(&line, w))
        })
    });
}

#[test]
fn nothing_is_left_for_later() {
    let later = ["todo!", "unimplemented!", "#[ignore"];
    every("left for later", |file| file.hits(&file.code, |l| later.iter().any(|w| l.contains(w))));
}

#[test]
fn no_code_is_dead_on_purpose() {
    every("dead code that is allowed", |file| {
        file.hits(&file.text, |line| {
            let line = line.trim_start();
            let attribute = line.starts_with("#[") || line.starts_with("#!");
            let allowed = ["allow(dead_code", "allow(unused"].iter().any(|a| line.contains(a));
            // A module that several test programs share is whole in none of them.
            let shared = file.path.contains("/tests/") && file.path.ends_with("/mod.rs");
            attribute && allowed && !(shared && line.contains("reason"))
        })
    });
}

#[test]
fn only_options_read_the_environment() {
    every("reads the environment", |file| {
        if !file.is_src() || file.path.contains("/options/") {
            return Vec::new();
        }
        file.hits(&file.code, |line| line.contains("env::var") || line.contains("var_os("))
    });
}

#[test]
fn the_engine_and_the_kernels_neither_print_nor_exit() {
    let banned = ["println!", "eprintln!", "print!", "eprint!", "process::exit", "std::net"];
    every("prints, exits or opens a socket", |file| {
        let inner = ["crates/engine/src", "crates/kernels/src"];
        match inner.iter().any(|dir| file.path.starts_with(dir)) {
            true => file.hits(&file.code, |line| banned.iter().any(|b| line.contains(b))),
            false => Vec::new(),
        }
    });
}

#[test]
fn unsafe_code_stays_in_the_kernels_the_pool_the_ring_and_the_gpus_device() {
    every("unsafe", |file| {
        let files = ["src/pool.rs", "src/store/ring.rs", "src/gpu/device.rs", "src/gpu/window.rs"];
        let may = file.path.starts_with("crates/kernels/")
            || files.iter().any(|named| file.path.ends_with(named));
        if may { Vec::new() } else { file.hits(&file.code, |line| has_word(line, "unsafe")) }
    });
}

#[test]
fn every_unsafe_block_says_why_it_is_safe() {
    every("unsafe without SAFETY in the lines above", |file| {
        let comments: Vec<&str> = file.comments.lines().collect();
        let blocks = (0..).zip(file.code.lines()).filter(|(_, line)| {
            line.contains("unsafe {") || line.trim_start().starts_with("unsafe impl")
        });
        let bare = blocks.filter(|&(at, _)| {
            let above = &comments[usize::saturating_sub(at, 8)..=at];
            !above.iter().any(|comment| comment.contains("SAFETY:"))
        });
        bare.map(|(at, line)| format!("{}:{}: {}", file.path, at + 1, line.trim())).collect()
    });
}

/// Whether a kernel is excused from a rule by the attribute of the lint that is its twin.
fn is_excused(file: &Source, line: usize, lint: &str) -> bool {
    let excuse = format!("#[expect(clippy::{lint}, reason");
    let mut above = file.text.lines().take(line - 1).collect::<Vec<_>>().into_iter().rev();
    let kernel = file.path.starts_with("crates/kernels/");
    kernel && above.by_ref().take(5).any(|line| line.trim_start().starts_with(&excuse))
}

#[test]
fn functions_have_at_most_70_lines() {
    every("longer than 70 lines (a kernel 120, with #[expect])", |file| {
        let long = file.functions().into_iter().filter(|f| {
            f.lines > if is_excused(file, f.line, "too_many_lines") { 120 } else { 70 }
        });
        long.map(|f| format!("{}:{}: {} has {}", file.path, f.line, f.name, f.lines)).collect()
    });
}

#[test]
fn functions_have_at_most_6_parameters() {
    every("more than 6 parameters (in a kernel 8, with #[expect])", |file| {
        let many = file.functions().into_iter().filter(|f| {
            f.parameters > if is_excused(file, f.line, "too_many_arguments") { 8 } else { 6 }
        });
        many.map(|f| format!("{}:{}: {} has {}", file.path, f.line, f.name, f.parameters)).collect()
    });
}

#[test]
fn structs_have_at_most_20_fields() {
    every("more than 20 fields", |file| {
        let many = file.structs().into_iter().filter(|(_, _, fields)| *fields > 20);
        many.map(|(name, line, n)| format!("{}:{line}: {name} has {n}", file.path)).collect()
    });
}

#[test]
fn a_trait_has_more_than_one_implementer() {
    let files: Vec<Source> = sources().into_iter().filter(Source::is_src).collect();
    let code: String = files.iter().map(|file| file.code.as_str()).collect();
    let implementers = |name: &str| {
        let impls = code.lines().filter(|line| line.trim_start().starts_with("impl"));
        let of_trait = impls.filter(|line| {
            line.split_once(" for ").is_some_and(|(before, _)| has_word(before, name))
        });
        of_trait.count()
    };
    let lonely = files.iter().flat_map(|file| {
        let traits = file.code.lines().filter_map(|line| {
            let declared =
                line.trim_start().trim_start_matches("pub ").trim_start_matches("(crate) ");
            declared.strip_prefix("trait ").map(word)
        });
        let lonely = traits.filter(|name| implementers(name) < 2);
        lonely.map(|name| format!("{}: {name}", file.path)).collect::<Vec<_>>()
    });
    none("a trait with fewer than two implementers", lonely);
}

#[test]
fn the_maths_is_in_the_kernels() {
    const NAMES: [&str; 13] = [
        "dot",
        "matvec",
        "mat_vec",
        "gemv",
        "rmsnorm",
        "rms_norm",
        "softmax",
        "silu",
        "swiglu",
        "rope",
        "topk",
        "bf16_to_f32",
        "f16_to_f32",
    ];
    every("maths outside the kernels that is no thin call", |file| {
        if !file.is_src() || file.path.starts_with("crates/kernels/") {
            return Vec::new();
        }
        let named = |name: &str| NAMES.iter().any(|n| name.starts_with(n));
        let thick = file.functions().into_iter().filter(|f| named(&f.name) && f.lines > 10);
        thick.map(|f| format!("{}:{}: {}", file.path, f.line, f.name)).collect()
    });
}

#[test]
fn recovering_needs_a_reason() {
    const RECOVERS: [&str; 3] = ["unwrap_or_default()", ".ok();", "let _ = "];
    every("recovers without a comment on the line or right above it", |file| {
        if !file.is_src() {
            return Vec::new();
        }
        let comments: Vec<bool> = file.comments.lines().map(|l| !l.trim().is_empty()).collect();
        let hits = (0..).zip(file.code.lines()).filter(|&(at, code)| {
            let explained = comments[at] || (at > 0 && comments[at - 1]);
            !explained && RECOVERS.iter().any(|recover| code.contains(recover))
        });
        hits.map(|(at, code)| format!("{}:{}: {}", file.path, at + 1, code.trim())).collect()
    });
}

#[test]
fn the_readme_fits_on_a_page() {
    let text = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let lines = text.lines().count();
    assert!(lines <= 150, "README.md has {lines} lines");
}
