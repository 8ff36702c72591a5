//! Which expert is in which slot: pure logic, no bytes.
//!
//! A bounded set of slots shared by all layers. A slot is empty, being read, ready, or failed; a
//! pinned slot is in use by a fetch and is never evicted. Eviction is CLOCK: a hit sets a mark, the
//! hand clears marks until it meets an unmarked slot that nobody holds.

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

#[derive(Clone, Copy)]
struct Slot {
    state: SlotState,
    pins: u32,
    marked: bool,
}

const NOWHERE: u32 = u32::MAX;

/// The table of slots.
pub struct Slots {
    slots: Vec<Slot>,
    places: Vec<u32>, // [keys], slot of the expert or NOWHERE
    hand: usize,
}

impl Slots {
    /// `slots` empty slots for experts with keys below `keys`.
    pub fn new(slots: usize, keys: usize) -> Self {
        let empty = Slot { state: SlotState::Empty, pins: 0, marked: false };
        Self { slots: vec![empty; slots], places: vec![NOWHERE; keys], hand: 0 }
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

    /// Finds an expert that is ready or being read, pins its slot and marks it as used.
    pub fn pin(&mut self, key: Key) -> Option<SlotId> {
        let place = self.places[key.0 as usize];
        let slot = self.slots.get_mut(place as usize)?;
        slot.pins += 1;
        slot.marked = true;
        Some(SlotId(place))
    }

    /// Takes a slot for an expert that is about to be read, evicting if need be, and pins it.
    ///
    /// `None` when every slot is pinned or being read.
    pub fn claim(&mut self, key: Key) -> Option<SlotId> {
        debug_assert_eq!(self.places[key.0 as usize], NOWHERE, "claimed only when it is not here");
        let index = self.evict()?;
        self.slots[index] = Slot { state: SlotState::Reading(key), pins: 1, marked: true };
        self.places[key.0 as usize] = index as u32;
        Some(SlotId(index as u32))
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

    /// Empties every slot whose record nobody holds.
    pub fn clear(&mut self) {
        for slot in &mut self.slots {
            if let (SlotState::Ready(key), 0) = (slot.state, slot.pins) {
                self.places[key.0 as usize] = NOWHERE;
                *slot = Slot { state: SlotState::Empty, pins: 0, marked: false };
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
            if let SlotState::Ready(key) = slot.state {
                self.places[key.0 as usize] = NOWHERE;
            }
            return Some(index);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn evict_never_drops_a_pinned_slot() {
        let mut slots = Slots::new(2, 10);
        let a = slots.claim(Key(0)).unwrap();
        slots.landed(a);
        for key in 1..6 {
            let b = slots.claim(Key(key)).unwrap();
            assert_ne!(a, b);
            slots.landed(b);
            slots.unpin(b);
        }
        assert_eq!(slots.state(a), SlotState::Ready(Key(0)));
    }

    #[test]
    fn claim_has_no_answer_when_all_slots_are_held() {
        let mut slots = Slots::new(1, 4);
        let a = slots.claim(Key(0)).unwrap();
        assert_eq!(slots.claim(Key(1)), None);
        slots.landed(a);
        assert_eq!(slots.claim(Key(1)), None);
        slots.unpin(a);
        assert!(slots.claim(Key(1)).is_some());
    }

    #[test]
    fn a_failed_expert_is_read_again_and_its_slot_returns_after_the_last_waiter() {
        let mut slots = Slots::new(2, 4);
        let a = slots.claim(Key(3)).unwrap();
        assert_eq!(slots.pin(Key(3)), Some(a));
        slots.failed(a);
        assert_eq!(slots.pin(Key(3)), None);
        slots.unpin(a);
        assert_eq!(slots.state(a), SlotState::Failed(Key(3)));
        slots.unpin(a);
        assert_eq!(slots.state(a), SlotState::Empty);
        assert!(slots.claim(Key(3)).is_some());
    }

    #[test]
    fn clear_empties_what_nobody_holds_and_nothing_else() {
        let mut slots = Slots::new(3, 4);
        let [held, reading, idle] = [0, 1, 2].map(|key| slots.claim(Key(key)).unwrap());
        slots.landed(held);
        slots.landed(idle);
        slots.unpin(reading);
        slots.unpin(idle);
        slots.clear();
        assert_eq!(slots.state(held), SlotState::Ready(Key(0)));
        assert_eq!(slots.state(reading), SlotState::Reading(Key(1)));
        assert_eq!(slots.state(idle), SlotState::Empty);
        assert_eq!(slots.pin(Key(2)), None);
    }

    #[test]
    fn an_expert_used_again_outlives_one_that_was_not() {
        let mut slots = Slots::new(3, 10);
        for key in 0..3 {
            let slot = slots.claim(Key(key)).unwrap();
            slots.landed(slot);
            slots.unpin(slot);
        }
        let evictor = slots.claim(Key(3)).unwrap(); // clears the marks, takes the first slot
        slots.landed(evictor);
        slots.unpin(evictor);
        let used = slots.pin(Key(1)).unwrap();
        slots.unpin(used);
        let next = slots.claim(Key(4)).unwrap();
        slots.unpin(next);
        assert!(slots.pin(Key(1)).is_some(), "marked by its use");
        assert!(slots.pin(Key(2)).is_none(), "unmarked, so evicted");
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
                    0 => if let Some(slot) = slots.pin(key) {
                        let state = slots.state(slot);
                        prop_assert!(state == SlotState::Ready(key) || state == SlotState::Reading(key));
                        held.push((key, slot));
                    } else if let Some(slot) = slots.claim(key) {
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
