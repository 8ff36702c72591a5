//! Experts on their way from memory to video memory.
//!
//! Where both sides have one memory a record is read from the disk into its slot, as far as the system lets a
//! disk write there, and nothing is copied. Otherwise it goes from the store's slot into a piece of a ring,
//! from there by a command to its slot on the device, and the kernels that need it stand behind that command:
//! the queue's order is all that keeps them apart, so nothing is waited for but the router's choice, a read,
//! and the oldest piece of a full ring. What a token needs and has is computed before the choice is known here; this part brings
//! the rest. Records are brought as they land, so that uploads, reads and kernels go on together. A fixed part
//! of a layer's missing experts may be the processor's, which computes them meanwhile; of those the ones
//! that are chosen again soon are brought as well, where nothing waits for it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use wgpu::{Buffer, SubmissionIndex};

use super::asked::{GpuCounters, Host, MissPlan, Misses, SHARES, upload_records, uploads_bytes};
use super::clock::{Commands, Way, Work};
use super::device::Device;
use super::layout::Layout;
use super::ring::{self, Ring};
use super::slots::{Claim, LayerSlots, Missing};
use super::step::Busy;
use super::{Experts, Feeding, Gpu};
use crate::compute::Temporary;
use crate::error::Result;
use crate::layer::experts::{ExpertScratch, OneToken, add_experts};
use crate::shape::{ExpertId, Shape};
use crate::store::slots::SlotId;
use crate::store::{Fetch, Landed, Purpose, Record};
use crate::timing::{Stage, Timing};

/// Pieces for what is small: a token takes a few a layer, and waits for every layer.
const NOTES: usize = 32;

/// Records of a layer and token at most that video memory is given after the processor has computed them.
const ADMITTED_MAX: usize = 2;

/// What uploads pass through, and what became of missing experts.
pub struct Tiers {
    records: Ring,
    notes: Ring,
    pub(super) plan: MissPlan,
    /// Whether records are read into slots.
    pub(super) in_place: bool,
    uploads: AtomicU64,
    read_in_place: AtomicU64,
    upload_bytes: AtomicU64,
    admitted: AtomicU64,
    computed: AtomicU64,
    compute_ns: AtomicU64,
}

/// What the processor computes with.
#[derive(Default)]
pub struct Workspace {
    pub scratch: ExpertScratch,
    pub tmp: Temporary,
}

/// Records that video memory is to have.
pub struct Kept<'g, 's> {
    experts: &'g Experts,
    records: Vec<(ExpertId, Record<'s>)>,
}

/// Bytes of a piece for what is small: a token's words, or a table of places, ranks and a vector.
pub fn note_bytes(layout: &Layout, shape: &Shape) -> u64 {
    let ranks = layout.at("NORMED_AT") - layout.at("RANKS_AT");
    (layout.at("NORMED_AT")).max(shape.moe.experts + ranks + shape.hidden) as u64 * 4
}

/// Bytes of both rings.
pub fn bytes(layout: &Layout, shape: &Shape, record_bytes: u64) -> u64 {
    uploads_bytes(record_bytes) + NOTES as u64 * note_bytes(layout, shape)
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
    pub fn new(
        device: &Device,
        layout: &Layout,
        shape: &Shape,
        (record_bytes, misses): (u64, Misses),
    ) -> Result<Self> {
        let count = upload_records(record_bytes) as usize;
        let none = || AtomicU64::new(0);
        let computed_eighths = if misses == Misses::Cpu { SHARES } else { 0 };
        Ok(Self {
            records: Ring::new(device, "records on their way", count, record_bytes)?,
            notes: Ring::new(device, "notes to the device", NOTES, note_bytes(layout, shape))?,
            plan: MissPlan { misses, computed_eighths, rates: None },
            in_place: false,
            uploads: none(),
            read_in_place: none(),
            upload_bytes: none(),
            admitted: none(),
            computed: none(),
            compute_ns: none(),
        })
    }

    /// Records that are staged together: half of the ring, so that the other half is on its way.
    pub fn batch(&self) -> usize {
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
            read_in_place: t.read_in_place.load(Ordering::Relaxed),
            upload_bytes: t.upload_bytes.load(Ordering::Relaxed),
            admitted: t.admitted.load(Ordering::Relaxed),
            computed: t.computed.load(Ordering::Relaxed),
            compute_ns: t.compute_ns.load(Ordering::Relaxed),
            waits: t.records.waits() + t.notes.waits(),
            submissions,
            buffers,
        }
    }

