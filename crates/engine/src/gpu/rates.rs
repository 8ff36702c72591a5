//! How fast an expert that video memory misses can be had, one way and the other.
//!
//! Measured once, when a model opens, on records of its first layer with experts: copied to where the device
//! copies from, from there to video memory, and computed by the processor instead. No token is timed, so that
//! what is computed where does not change while a model is open.

use std::time::Instant;

use super::asked::{Host, MissRates, Misses};
use super::clock::Commands;
use super::tiers::{Workspace, collect};
use super::{Experts, Feeding, Gpu};
use crate::error::Result;
use crate::layer::experts::{OneToken, add_experts};
use crate::shape::ExpertId;
use crate::store::Purpose;
use crate::timing::Timing;

/// Records of a measurement at most.
const RECORDS_MAX: usize = 8;
/// Measurements, of which the first walks every way once and the best of the others count.
const ROUNDS: usize = 5;

impl Gpu {
    /// Decides who computes what is missing.
    pub(super) fn plan_misses(&mut self, host: &Host) -> Result<()> {
        // What is read into slots is not to be had another way.
        if self.tiers.plan.misses != Misses::Auto || self.tiers.in_place {
            return Ok(());
        }
        if let Some(rates) = self.measure(host)? {
            self.tiers.plan.rates = Some(rates);
            self.tiers.plan.computed_eighths = rates.computed_eighths();
        }
        Ok(())
    }

    /// Measures on other records each time, since what was uploaded is not missing any more.
    fn measure(&self, host: &Host) -> Result<Option<MissRates>> {
        let experts = self.layers.iter().find_map(|layer| match &layer.feed_forward {
            Feeding::Experts(experts) => Some(experts),
            Feeding::Dense { .. } => None,
        });
        let Some(experts) = experts else { return Ok(None) };
        let most = RECORDS_MAX.min(self.tiers.batch()).min(self.budget.slots_each);
        let count = most.min(host.store.slots() / 4).min(self.shape.moe.experts / ROUNDS).max(1);
        let mut workspace = Workspace::default();
        let mut round = |round: usize| {
            let first = (round * count) as u16;
            let ids: Vec<_> = (first..first + count as u16).map(ExpertId).collect();
            let (stage, upload) = self.measure_upload(host, experts, &ids)?;
            let compute = self.measure_processor(host, experts, &ids, &mut workspace)?;
            Ok(MissRates { stage, upload, compute })
        };
        round(0)?;
        let mut best: Option<MissRates> = None;
        for number in 1..ROUNDS.min(self.shape.moe.experts) {
            let rates = round(number)?;
            best = Some(best.map_or(rates, |best| best.or_faster(rates)));
        }
        Ok(best)
    }

    fn measure_upload(
        &self,
        host: &Host,
        experts: &Experts,
        ids: &[ExpertId],
    ) -> Result<(f64, Option<f64>)> {
        let slots = &experts.slots;
        let scan = ids.iter().map(|id| (*id, Purpose::Scan));
        let mut sweep = host.store.sweep(slots.layer(), scan);
        let mut records = Vec::new();
        while records.len() < ids.len() {
            records.extend(collect(&mut sweep, ids.len() - records.len())?);
        }
        let claim = slots.claim(&self.device, ids.iter().copied());
        let staged: Vec<_> = records.iter().zip(claim.missing.iter().copied()).collect();
        let mut work = self.work();
        let started = Instant::now();
        self.stage(host, &mut work, slots, &staged, &[])?;
        let stage = started.elapsed();
        let started = Instant::now();
        let submission = Commands::submit(&self.device, [work.finish()]);
        self.device.wait_for(Some(submission))?;
        let bytes = (staged.len() * slots.record_bytes()) as f64;
        let [stage, upload] =
            [stage, started.elapsed()].map(|time| bytes / time.as_secs_f64().max(1e-9));
        Ok((stage, (!slots.is_direct()).then_some(upload)))
    }

    fn measure_processor(
        &self,
        host: &Host,
        experts: &Experts,
        ids: &[ExpertId],
        workspace: &mut Workspace,
    ) -> Result<f64> {
        let (slots, hidden) = (&experts.slots, self.shape.hidden);
        let mut fetch = host.store.fetch(slots.layer(), ids);
        let (x, weights, mut out) = (vec![1.0; hidden], vec![1.0; ids.len()], vec![0.0; hidden]);
        let one = OneToken { layout: slots.layout(), x: &x, weights: &weights };
        let mut timing = Timing::default();
        let buffers = (&mut workspace.scratch, &mut workspace.tmp, &mut timing);
        let started = Instant::now();
        add_experts(host.compute, &one, &mut fetch, buffers, &mut |_, _| {}, &mut out)?;
        let bytes = (ids.len() * slots.record_bytes()) as f64;
        Ok(bytes / started.elapsed().as_secs_f64().max(1e-9))
    }
}
