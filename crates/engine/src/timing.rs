//! Time and bytes of each stage of the forward pass.
//!
//! The stages are the ones of `session.rs`, in the order in which a token meets them; `--timing`, the
//! benchmarks and the docs use these names. Bytes are weight bytes that the stage had to touch, so
//! that bytes over time can be held against the machine's memory bandwidth.

use std::time::Instant;

/// A stage of the forward pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Stage {
    /// Embedding rows.
    Embed,
    /// Full-attention layers' mix.
    Attention,
    /// GatedDeltaNet layers' mix.
    DeltaNet,
    /// Router logits and the choice of experts.
    Route,
    /// The shared expert.
    Shared,
    /// Waiting for expert records.
    Fetch,
    /// Routed experts.
    Experts,
    /// Dense feed-forward layers.
    Dense,
    /// Final norm and head.
    Logits,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Self; 9] = [
        Self::Embed,
        Self::Attention,
        Self::DeltaNet,
        Self::Route,
        Self::Shared,
        Self::Fetch,
        Self::Experts,
        Self::Dense,
        Self::Logits,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Attention => "attention",
            Self::DeltaNet => "delta_net",
            Self::Route => "route",
            Self::Shared => "shared",
            Self::Fetch => "fetch",
            Self::Experts => "experts",
            Self::Dense => "dense",
            Self::Logits => "logits",
        }
    }
}

/// Totals of one stage.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct StageTotal {
    /// Wall time in nanoseconds.
    pub ns: u64,
    /// Weight bytes touched (for `fetch`: bytes read from disk).
    pub bytes: u64,
    /// Times the stage ran.
    pub calls: u64,
}

/// Totals of all stages.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Timing {
    totals: [StageTotal; Stage::ALL.len()],
}

impl Timing {
    /// Totals of a stage.
    pub fn stage(&self, stage: Stage) -> StageTotal {
        self.totals[stage as usize]
    }

    /// Adds the time since `started` to a stage.
    pub fn add(&mut self, stage: Stage, started: Instant, bytes: usize) {
        self.add_ns(stage, started.elapsed().as_nanos() as u64, bytes as u64);
    }

    /// Adds a time that something else has measured.
    pub fn add_ns(&mut self, stage: Stage, ns: u64, bytes: u64) {
        let total = &mut self.totals[stage as usize];
        total.ns += ns;
        total.bytes += bytes;
        total.calls += 1;
    }

    /// What so many of `of` like tokens took, as if all had taken it.
    pub fn scaled(&self, tokens: usize, of: usize) -> Self {
        let all = |part: u64| (u128::from(part) * of as u128 / tokens.max(1) as u128) as u64;
        let mut scaled = self.clone();
        for total in &mut scaled.totals {
            *total =
                StageTotal { ns: all(total.ns), bytes: all(total.bytes), calls: all(total.calls) };
        }
        scaled
    }

    /// What happened since `before`.
    pub fn since(&self, before: &Self) -> Self {
        let mut difference = self.clone();
        for (total, before) in difference.totals.iter_mut().zip(&before.totals) {
            total.ns -= before.ns;
            total.bytes -= before.bytes;
            total.calls -= before.calls;
        }
        difference
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_some_tokens_took_is_told_of_others() {
        let mut timing = Timing::default();
        timing.add_ns(Stage::Route, 40, 8);
        timing.add_ns(Stage::Route, 20, 4);
        let all = timing.scaled(2, 7).stage(Stage::Route);
        assert_eq!(all, StageTotal { ns: 210, bytes: 42, calls: 7 });
        assert_eq!(timing.scaled(0, 7).stage(Stage::Fetch), StageTotal::default());
    }
}
