//! A rank's slots on their way into the buckets of an all-reduce.
//!
//! Slots finish their gradients from the end to the beginning, several at a time. A bucket that
//! every slot has been added to leaves at once, while the slots go on with the next.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use tokio::sync::mpsc::UnboundedSender;

use crate::reduce::{Bucket, OutOfRange, Sums};

/// The buckets of a step, until all slots of this rank are in them.
pub(super) struct Gathering<'a> {
    buckets: Vec<Mutex<Filling>>,
    /// The first element of each bucket.
    starts: Vec<usize>,
    slots: Vec<Mutex<Progress>>,
    /// Buckets that have left.
    left: Mutex<usize>,
    ready: &'a UnboundedSender<Bucket>,
}

struct Filling {
    /// Until it leaves.
    bucket: Option<Bucket>,
    /// Slots that are not in it yet.
    missing: usize,
}

impl Filling {
    /// One slot more is in it. The last one completes it, before anybody waits for it to leave.
    fn is_in(&mut self) {
        self.missing -= 1;
        if self.missing == 0 {
            self.bucket = self.bucket.take().map(Bucket::complete);
        }
    }
}

/// How far a slot has come.
#[derive(Default)]
struct Progress {
    /// Buckets that it is in.
    buckets: usize,
    /// What has no place in the sum: the first such element of those seen.
    fault: Option<OutOfRange>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Gathering<'a> {
    /// Gathers so many slots into sums that are still zero. Buckets go to `ready`, by number.
    pub(super) fn new(sums: Sums, slots: usize, ready: &'a UnboundedSender<Bucket>) -> Self {
        let buckets = sums.into_buckets();
        let gathering = Self {
            starts: buckets.iter().map(|bucket| bucket.elements().start).collect(),
            buckets: buckets
                .into_iter()
                .map(|bucket| Mutex::new(Filling { bucket: Some(bucket), missing: slots }))
                .collect(),
            slots: (0..slots).map(|_| Mutex::default()).collect(),
            left: Mutex::new(0),
            ready,
        };
        gathering.let_go();
        gathering
    }

    /// Adds a slot's gradient to all buckets whose elements are final, that is at or after `from`,
    /// but for the last one, which waits for the slot's integers.
    pub(super) fn add(&self, slot: usize, gradient: &[f32], from: usize) {
        let (_, before_last) = self.starts.split_last().expect("sums have a bucket");
        self.add_until(slot, gradient, before_last.partition_point(|start| *start >= from));
    }

    /// Adds all that is left of a slot's gradient. To be followed by [`Gathering::close`]: until then
    /// the last bucket waits.
    ///
    /// # Errors
    /// Names the first value that has no place in the sums, which then have no meaning.
    pub(super) fn finish(&self, slot: usize, gradient: &[f32]) -> Result<(), OutOfRange> {
        self.add_until(slot, gradient, self.buckets.len());
        lock(&self.slots[slot]).fault.take().map_or(Ok(()), Err)
    }

    /// Changes the integers for a slot whose gradient is finished; it is then in all sums.
    pub(super) fn close(&self, change: impl FnOnce(&mut [i64])) {
        let mut last = lock(self.buckets.last().expect("sums have a bucket"));
        if let Some(bucket) = &mut last.bucket {
            change(bucket.integers_mut());
        }
        last.is_in();
        drop(last);
        self.let_go();
    }

    fn add_until(&self, slot: usize, gradient: &[f32], end: usize) {
        let mut progress = lock(&self.slots[slot]);
        let due = progress.buckets..end.max(progress.buckets);
        let added = |number: usize| {
            let mut filling = lock(&self.buckets[number]);
            let added = filling.bucket.as_mut().map_or(Ok(()), |bucket| bucket.add(gradient));
            if number + 1 < self.buckets.len() {
                filling.is_in();
            }
            added.err()
        };
        let faults = due.clone().into_par_iter().filter_map(added);
        let fault = faults.min_by_key(|fault| fault.index);
        // Elements of later buckets come first in the gradient.
        progress.fault = fault.or(progress.fault);
        progress.buckets = due.end;
        drop(progress);
        if !due.is_empty() {
            self.let_go();
        }
    }

