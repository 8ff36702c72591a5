//! Experts on their way from memory to video memory.
//!
//! A record goes from the store's slot into a piece of a ring, from there by a command to its slot on the
//! device, and the kernels that need it stand behind that command: the queue's order is all that keeps
//! them apart, so nothing is waited for but the router's choice, a read, and the oldest piece of a full
//! ring. What a token needs and has is computed before the choice is known here; this part brings
//! the rest. Records are brought as they land, so that uploads, reads and kernels go on together.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use wgpu::{Buffer, SubmissionIndex};

use super::asked::{GpuCounters, Host};
use super::clock::{Commands, Way, Work};
use super::device::Device;
use super::layout::Layout;
use super::ring::{self, Ring};
use super::slots::{Claim, LayerSlots};
use super::{Experts, Gpu};
use crate::error::Result;
use crate::shape::{ExpertId, Shape};
use crate::store::slots::SlotId;
use crate::store::{Fetch, Landed, Purpose, Record};

/// Bytes of the ring of records, as far as their number allows.
const RECORDS_BYTES: u64 = 64 << 20;
/// Records of the ring, at least and at most.
const RECORDS: [u64; 2] = [4, 32];
/// Pieces for what is small: a token takes a few a layer, and waits for every layer.
const NOTES: usize = 32;

/// What uploads pass through.
pub struct Tiers {
    records: Ring,
    notes: Ring,
    uploads: AtomicU64,
    upload_bytes: AtomicU64,
}

/// Pieces of the ring of records, for records of so many bytes.
pub fn records(record_bytes: u64) -> u64 {
    RECORDS_BYTES.checked_div(record_bytes).map_or(0, |count| count.clamp(RECORDS[0], RECORDS[1]))
}

/// Bytes of a piece for what is small: a token's words, or a table of places, ranks and a vector.
pub fn note_bytes(layout: &Layout, shape: &Shape) -> u64 {
    let ranks = layout.at("NORMED_AT") - layout.at("RANKS_AT");
    (layout.at("NORMED_AT")).max(shape.moe.experts + ranks + shape.hidden) as u64 * 4
}

/// Bytes of both rings.
pub fn bytes(layout: &Layout, shape: &Shape, record_bytes: u64) -> u64 {
    records(record_bytes) * record_bytes + NOTES as u64 * note_bytes(layout, shape)
}

/// The router's choice for a token, on its way here.
pub struct Asked<'g> {
    pub experts: &'g Experts,
    /// What leaves the choice.
    pub submission: SubmissionIndex,
}

impl Tiers {
    /// # Errors
    /// There is not so much memory that both sides see.
    pub fn new(device: &Device, layout: &Layout, shape: &Shape, record_bytes: u64) -> Result<Self> {
        let count = records(record_bytes) as usize;
        Ok(Self {
            records: Ring::new(device, "records on their way", count, record_bytes)?,
            notes: Ring::new(device, "notes to the device", NOTES, note_bytes(layout, shape))?,
            uploads: AtomicU64::new(0),
            upload_bytes: AtomicU64::new(0),
        })
    }

    /// Records that are staged together: half of the ring, so that the other half is on its way.
    fn batch(&self) -> usize {
        (self.records.count() / 2).max(1)
    }
}

impl Gpu {
    /// What was done to feed it.
    pub fn counters(&self) -> GpuCounters {
        let t = &self.tiers;
        let [submissions, buffers] = self.device.counts();
        GpuCounters {
            uploads: t.uploads.load(Ordering::Relaxed),
            upload_bytes: t.upload_bytes.load(Ordering::Relaxed),
            waits: t.records.waits() + t.notes.waits(),
            submissions,
            buffers,
        }
    }

