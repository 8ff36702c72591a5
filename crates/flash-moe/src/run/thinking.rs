//! Whether the model is thinking, told from the tokens, and when it has thought enough.
//!
//! A template may open the thinking itself, so the answer starts inside it: the prompt's own tokens
//! decide where a text begins.

use flash_moe_engine::shape::TokenId;
use flash_moe_engine::tokenizer::Tokenizer;

/// Follows the tokens of one text.
#[derive(Clone, Debug)]
pub struct Thinking {
    tags: Option<Tags>,
    inside: bool,
    tokens: usize,
    budget: usize, // 0: none
}

#[derive(Clone, Copy, Debug)]
struct Tags {
    open: TokenId,
    close: TokenId,
}

/// What a token is to the thinking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// It opens the thinking.
    Opens,
    /// It is part of the thinking.
    Inside,
    /// It closes the thinking.
    Closes,
    /// It is part of the answer.
    Outside,
}

impl Thinking {
    /// The state after `prompt`, for a model whose vocabulary may have the two tags.
    pub fn after(prompt: &[TokenId], tokenizer: Option<&Tokenizer>, budget: usize) -> Self {
        let tag = |text| tokenizer.and_then(|t| t.id(text));
        let tags = match (tag("<think>"), tag("</think>")) {
            (Some(open), Some(close)) => Some(Tags { open, close }),
            _ => None,
        };
        Self::with_tags(tags, prompt, budget)
    }

    fn with_tags(tags: Option<Tags>, prompt: &[TokenId], budget: usize) -> Self {
        let inside = tags.is_some_and(|tags| {
            let last = |tag| prompt.iter().rposition(|&token| token == tag);
            last(tags.open) > last(tags.close)
        });
        Self { tags, inside, tokens: 0, budget }
    }

    /// Whether the next token belongs to the thinking.
    pub fn is_inside(&self) -> bool {
        self.inside
    }

    /// Takes the next token of the text.
    pub fn follow(&mut self, token: TokenId) -> Turn {
        match (self.tags, self.inside) {
            (Some(tags), false) if token == tags.open => {
                self.inside = true;
                Turn::Opens
            }
            (Some(tags), true) if token == tags.close => {
                self.inside = false;
                Turn::Closes
            }
            (_, true) => {
                self.tokens += 1;
                Turn::Inside
            }
            (_, false) => Turn::Outside,
        }
    }

    /// The token that must come next because the budget is spent.
    pub fn forced(&self) -> Option<TokenId> {
        let spent = self.inside && self.budget > 0 && self.tokens >= self.budget;
        self.tags.filter(|_| spent).map(|tags| tags.close)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: TokenId = TokenId(1);
    const CLOSE: TokenId = TokenId(2);

    fn after(prompt: &[u32], budget: usize) -> Thinking {
        let prompt: Vec<TokenId> = prompt.iter().copied().map(TokenId).collect();
        Thinking::with_tags(Some(Tags { open: OPEN, close: CLOSE }), &prompt, budget)
    }

    #[test]
    fn the_prompt_decides_where_a_text_begins() {
        for (prompt, inside) in [
            (&[][..], false),
            (&[9, 9], false),
            (&[9, 1, 9], true),
            (&[1, 9, 2], false),
            (&[1, 2, 1, 9], true),
        ] {
            assert_eq!(after(prompt, 0).is_inside(), inside, "{prompt:?}");
        }
    }

    #[test]
    fn the_budget_forces_the_closing_tag_and_only_inside() {
        let mut thinking = after(&[1], 2);
        assert_eq!(thinking.forced(), None);
        assert_eq!(thinking.follow(TokenId(7)), Turn::Inside);
        assert_eq!(thinking.follow(TokenId(7)), Turn::Inside);
        assert_eq!(thinking.forced(), Some(CLOSE));
        assert_eq!(thinking.follow(CLOSE), Turn::Closes);
        assert_eq!(thinking.forced(), None);
        assert_eq!(thinking.follow(TokenId(7)), Turn::Outside);
        assert_eq!(thinking.follow(OPEN), Turn::Opens);
    }

    #[test]
    fn no_budget_and_no_tags_force_nothing() {
        let mut unlimited = after(&[1], 0);
        for _ in 0..100 {
            unlimited.follow(TokenId(7));
        }
        assert_eq!(unlimited.forced(), None);
        let mut without = Thinking::after(&[OPEN], None, 1);
        assert_eq!(without.follow(OPEN), Turn::Outside);
        assert_eq!(without.forced(), None);
    }
}