    /// What it does about missing experts.
    pub fn misses(&self) -> MissPlan {
        self.tiers.plan
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

    /// Brings records to the slots that were claimed for them, the quickest way, and says where they are,
    /// together with `also`.
    pub(super) fn stage<'g>(
        &'g self,
        host: &Host,
        work: &mut Work<'g>,
        slots: &LayerSlots,
        records: &[(&Record, (ExpertId, SlotId))],
        also: &[(&[u8], &Buffer, u64)],
    ) -> Result<()> {
        if !slots.is_direct() {
            return self.stage_behind(host, work, slots, records, also);
        }
        let copied: Vec<_> = records.iter().filter(|(r, _)| !r.is_lent()).copied().collect();
        slots.write(&self.device, &host.compute.pool, &copied)?;
        self.landed(work, slots, records, also)
    }

    /// Reads records into the slots that were claimed for them. To be dropped before their claim.
    fn read_in_place<'s>(
        &self,
        host: &Host<'s>,
        slots: &LayerSlots,
        places: &[(ExpertId, SlotId)],
        purpose: Purpose,
    ) -> Result<Fetch<'s>> {
        let blocks = slots.lend(&self.device, places)?;
        let experts = places.iter().map(|(expert, _)| *expert).zip(blocks);
        Ok(host.store.fetch_into(slots.layer(), experts, purpose))
    }

    /// Whether records are read from the disk into their slots, past the store's pool.
    pub fn is_in_place(&self) -> bool {
        self.tiers.in_place
    }

    /// Whether records can be read into slots, which one is read for.
    pub(super) fn reads_in_place(&self, host: &Host) -> Result<bool> {
        let slots = || {
            self.layers.iter().filter_map(|layer| match &layer.feed_forward {
                Feeding::Experts(experts) => Some(&experts.slots),
                Feeding::Dense { .. } => None,
            })
        };
        let paged = !host.store.choice().direct || slots().all(LayerSlots::begin_at_pages);
        // A prompt claims slots for what is read next while it computes what has landed.
        let each = self.budget.slots_each;
        let fits = self.budget.direct && self.budget.is_shared && each > 1;
        // The store keeps what was read last. Where that is more than the slots hold it has what they miss.
        let one_tier = host.store.slots() <= each * slots().count();
        let first = slots().next().filter(|_| fits && paged && one_tier);
        let Some(first) = first else { return Ok(false) };
        let tried = first.lend(&self.device, &[(ExpertId(0), SlotId(0))])?.remove(0);
        Ok(host.store.reads_into(tried))
    }

    /// As [`Gpu::stage`], while earlier parts of the same layer are computed: behind them where commands can
    /// bring it, since writing slots would wait for the device, and it then for this.
    fn stage_scan<'g>(
        &'g self,
        host: &Host,
        work: &mut Work<'g>,
        slots: &LayerSlots,
        records: &[(&Record, (ExpertId, SlotId))],
    ) -> Result<()> {
        match self.budget.is_shared {
            true => self.stage(host, work, slots, records, &[]),
            false => self.stage_behind(host, work, slots, records, &[]),
        }
    }

    /// As [`Gpu::stage`], to slots that what was submitted before may still read.
    fn stage_behind<'g>(
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
        self.landed(work, slots, records, also)
    }

    /// Says where records are from here on, together with `also`.
    fn landed<'g>(
        &'g self,
        work: &mut Work<'g>,
        slots: &LayerSlots,
        records: &[(&Record, (ExpertId, SlotId))],
        also: &[(&[u8], &Buffer, u64)],
    ) -> Result<()> {
        let count = records.len() as u64;
        let lent = records.iter().filter(|(record, _)| record.is_lent()).count() as u64;
        self.tiers.read_in_place.fetch_add(lent, Ordering::Relaxed);
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
        let mut done = 0;
        // What leaves does not depend on how many records come in at once.
        let mut bring = |claim: &Claim, reads: &mut Fetch| {
            let mut places = &claim.missing[..];
            while !places.is_empty() {
                let records = collect(reads, places.len())?;
                let (now, later) = places.split_at(records.len());
                let staged: Vec<_> = records.iter().zip(now.iter().copied()).collect();
                let mut work = work();
                self.stage_scan(host, &mut work, slots, &staged)?;
                then(&mut work, done..done + now.len());
                let submission = Commands::submit(&self.device, [work.finish()]);
                slots.read_by(&submission, now.iter().map(|(_, slot)| *slot));
                (places, done) = (later, done + now.len());
            }
            Ok(())
        };
        let claim = |group: &[ExpertId]| slots.claim(&self.device, group.iter().copied());
        let most = self.tiers.batch().min(self.budget.slots_each);
        if self.tiers.in_place {
            let read = |group: &[ExpertId]| {
                let claim = claim(group);
                let reads = self.read_in_place(host, slots, &claim.missing, Purpose::Scan)?;
                Ok((reads, claim)) // which is the order in which they are dropped
            };
            // One group is read while another is computed.
            let mut groups = wanted.chunks((most / 2).max(1));
            let mut next = groups.next().map(read).transpose()?;
            while let Some(mut now) = next {
                next = groups.next().map(read).transpose()?;
                bring(&now.1, &mut now.0)?;
            }
            return Ok(());
        }
        let scan = wanted.iter().map(|expert| (*expert, Purpose::Scan));
        let mut sweep = host.store.sweep(slots.layer(), scan);
        // Records that are held keep slots of the store from the reads that follow.
        let mut groups = wanted.chunks(most.min((host.store.slots() / 4).max(1)));
        groups.try_for_each(|group| bring(&claim(group), &mut sweep))
    }

    /// Waits for the router's choice and sees to it that what is missing of it is computed, on the device up
    /// to its activations. Gives what is still to be handed over, in front of what needs those. `later`
    /// goes where the device would wait for the processor; `kept` is what the processor has
    /// computed and video memory is to have.
    pub(super) fn settle<'g, 's>(
        &'g self,
        host: &Host<'s>,
        asked: Asked<'g>,
        busy: &mut Busy,
        later: &mut Vec<Commands<'g>>,
        kept: &mut Option<Kept<'g, 's>>,
    ) -> Result<Vec<Commands<'g>>> {
        self.read_choice(asked.submission, &mut busy.choice)?;
        let (experts, chosen) = (asked.experts, &busy.choice.experts);
        let slots = &experts.slots;
        slots.nothing_reads();
        let missing = slots.missing(chosen);
        let computed = self.tiers.plan.computed(missing.len());
        let (uploaded, computed) = missing.split_at(missing.len() - computed);
        let is_claimed = |expert: &&ExpertId| computed.iter().all(|m| m.expert != **expert);
        let claim = slots.claim(&self.device, chosen.iter().filter(is_claimed).copied());
        let fetch = |missing: &[Missing]| {
            let ids: Vec<ExpertId> = missing.iter().map(|m| m.expert).collect();
            host.store.fetch(slots.layer(), &ids)
        };
        let mut uploads = match self.tiers.in_place {
            true => self.read_in_place(host, slots, &claim.missing, Purpose::Use)?,
            false => fetch(uploaded),
        };
        let mut others = fetch(computed);
        let mut front = self.bring(host, experts, (&claim, uploaded), &mut uploads)?;
        if !computed.is_empty() {
            Commands::submit_some(&self.device, &mut front);
            Commands::submit_some(&self.device, later);
            let mut records = Vec::new();
            front.push(self.compute(host, experts, (computed, &mut others), busy, &mut records)?);
            *kept = Some(Kept { experts, records });
        }
        Ok(front)
    }

    /// The processor computes experts as they land; the weighted sum of them goes where the kernel that adds
    /// up the layer finds it.
    fn compute<'g, 's>(
        &'g self,
        host: &Host<'s>,
        experts: &Experts,
        (missing, fetch): (&[Missing], &mut Fetch<'s>),
        busy: &mut Busy,
        kept: &mut Vec<(ExpertId, Record<'s>)>,
    ) -> Result<Commands<'g>> {
        let (choice, layout) = (&busy.choice, experts.slots.layout());
        let weights: Vec<f32> = missing.iter().map(|m| choice.weights[m.rank]).collect();
        let one = OneToken { layout, x: &choice.normed, weights: &weights };
        let back = missing.iter().filter(|m| m.is_back).map(|m| m.expert);
        let admitted: Vec<ExpertId> = back.take(ADMITTED_MAX).collect();
        let mut used = |i: usize, record: Record<'s>| {
            if admitted.contains(&missing[i].expert) {
                kept.push((missing[i].expert, record));
            }
        };
        let mut sum = vec![0.0; self.shape.hidden];
        let mut timing = Timing::default();
        let Workspace { scratch, tmp } = &mut busy.workspace;
        let buffers = (scratch, tmp, &mut timing);
        add_experts(host.compute, &one, fetch, buffers, &mut used, &mut sum)?;
        // Neither which ones they are nor their order is that in which they landed.
        kept.sort_by_key(|(expert, _)| *expert);
        let ns = timing.stage(Stage::Experts).ns;
        self.tiers.computed.fetch_add(missing.len() as u64, Ordering::Relaxed);
        self.tiers.compute_ns.fetch_add(ns, Ordering::Relaxed);
        if let Some(clock) = self.clock() {
            clock.take_off(Stage::Experts, (missing.len() * layout.record_bytes()) as u64);
        }
        let mut work = self.work();
        let to = self.layout.at("ELSEWHERE_AT") as u64 * 4;
        self.note(&mut work, &[(bytemuck::cast_slice(&sum), &self.scratch, to)])?;
        Ok(work.finish())
    }

    /// Stages what is to be in video memory from now on, while the device is busy. The commands go to `later`.
    pub(super) fn admit<'g>(
        &'g self,
        host: &Host,
        kept: Option<Kept<'g, '_>>,
        later: &mut Vec<Commands<'g>>,
    ) -> Result<()> {
        let Some(Kept { experts, records }) = kept else { return Ok(()) };
        for (expert, record) in records {
            if later.len() == self.tiers.batch() {
                break;
            }
            let claim = experts.slots.claim(&self.device, std::iter::once(expert));
            let mut work = self.work();
            for place in &claim.missing {
                let place = (&record, *place);
                self.stage_behind(host, &mut work, &experts.slots, &[place], &[])?;
                self.tiers.admitted.fetch_add(1, Ordering::Relaxed);
            }
            later.push(work.finish());
        }
        Ok(())
    }

    /// Brings what a claim misses as it lands and computes it up to its activations. What has landed last
    /// is not handed over yet.
    fn bring<'g>(
        &'g self,
        host: &Host,
        experts: &Experts,
        (claim, missing): (&Claim, &[Missing]),
        fetch: &mut Fetch,
    ) -> Result<Vec<Commands<'g>>> {
        let mut last = Vec::new();
        let mut landed = Landed::new();
        let mut left = missing.len();
        while left > 0 {
            Commands::submit_some(&self.device, &mut last);
            fetch.ready(&mut landed)?;
            left -= landed.len();
            for some in landed.chunks(self.tiers.batch()) {
                let staged: Vec<_> = some.iter().map(|(i, r)| (r, claim.missing[*i])).collect();
                let ranks: Vec<u32> = some.iter().map(|(i, _)| missing[*i].rank as u32).collect();
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
pub fn collect<'s>(sweep: &mut Fetch<'s>, most: usize) -> Result<Vec<Record<'s>>> {
    let mut records = vec![sweep.next_in_order()?.expect("as many records as were asked for")];
    while records.len() < most {
        let Some(record) = sweep.next_if_ready()? else { break };
        records.push(record);
    }
    Ok(records)
}
