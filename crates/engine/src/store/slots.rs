//! Which expert is in which slot: pure logic, no bytes.
//!
//! A bounded set of slots shared by all layers. A slot is empty, being read, ready, or failed; a
//! pinned slot is in use by a fetch and is never evicted. Eviction is CLOCK: a hit sets a mark, the
//! hand clears marks until it meets an unmarked slot that nobody holds. A scan (a prompt that passes
//! over whole layers) recycles its own slots once the pool is full, so that it cannot wash out what
//! decoding uses. What is brought in before anybody asks is not pinned: a guess (lookahead) takes a slot
//! like a use, a preload (what an earlier run used) only one that is empty.

use std::collections::VecDeque;

/// Index of a slot in the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotId(pub u32);

/// An expert of the whole model: layer ordinal times experts a layer, plus the expert.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key(pub u32);

/// What a slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotState {
    /// Nothing.
    Empty,
    /// A read of this expert is under way.
    Reading(Key),
    /// The expert's record.
    Ready(Key),
    /// The read of this expert failed; whoever waits must be told.
    Failed(Key),
}

/// Why an expert is brought in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// A token needs it, and probably the next ones will.
    Use,
    /// A prompt passes over it once.
    Scan,
    /// It may be needed soon.
    Guess,
    /// An earlier run used it.
    Preload,
}

impl Purpose {
    /// Whether nobody has asked for it.
    fn is_ahead(self) -> bool {
        matches!(self, Self::Guess | Self::Preload)
    }
}

#[derive(Clone, Copy)]
struct Slot {
    state: SlotState,
    pins: u32,
    marked: bool,
    brought: Purpose,
}

const NOWHERE: u32 = u32::MAX;

/// The table of slots.
pub struct Slots {
    slots: Vec<Slot>,
    places: Vec<u32>, // [keys], slot of the expert or NOWHERE
    hand: usize,
    scanned: VecDeque<u32>, // slots that scans brought in, oldest first; some may have moved on
    empty_below: usize,     // no slot from here on is empty, as far as preloads have looked
}

impl Slots {
    /// `slots` empty slots for experts with keys below `keys`.
    pub fn new(slots: usize, keys: usize) -> Self {
        let empty = Slot { state: SlotState::Empty, pins: 0, marked: false, brought: Purpose::Use };
        Self {
            slots: vec![empty; slots],
            places: vec![NOWHERE; keys],
            hand: 0,
            scanned: VecDeque::new(),
            empty_below: slots,
        }
    }