    /// Brings a few words to the device in front of what is written next.
    pub(super) fn note<'g>(
        &'g self,
        work: &mut Work<'g>,
        parts: &[(&[u8], &Buffer, u64)],
    ) -> Result<()> {
        let piece = self.tiers.notes.take(&self.device)?;
        piece.write(parts.iter().map(|part| part.0))?;
        let way =
            |&(bytes, buffer, to): &(&[u8], _, u64)| Way { bytes: bytes.len() as u64, buffer, to };
        work.bring(piece, parts.iter().map(way));
        Ok(())
    }

    /// Brings records to the slots that were claimed for them, and says where they are, together with
    /// `also`.
    fn stage<'g>(
        &'g self,
        host: &Host,
        work: &mut Work<'g>,
        slots: &LayerSlots,
        records: &[(&Record, (ExpertId, SlotId))],
        also: &[(&[u8], &Buffer, u64)],
    ) -> Result<()> {
        let mut filled = Vec::with_capacity(records.len());
        for (record, _) in records {
            let piece = self.tiers.records.take(&self.device)?;
            filled.push((piece, &record[..slots.record_bytes()]));
        }
        ring::fill(&host.compute.pool, &filled)?;
        for ((piece, _), (_, place)) in filled.into_iter().zip(records) {
            work.bring(piece, std::iter::once(slots.way(*place)));
        }
        let count = records.len() as u64;
        self.tiers.uploads.fetch_add(count, Ordering::Relaxed);
        self.tiers.upload_bytes.fetch_add(count * slots.record_bytes() as u64, Ordering::Relaxed);
        let places: Vec<_> = records.iter().map(|(_, place)| *place).collect();
        let (table, to) = slots.landed(&places);
        self.note(work, &[&[(bytemuck::cast_slice(&table), to, 0)], also].concat())
    }

    /// Brings experts of a layer that have no slot, some at a time as their records come in; `then` writes
    /// behind each part of them what needs it.
    pub(super) fn pass<'g>(
        &'g self,
        host: &Host,
        slots: &LayerSlots,
        wanted: &[ExpertId],
        work: &dyn Fn() -> Work<'g>,
        then: &mut dyn FnMut(&mut Work<'g>, Range<usize>),
    ) -> Result<()> {
        let scan = wanted.iter().map(|expert| (*expert, Purpose::Scan));
        let mut sweep = host.store.sweep(slots.layer(), scan);
        // Records that are held keep slots of the store from the reads that follow.
        let most =
            self.tiers.batch().min(self.budget.slots_each).min((host.store.slots() / 4).max(1));
        let mut done = 0;
        while done < wanted.len() {
            let records = collect(&mut sweep, most)?;
            let part = done..done + records.len();
            let claim = slots.claim(&self.device, wanted[part.clone()].iter().copied());
            let staged: Vec<_> = records.iter().zip(claim.missing.iter().copied()).collect();
            let mut work = work();
            self.stage(host, &mut work, slots, &staged, &[])?;
            then(&mut work, part.clone());
            Commands::submit(&self.device, [work.finish()]);
            done = part.end;
        }
        Ok(())
    }

    /// Waits for the router's choice and sees to it that what is missing of it is computed up to its
    /// activations. Gives what is still to be handed over, in front of what needs those.
    pub(super) fn settle<'g>(
        &'g self,
        host: &Host,
        asked: Asked<'g>,
        chosen: &mut Vec<ExpertId>,
    ) -> Result<Vec<Commands<'g>>> {
        self.read_chosen(asked.submission, chosen)?;
        let slots = &asked.experts.slots;
        let claim = slots.claim(&self.device, chosen.iter().copied());
        let missing: Vec<ExpertId> = claim.missing.iter().map(|(expert, _)| *expert).collect();
        if missing.is_empty() {
            return Ok(Vec::new());
        }
        let rank = |e: &ExpertId| chosen.iter().position(|c| c == e).expect("chosen") as u32;
        let ranks: Vec<u32> = missing.iter().map(rank).collect();
        let mut fetch = host.store.fetch(slots.layer(), &missing);
        self.bring(host, asked.experts, (&claim, &ranks), &mut fetch)
    }

    /// Brings what a claim misses as it lands and computes it up to its activations. What has landed last
    /// is not handed over yet.
    fn bring<'g>(
        &'g self,
        host: &Host,
        experts: &Experts,
        (claim, ranks): (&Claim, &[u32]),
        fetch: &mut Fetch,
    ) -> Result<Vec<Commands<'g>>> {
        let mut last = Vec::new();
        let mut landed = Landed::new();
        let mut left = ranks.len();
        while left > 0 {
            Commands::submit_some(&self.device, &mut last);
            fetch.ready(&mut landed)?;
            left -= landed.len();
            for some in landed.chunks(self.tiers.batch()) {
                let staged: Vec<_> = some.iter().map(|(i, r)| (r, claim.missing[*i])).collect();
                let ranks: Vec<u32> = some.iter().map(|(i, _)| ranks[*i]).collect();
                let mut work = self.work();
                let list = (
                    bytemuck::cast_slice(&ranks),
                    &self.scratch,
                    self.layout.at("RANKS_AT") as u64 * 4,
                );
                Commands::submit_some(&self.device, &mut last);
                self.stage(host, &mut work, &experts.slots, &staged, &[list])?;
                self.up(&mut work, experts, some.len());
                last.push(work.finish());
            }
        }
        Ok(last)
    }
}

/// The next record, waited for, and those behind it that are here by now.
fn collect<'s>(sweep: &mut Fetch<'s>, most: usize) -> Result<Vec<Record<'s>>> {
    let mut records = vec![sweep.next_in_order()?.expect("as many records as were asked for")];
    while records.len() < most {
        let Some(record) = sweep.next_if_ready()? else { break };
        records.push(record);
    }
    Ok(records)
}
