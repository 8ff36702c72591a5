//! What is to be run: prompts from position 0, and positions along one long session.
//!
//! Fits the wishes into the model's context before anything is loaded. Default positions that do not
//! fit are left out with a note; so are wished ones above a `--context` or above the model's limit.

use anyhow::{Result, ensure};

use super::check;
use super::walk::PoolState;
use crate::options::bench::{BenchArgs, ContextState, Pools};

/// Positions measured when none are asked for.
const FRONTIERS: [usize; 3] = [512, 2048, 8192];
/// Prompt length measured when none is asked for.
const PREFILL: usize = 512;

/// Tokens of real prompt at the start of a synthetic context.
pub const SYNTHETIC_PROMPT: usize = 16;

/// A course that fits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Course {
    /// Tokens of context that it needs.
    pub context: usize,
    /// Prompt lengths.
    pub prefill: Vec<usize>,
    /// Positions, ascending.
    pub frontiers: Vec<usize>,
    /// Whether positions are reached with random keys and values instead of a prompt.
    pub is_synthetic: bool,
    /// Tokens decoded at each position, from each state of the pool.
    pub decode: usize,
    /// States of the pool that runs begin with, in order of decode runs.
    pub pools: Vec<PoolState>,
    /// Times everything is run.
    pub repeat: usize,
    /// What was left out, for people.
    pub notes: Vec<String>,
}

impl Course {
    /// Fits the wishes into a context of at most `positions`.
    ///
    /// # Errors
    /// Nothing fits; two positions are closer than the tokens decoded at the first.
    pub fn new(args: &BenchArgs, positions: usize) -> Result<Self> {
        let limit = args.context.unwrap_or(positions).min(positions);
        // Warm first: the pool is then as a prompt leaves it, which is what a user meets.
        let pools = match args.pool {
            Pools::Both => vec![PoolState::Warm, PoolState::Cold],
            Pools::Cold => vec![PoolState::Cold],
            Pools::Warm => vec![PoolState::Warm],
        };
        let decoded = pools.len() * args.decode;
        let mut notes = Vec::new();
        let mut frontiers = wished(&args.context_at, &FRONTIERS);
        frontiers.retain(|&at| fits(at + decoded, limit, &format!("position {at}"), &mut notes));
        if frontiers.is_empty() && args.context_at.is_empty() && limit > decoded {
            frontiers.push(limit - decoded);
        }
        ensure!(
            !frontiers.is_empty(),
            "no position of --context-at leaves room for {decoded} tokens in a context of {limit}"
        );
        for pair in frontiers.windows(2) {
            ensure!(
                pair[1] - pair[0] >= decoded,
                "positions {} and {} are closer than the {decoded} tokens decoded at the first",
                pair[0],
                pair[1]
            );
        }
        let mut prefill = wished(&args.prefill, &[PREFILL.min(limit)]);
        prefill.retain(|&n| fits(n, limit, &format!("a prompt of {n}"), &mut notes));
        let is_synthetic = args.context_state == ContextState::Synthetic;
        if is_synthetic {
            notes.push(format!(
                "contexts are SYNTHETIC: but for {SYNTHETIC_PROMPT} tokens, what is before a position \
                 is random keys and values; times of attention hold, what is decoded means nothing"
            ));
        }
        let longest = prefill.iter().copied().max().unwrap_or(0);
        let last = frontiers.last().map_or(0, |at| at + decoded);
        let needed = longest.max(last).max(check::TOKENS);
        Ok(Self {
            context: args.context.unwrap_or(needed),
            prefill,
            frontiers,
            is_synthetic,
            decode: args.decode,
            pools,
            repeat: args.repeat,
            notes,
        })
    }

    /// Leaves out what begins with an empty pool, where it cannot be emptied; says so.
    pub fn warm_alone(&mut self) -> Option<String> {
        let had_cold = self.pools.contains(&PoolState::Cold);
        self.pools = vec![PoolState::Warm];
        had_cold.then(|| "every expert has its slot in video memory for good: runs are warm".into())
    }

    /// Tokens of random prompt that the longest run takes.
    pub fn prompt_tokens(&self) -> usize {
        let longest = self.prefill.iter().chain(&self.frontiers).copied().max();
        longest.unwrap_or(0).max(check::TOKENS)
    }
}

fn wished(given: &[usize], otherwise: &[usize]) -> Vec<usize> {
    let mut list = if given.is_empty() { otherwise.to_vec() } else { given.to_vec() };
    list.sort_unstable();
    list.dedup();
    list
}

fn fits(needed: usize, limit: usize, what: &str, notes: &mut Vec<String>) -> bool {
    if needed > limit {
        notes.push(format!("{what} is left out: it needs {needed} tokens of context, of {limit}"));
    }
    needed <= limit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Command, Options};
    use clap::Parser;

    fn course(flags: &str, positions: usize) -> Result<Course> {
        let line = format!("flash-moe bench {flags}");
        match Options::parse_from(line.split_whitespace()).command {
            Command::Bench(args) => Course::new(&args, positions),
            _ => unreachable!("the line says bench"),
        }
    }

    #[test]
    fn defaults_fit_into_the_context() {
        let long = course("", 262_144).unwrap();
        assert_eq!((long.context, &long.frontiers[..]), (8192 + 64, &[512, 2048, 8192][..]));
        assert_eq!((&long.prefill[..], long.notes.len()), (&[512][..], 0));
        let middle = course("--context 4096", 262_144).unwrap();
        assert_eq!((middle.context, &middle.frontiers[..]), (4096, &[512, 2048][..]));
        assert_eq!(middle.notes.len(), 1);
        let short = course("", 256).unwrap();
        assert_eq!((short.context, &short.frontiers[..]), (256, &[192][..]));
        assert_eq!(short.prefill, [256]);
    }

    #[test]
    fn wishes_are_sorted_and_those_that_cannot_be_are_said() {
        let some = course("--context-at 300,100,100 --decode 8 --prefill 64,900", 512).unwrap();
        assert_eq!((&some.frontiers[..], &some.prefill[..]), (&[100, 300][..], &[64][..]));
        assert_eq!((some.context, some.notes.len()), (316, 1));
        assert!(course("--context-at 600", 512).is_err());
        let warm = course("--context-at 100,110 --decode 8 --pool warm", 512).unwrap();
        assert_eq!((warm.pools, warm.context), (vec![PoolState::Warm], 512));
        assert!(course("--context-at 100,110 --decode 8", 512).is_err());
    }
}