    /// Experts that are ready, in slot order.
    pub fn residents(&self) -> impl Iterator<Item = Key> + '_ {
        self.slots.iter().filter_map(|slot| match slot.state {
            SlotState::Ready(key) => Some(key),
            _ => None,
        })
    }

    /// Whether an expert is ready or being read.
    pub fn holds(&self, key: Key) -> bool {
        self.places[key.0 as usize] != NOWHERE
    }

    /// Number of slots.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Slots that hold or are reading an expert.
    pub fn used(&self) -> usize {
        self.slots.iter().filter(|s| s.state != SlotState::Empty).count()
    }

    /// State of a slot.
    pub fn state(&self, slot: SlotId) -> SlotState {
        self.slots[slot.0 as usize].state
    }

    /// Why an expert that is here was brought in, or what it was asked for since.
    pub fn brought(&self, key: Key) -> Purpose {
        let slot = self.slots.get(self.places[key.0 as usize] as usize);
        slot.map_or(Purpose::Use, |slot| slot.brought)
    }

    /// Finds an expert that is ready or being read and pins its slot.
    ///
    /// Only a use marks it: a scan that meets an expert says nothing about the tokens after it.
    pub fn pin(&mut self, key: Key, purpose: Purpose) -> Option<SlotId> {
        let place = self.places[key.0 as usize];
        let slot = self.slots.get_mut(place as usize)?;
        slot.pins += 1;
        if purpose == Purpose::Use {
            slot.marked = true;
        }
        if purpose == Purpose::Use || slot.brought.is_ahead() {
            slot.brought = purpose;
        }
        Some(SlotId(place))
    }

    /// Takes a slot for an expert that is about to be read, evicting if need be, and pins it.
    ///
    /// A guess is not pinned. `None` when every slot is pinned or being read.
    pub fn claim(&mut self, key: Key, purpose: Purpose) -> Option<SlotId> {
        debug_assert!(!self.holds(key), "claimed only when it is not here");
        let index = match purpose {
            Purpose::Scan => self.empty().or_else(|| self.recycle()).or_else(|| self.evict())?,
            _ => self.evict()?,
        };
        self.vacate(index);
        if purpose == Purpose::Scan {
            self.scanned.push_back(index as u32);
        }
        Some(self.fill(index, key, purpose))
    }

    /// Takes an empty slot for an expert that is about to be read, from the end that the hand comes
    /// to last: what is claimed first stays longest. `None` when no slot is empty.
    pub fn claim_empty(&mut self, key: Key, purpose: Purpose) -> Option<SlotId> {
        debug_assert!(!self.holds(key), "claimed only when it is not here");
        let index = self.empty()?;
        Some(self.fill(index, key, purpose))
    }

    /// The empty slot that the hand comes to last.
    fn empty(&mut self) -> Option<usize> {
        let below = &self.slots[..self.empty_below];
        let index = below.iter().rposition(|slot| slot.state == SlotState::Empty);
        self.empty_below = index.unwrap_or(0);
        index
    }

    fn fill(&mut self, index: usize, key: Key, purpose: Purpose) -> SlotId {
        self.slots[index] = Slot {
            state: SlotState::Reading(key),
            pins: u32::from(!purpose.is_ahead()),
            // What an earlier run used has been used: it stays for a round of the hand.
            marked: matches!(purpose, Purpose::Use | Purpose::Preload),
            brought: purpose,
        };
        self.places[key.0 as usize] = index as u32;
        SlotId(index as u32)
    }

    /// Withdraws a guess whose read has not begun; `false` if somebody has asked for it since.
    pub fn withdraw(&mut self, slot: SlotId) -> bool {
        let index = slot.0 as usize;
        let guess = &self.slots[index];
        let reading = matches!(guess.state, SlotState::Reading(_));
        if !reading || guess.pins > 0 || guess.brought != Purpose::Guess {
            return false;
        }
        self.vacate(index);
        self.slots[index].state = SlotState::Empty;
        true
    }

    /// The read of this slot is complete.
    pub fn landed(&mut self, slot: SlotId) {
        let slot = &mut self.slots[slot.0 as usize];
        if let SlotState::Reading(key) = slot.state {
            slot.state = SlotState::Ready(key);
        }
    }

    /// The read of this slot failed: the expert is not here, the slot is freed by its last unpin.
    pub fn failed(&mut self, slot: SlotId) {
        let slot = &mut self.slots[slot.0 as usize];
        if let SlotState::Reading(key) = slot.state {
            self.places[key.0 as usize] = NOWHERE;
            slot.state = if slot.pins == 0 { SlotState::Empty } else { SlotState::Failed(key) };
        }
    }

    /// Gives up one pin.
    pub fn unpin(&mut self, slot: SlotId) {
        let slot = &mut self.slots[slot.0 as usize];
        assert!(slot.pins > 0, "unpinned more often than pinned");
        slot.pins -= 1;
        if slot.pins == 0 && matches!(slot.state, SlotState::Failed(_)) {
            slot.state = SlotState::Empty;
        }
    }

    /// Forgets what a slot holds.
    fn vacate(&mut self, index: usize) {
        if let SlotState::Ready(key) | SlotState::Reading(key) = self.slots[index].state {
            self.places[key.0 as usize] = NOWHERE;
        }
    }

    /// The oldest slot that a scan brought in and nothing has used since, once the pool is full and
    /// scans hold more than their share of it.
    fn recycle(&mut self) -> Option<usize> {
        if self.scanned.len() < (self.slots.len() / SCAN_SHARE).max(SCAN_SLOTS_MIN) {
            return None;
        }
        for _ in 0..self.scanned.len() {
            let index = self.scanned.pop_front()? as usize;
            let slot = &self.slots[index];
            if slot.brought != Purpose::Scan {
                continue;
            }
            if slot.pins == 0 && matches!(slot.state, SlotState::Ready(_)) {
                return Some(index);
            }
            self.scanned.push_back(index as u32);
        }
        None
    }

    /// Empties every slot whose record nobody holds.
    pub fn clear(&mut self) {
        self.empty_below = self.slots.len();
        for index in 0..self.slots.len() {
            if let (SlotState::Ready(_), 0) = (self.slots[index].state, self.slots[index].pins) {
                self.vacate(index);
                self.slots[index].state = SlotState::Empty;
            }
        }
    }

    /// One round of the hand clears every mark, the second finds a victim if there is one.
    fn evict(&mut self) -> Option<usize> {
        for _ in 0..2 * self.slots.len() {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[index];
            if slot.pins > 0 || matches!(slot.state, SlotState::Reading(_)) {
                continue;
            }
            if slot.marked && slot.state != SlotState::Empty {
                slot.marked = false;
                continue;
            }
            return Some(index);
        }
        None
    }
}

