//! How much of a text may be the beginning of something that is not yet whole.
//!
//! Used for stop texts and tags alike: whatever is held back is the least that must be, so that a
//! reader sees text as soon as nothing later can change what it is.

/// Bytes of the longest end of `text` with which one of `wholes` begins, the whole itself apart.
pub fn longest_beginning<S: AsRef<str>>(text: &str, wholes: &[S]) -> usize {
    let longest = |whole: &S| {
        let whole = whole.as_ref();
        let ends = whole.char_indices().map(|(at, _)| at);
        ends.filter(|&at| text.ends_with(&whole[..at])).max()
    };
    wholes.iter().filter_map(longest).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_beginning_is_a_proper_one_on_a_character() {
        let stops = ["END", "\u{e9}x"];
        for (text, bytes) in
            [("", 0), ("a E", 1), ("EN", 2), ("END", 0), ("ENE", 1), ("caf\u{e9}", 2), ("x", 0)]
        {
            assert_eq!(longest_beginning(text, &stops), bytes, "{text:?}");
        }
    }
}