    /// Sends off all buckets that are complete, after those before them.
    fn let_go(&self) {
        let mut left = lock(&self.left);
        while let Some(filling) = self.buckets.get(*left) {
            let Filling { bucket, missing } = &mut *lock(filling);
            let Some(bucket) = bucket.take_if(|_| *missing == 0) else { break };
            // When nobody reduces any more, the step is abandoned, and these with it. One without slots
            // becomes complete here.
            let _ = self.ready.send(bucket.complete());
            *left += 1;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::spec::Reduction;
    use tokio::sync::mpsc;

    use super::*;
    use crate::reduce::Arithmetic;

    /// Sums of four buckets.
    const ELEMENTS: usize = 2 << 20;

    fn zeroed() -> Sums {
        Sums::zeroed(Arithmetic::new(Reduction::Exact, 40, 8), ELEMENTS, 2, None)
    }

    fn gradient(slot: usize) -> Vec<f32> {
        (0..ELEMENTS).map(|i| ((i * 7 + slot * 31) % 1009) as f32 / 64.0 - 5.0).collect()
    }

    fn count(integers: &mut [i64]) {
        integers[1] += 1;
    }

    #[test]
    fn a_bucket_leaves_when_the_last_slot_is_in_it() {
        let (sender, mut ready) = mpsc::unbounded_channel();
        let gathering = Gathering::new(zeroed(), 2, &sender);
        let mut left = || std::iter::from_fn(|| ready.try_recv().ok()).collect::<Vec<_>>();
        let numbers = |left: &[Bucket]| left.iter().map(Bucket::number).collect::<Vec<_>>();
        let (one, other) = (gradient(0), gradient(1));
        gathering.add(0, &one, ELEMENTS / 4);
        assert!(left().is_empty(), "the other slot is missing");
        gathering.add(1, &other, ELEMENTS / 2 + 1);
        let mut all = left();
        assert_eq!(numbers(&all), [0], "bucket 1 has one element that is not final");
        gathering.add(1, &other, 0);
        all.extend(left());
        assert_eq!(numbers(&all), [0, 1, 2], "the last one waits for the integers");
        for (slot, gradient) in [&one, &other].into_iter().enumerate() {
            gathering.finish(slot, gradient).unwrap();
            gathering.close(count);
        }
        all.extend(left());
        let mut expected = zeroed();
        expected.add(&one).unwrap();
        expected.add(&other).unwrap();
        expected.integers_mut()[1] = 2;
        assert!(Sums::from_buckets(all).unwrap() == expected);
    }

    #[test]
    fn buckets_leave_in_order_whichever_slot_is_ahead() {
        let (sender, mut ready) = mpsc::unbounded_channel();
        let gathering = Gathering::new(zeroed(), 5, &sender);
        std::thread::scope(|scope| {
            for slot in 0..5 {
                let gathering = &gathering;
                scope.spawn(move || {
                    let gradient = gradient(slot);
                    for from in (0..ELEMENTS).rev().step_by(100_003 * (slot + 1)) {
                        gathering.add(slot, &gradient, from);
                    }
                    gathering.finish(slot, &gradient).unwrap();
                    gathering.close(count);
                });
            }
        });
        let left: Vec<Bucket> = std::iter::from_fn(|| ready.try_recv().ok()).collect();
        assert!(left.iter().map(Bucket::number).eq(0..4));
        let mut expected = zeroed();
        (0..5).for_each(|slot| expected.add(&gradient(slot)).unwrap());
        expected.integers_mut()[1] = 5;
        assert!(Sums::from_buckets(left).unwrap() == expected);
    }

    #[test]
    fn a_rank_without_slots_gives_zeros_at_once() {
        let (sender, ready) = mpsc::unbounded_channel();
        drop(Gathering::new(zeroed(), 0, &sender));
        drop(sender);
        assert!(Sums::from_ready(ready).unwrap() == zeroed());
    }

    #[test]
    fn the_first_value_without_a_place_is_named_and_the_last_bucket_stays() {
        let (sender, mut ready) = mpsc::unbounded_channel();
        let gathering = Gathering::new(zeroed(), 1, &sender);
        let mut bad = gradient(0);
        (bad[ELEMENTS - 1], bad[17], bad[99]) = (f32::NAN, f32::INFINITY, f32::NAN);
        gathering.add(0, &bad, ELEMENTS / 2);
        let fault = gathering.finish(0, &bad).unwrap_err();
        assert_eq!((fault.index, fault.value), (17, f32::INFINITY));
        assert_eq!(std::iter::from_fn(|| ready.try_recv().ok()).count(), 3);
    }
}