/// A scan may fill this part of the pool (one in so many slots) before it recycles its own.
const SCAN_SHARE: usize = 4;
/// Slots that a scan may hold in any pool: enough to keep every reader busy.
const SCAN_SLOTS_MIN: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn evict_never_drops_a_pinned_slot() {
        let mut slots = Slots::new(2, 10);
        let a = slots.claim(Key(0), Purpose::Use).unwrap();
        slots.landed(a);
        for key in 1..6 {
            let b = slots.claim(Key(key), Purpose::Use).unwrap();
            assert_ne!(a, b);
            slots.landed(b);
            slots.unpin(b);
        }
        assert_eq!(slots.state(a), SlotState::Ready(Key(0)));
    }

    #[test]
    fn claim_has_no_answer_when_all_slots_are_held() {
        let mut slots = Slots::new(1, 4);
        let a = slots.claim(Key(0), Purpose::Use).unwrap();
        assert_eq!(slots.claim(Key(1), Purpose::Use), None);
        slots.landed(a);
        assert_eq!(slots.claim(Key(1), Purpose::Use), None);
        slots.unpin(a);
        assert!(slots.claim(Key(1), Purpose::Use).is_some());
    }

    #[test]
    fn a_failed_expert_is_read_again_and_its_slot_returns_after_the_last_waiter() {
        let mut slots = Slots::new(2, 4);
        let a = slots.claim(Key(3), Purpose::Use).unwrap();
        assert_eq!(slots.pin(Key(3), Purpose::Use), Some(a));
        slots.failed(a);
        assert_eq!(slots.pin(Key(3), Purpose::Use), None);
        slots.unpin(a);
        assert_eq!(slots.state(a), SlotState::Failed(Key(3)));
        slots.unpin(a);
        assert_eq!(slots.state(a), SlotState::Empty);
        assert!(slots.claim(Key(3), Purpose::Use).is_some());
    }

    #[test]
    fn clear_empties_what_nobody_holds_and_nothing_else() {
        let mut slots = Slots::new(3, 4);
        let [held, reading, idle] =
            [0, 1, 2].map(|key| slots.claim(Key(key), Purpose::Use).unwrap());
        slots.landed(held);
        slots.landed(idle);
        slots.unpin(reading);
        slots.unpin(idle);
        slots.clear();
        assert_eq!(slots.state(held), SlotState::Ready(Key(0)));
        assert_eq!(slots.state(reading), SlotState::Reading(Key(1)));
        assert_eq!(slots.state(idle), SlotState::Empty);
        assert_eq!(slots.pin(Key(2), Purpose::Use), None);
    }

    #[test]
    fn an_expert_used_again_outlives_one_that_was_not() {
        let mut slots = Slots::new(3, 10);
        for key in 0..3 {
            let slot = slots.claim(Key(key), Purpose::Use).unwrap();
            slots.landed(slot);
            slots.unpin(slot);
        }
        let evictor = slots.claim(Key(3), Purpose::Use).unwrap(); // clears the marks, takes the first slot
        slots.landed(evictor);
        slots.unpin(evictor);
        let used = slots.pin(Key(1), Purpose::Use).unwrap();
        slots.unpin(used);
        let next = slots.claim(Key(4), Purpose::Use).unwrap();
        slots.unpin(next);
        assert!(slots.pin(Key(1), Purpose::Use).is_some(), "marked by its use");
        assert!(slots.pin(Key(2), Purpose::Use).is_none(), "unmarked, so evicted");
    }

    fn read(slots: &mut Slots, key: u32, purpose: Purpose) -> SlotId {
        let slot = slots.claim(Key(key), purpose).unwrap();
        slots.landed(slot);
        if !purpose.is_ahead() {
            slots.unpin(slot);
        }
        slot
    }

    #[test]
    fn a_scan_does_not_wash_out_what_is_used() {
        let mut slots = Slots::new(200, 5000);
        for key in 0..150 {
            read(&mut slots, key, Purpose::Use);
        }
        for key in 1000..4000 {
            read(&mut slots, key, Purpose::Scan);
        }
        let kept = (0..150).filter(|&key| slots.holds(Key(key))).count();
        assert!(kept >= 140, "{kept} of 150 kept");
    }

    #[test]
    fn a_scan_recycles_nothing_while_a_slot_is_empty() {
        let mut slots = Slots::new(200, 5000);
        for key in 0..200 {
            read(&mut slots, key, Purpose::Scan);
        }
        assert!((0..200).all(|key| slots.holds(Key(key))));
        read(&mut slots, 200, Purpose::Scan);
        assert!(!slots.holds(Key(0)), "the oldest goes first");
    }

    #[test]
    fn a_guess_is_withdrawn_until_somebody_asks_for_it() {
        let mut slots = Slots::new(3, 10);
        let queued = slots.claim(Key(2), Purpose::Guess).unwrap();
        assert!(slots.withdraw(queued), "nobody asked for it");
        assert!(!slots.holds(Key(2)));
        let asked = slots.claim(Key(3), Purpose::Guess).unwrap();
        assert_eq!(slots.brought(Key(3)), Purpose::Guess);
        slots.pin(Key(3), Purpose::Use).unwrap();
        assert_eq!(slots.brought(Key(3)), Purpose::Use);
        assert!(!slots.withdraw(asked), "somebody waits for it");
    }

    #[test]
    fn a_preload_takes_empty_slots_only_and_the_first_stays_longest() {
        let mut slots = Slots::new(4, 10);
        read(&mut slots, 0, Purpose::Use);
        for key in 1..4 {
            let slot = slots.claim_empty(Key(key), Purpose::Preload).unwrap();
            slots.landed(slot);
        }
        assert_eq!(slots.claim_empty(Key(4), Purpose::Preload), None);
        for (key, gone) in [(5, 3), (6, 2), (7, 1)] {
            read(&mut slots, key, Purpose::Use);
            assert!(!slots.holds(Key(gone)), "{gone} goes for {key}");
        }
    }

    proptest! {
        /// Random operations against a plain map from key to slot.
        #[test]
        fn slots_agree_with_a_map(ops in prop::collection::vec((0u8..4, 0u32..12), 1..400)) {
            let mut slots = Slots::new(5, 12);
            let mut held: Vec<(Key, SlotId)> = Vec::new();
            let mut reading: HashMap<u32, SlotId> = HashMap::new();
            for (op, k) in ops {
                let key = Key(k);
                match op {
                    0 => if let Some(slot) = slots.pin(key, Purpose::Use) {
                        let state = slots.state(slot);
                        prop_assert!(state == SlotState::Ready(key) || state == SlotState::Reading(key));
                        held.push((key, slot));
                    } else if let Some(slot) = slots.claim(key, Purpose::Use) {
                        prop_assert!(held.iter().all(|h| h.1 != slot), "claimed a pinned slot");
                        held.push((key, slot));
                        reading.insert(k, slot);
                    } else {
                        prop_assert!(held.len() + reading.len() >= 5);
                    },
                    1 => if let Some(slot) = reading.remove(&k) { slots.landed(slot); },
                    2 => if let Some(slot) = reading.remove(&k) { slots.failed(slot); },
                    _ => if !held.is_empty() {
                        let (_, slot) = held.remove(k as usize % held.len());
                        slots.unpin(slot);
                    },
                }
                for (key, slot) in &held {
                    let state = slots.state(*slot);
                    prop_assert!(matches!(state, SlotState::Ready(x) | SlotState::Reading(x) | SlotState::Failed(x) if x == *key));
                }
            }
        }
    }
}
