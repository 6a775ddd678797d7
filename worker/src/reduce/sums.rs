//! What is reduced: a gradient, and integers beside it, in buckets of 64-bit words.
//!
//! An exact gradient has one fixed-point integer a word, a fast one two floats a word, or four once they
//! have been rounded to bf16 to leave the rank. The integers are integers whatever the gradient is, so
//! counts and statistics are always exact. One all-reduce carries all buckets.

use looptrain_model::DeviceSums;
use looptrain_proto::Digest;
use looptrain_proto::spec::Reduction;
use rayon::prelude::*;
use tokio::sync::mpsc;

use super::bucket::{Bucket, Cut};
use super::exact::FixedPoint;
use super::fast::SinglePrecision;
use super::range::OutOfRange;

/// How a gradient is summed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arithmetic {
    /// As integers, whose sum is the same in any order.
    Exact(FixedPoint),
    /// As floats.
    Fast(SinglePrecision),
}

impl Arithmetic {
    /// For sums over a number of slots; `fraction_bits` are those of fixed point.
    ///
    /// # Panics
    /// As [`FixedPoint::new`].
    #[must_use]
    pub fn new(reduction: Reduction, fraction_bits: u32, slots: u32) -> Self {
        match reduction {
            Reduction::Exact => Self::Exact(FixedPoint::new(fraction_bits, slots)),
            Reduction::Fast => Self::Fast(SinglePrecision::new(slots)),
            Reduction::FastBf16 => Self::Fast(SinglePrecision::narrowing(slots)),
        }
    }

    /// Elements of a gradient in a word, while slots are added.
    pub(super) fn per_word(self) -> usize {
        match self {
            Self::Exact(_) => 1,
            Self::Fast(_) => size_of::<i64>() / size_of::<f32>(),
        }
    }

    /// Whether the sums are rounded to bf16 when they leave a rank.
    pub(super) fn narrows(self) -> bool {
        matches!(self, Self::Fast(single) if single.narrows())
    }

    /// Words of a gradient.
    pub(super) fn words(self, elements: usize) -> usize {
        elements.div_ceil(self.per_word())
    }

    /// Adds `values` to the words that hold their sums.
    pub(super) fn add(self, words: &mut [i64], values: &[f32]) -> Result<(), OutOfRange> {
        match self {
            Self::Exact(fixed) => fixed.encode_add(words, values),
            Self::Fast(single) => {
                single.add(&mut bytemuck::cast_slice_mut(words)[..values.len()], values)
            }
        }
    }

    /// The sums that `words` hold, divided by `divisor`.
    pub(super) fn mean(self, words: &[i64], divisor: f64, out: &mut [f32]) {
        match self {
            Self::Exact(fixed) => fixed.decode(words, divisor, out),
            Self::Fast(single) => {
                single.divide(&bytemuck::cast_slice(words)[..out.len()], divisor, out);
            }
        }
    }
}

/// The sums of a step: first of one rank's slots, once reduced of all.
#[derive(Clone, Debug, PartialEq)]
pub struct Sums {
    /// All of one cut, by number.
    buckets: Vec<Bucket>,
}

impl Sums {
    /// All zero: a gradient of `elements` elements, and `integers` integers; in the memory of other
    /// sums that are of no use any more.
    #[must_use]
    pub fn zeroed(
        arithmetic: Arithmetic,
        elements: usize,
        integers: usize,
        memory: Option<Self>,
    ) -> Self {
        Self::cut(Cut::new(arithmetic, elements, integers), memory)
    }

    /// The integers beside a gradient that is summed on the device that computes it, in so many buckets.
    #[must_use]
    pub fn beside_device(
        arithmetic: Arithmetic,
        elements: usize,
        integers: usize,
        buckets: usize,
    ) -> Self {
        Self::cut(Cut::elsewhere(arithmetic, elements, integers, buckets), None)
    }

    /// Buckets that a gradient is cut into.
    #[must_use]
    pub fn buckets(arithmetic: Arithmetic, elements: usize) -> usize {
        Cut::new(arithmetic, elements, 0).buckets
    }

    /// Whether the gradient is on a device, and only the integers are here.
    #[must_use]
    pub fn is_beside_device(&self) -> bool {
        self.last().cut.elsewhere
    }

    /// How a device sums what this sums here, where so many slots are one rank's.
    #[must_use]
    pub fn on_device(arithmetic: Arithmetic, slots: u32) -> DeviceSums {
        match arithmetic {
            Arithmetic::Exact(fixed) => {
                DeviceSums::Exact { scale: fixed.scale(), limit: fixed.limit() }
            }
            Arithmetic::Fast(single) => {
                let limit = single.limit() * slots.max(1) as f32;
                match single.narrows() {
                    false => DeviceSums::Fast { limit },
                    true => DeviceSums::Narrow { limit },
                }
            }
        }
    }

    pub(super) fn cut(cut: Cut, memory: Option<Self>) -> Self {
        let mut memory = memory.map(Self::into_buckets).unwrap_or_default().into_iter();
        let bucket = |number| Bucket::zeroed(cut, number, memory.next());
        Self { buckets: (0..cut.buckets).map(bucket).collect() }
    }

    /// The buckets by number: from the last elements of the gradient to the first.
    #[must_use]
    pub fn into_buckets(self) -> Vec<Bucket> {
        self.buckets
    }

    /// All buckets, as they are given to an all-reduce.
    pub(crate) fn all_ready(self) -> mpsc::UnboundedReceiver<Bucket> {
        let (sender, ready) = mpsc::unbounded_channel();
        // Cannot fail: the receiver is here.
        self.buckets.into_iter().for_each(|bucket| drop(sender.send(bucket.complete())));
        ready
    }

    /// Of the buckets that have been sent so far; none when they are not all of a step.
    pub(crate) fn from_ready(mut ready: mpsc::UnboundedReceiver<Bucket>) -> Option<Self> {
        Self::from_buckets(std::iter::from_fn(|| ready.try_recv().ok()).collect())
    }

    /// Of all buckets of a step, in any order; none when they are not that.
    #[must_use]
    pub fn from_buckets(mut buckets: Vec<Bucket>) -> Option<Self> {
        buckets.sort_unstable_by_key(Bucket::number);
        let cut = buckets.first()?.cut;
        let belongs =
            |(number, bucket): (usize, &Bucket)| bucket.cut == cut && bucket.number() == number;
        let complete = buckets.len() == cut.buckets && buckets.iter().enumerate().all(belongs);
        complete.then_some(Self { buckets })
    }

    /// Elements of the gradient, and number of integers.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.last().cut.elements, self.integers().len())
    }

    /// Bytes that travel.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.buckets.iter().map(Bucket::bytes).sum()
    }

    /// Adds a slot's gradient.
    ///
    /// # Errors
    /// Names the first value that has no place in the sum; the gradient then has no meaning.
    ///
    /// # Panics
    /// When the gradient has another number of elements.
    pub fn add(&mut self, gradient: &[f32]) -> Result<(), OutOfRange> {
        self.buckets.iter_mut().rev().try_for_each(|bucket| bucket.add(gradient))
    }

    /// The gradient, divided by `divisor`.
    ///
    /// # Panics
    /// When `out` has another number of elements.
    pub fn mean(&self, divisor: f64, out: &mut [f32]) {
        self.parts(out).into_iter().for_each(|(bucket, part)| bucket.mean(divisor, part));
    }

    /// As [`Sums::mean`], and the digest of the sums, which is the same on all ranks once they are
    /// reduced; by the threads of the calling pool.
    ///
    /// # Panics
    /// When `out` has another number of elements.
    pub fn settle(&self, divisor: f64, out: &mut [f32]) -> Digest {
        let parts = self.parts(out).into_par_iter();
        let digests: Vec<_> = parts.map(|(bucket, part)| bucket.settle(divisor, part)).collect();
        Digest::of(digests.as_flattened())
    }

    /// Each bucket, from the first elements to the last, with its part of `out`.
    fn parts<'a>(&'a self, mut out: &'a mut [f32]) -> Vec<(&'a Bucket, &'a mut [f32])> {
        assert_eq!(out.len(), self.shape().0, "a sum has one element per value");
        let mut parts = Vec::with_capacity(self.buckets.len());
        for bucket in self.buckets.iter().rev() {
            let (part, behind) = out.split_at_mut(bucket.elements().len());
            parts.push((bucket, part));
            out = behind;
        }
        parts
    }

    /// Makes the gradient zero.
    pub fn clear_gradient(&mut self) {
        self.buckets.iter_mut().for_each(Bucket::clear_gradient);
    }

    /// What is summed beside the gradient.
    #[must_use]
    pub fn integers(&self) -> &[i64] {
        self.last().integers()
    }

    /// What is summed beside the gradient.
    #[must_use]
    pub fn integers_mut(&mut self) -> &mut [i64] {
        let last = self.buckets.last_mut();
        last.map(Bucket::integers_mut).expect("a gradient is cut into at least one bucket")
    }

    fn last(&self) -> &Bucket {
        self.buckets.last().expect("a gradient is cut into at least one bucket")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sums(reduction: Reduction, elements: usize, buckets: usize) -> Sums {
        let arithmetic = Arithmetic::new(reduction, 40, 2);
        Sums::cut(Cut::with_buckets(arithmetic, elements, 2, buckets), None)
    }

    #[test]
    fn a_gradient_comes_back_as_its_mean_and_the_integers_stay_beside_it() {
        for reduction in [Reduction::Exact, Reduction::Fast] {
            for (elements, buckets) in [(0, 1), (1, 1), (4, 1), (5, 1), (5, 4), (70_001, 3)] {
                let mut sums = sums(reduction, elements, buckets);
                let values: Vec<f32> = (0..elements).map(|i| (i % 1000) as f32 - 1.5).collect();
                sums.integers_mut().copy_from_slice(&[7, -8]);
                sums.add(&values).unwrap();
                sums.add(&values).unwrap();
                let mut mean = vec![0.0; elements];
                sums.mean(2.0, &mut mean);
                assert_eq!(mean, values);
                mean.fill(f32::NAN);
                let digest = sums.settle(2.0, &mut mean);
                assert_eq!(mean, values);
                assert_eq!((sums.integers(), sums.shape()), (&[7, -8][..], (elements, 2)));
                sums.clear_gradient();
                assert!(elements == 0 || sums.settle(2.0, &mut mean) != digest);
                sums.mean(2.0, &mut mean);
                assert!(mean.iter().all(|value| *value == 0.0) && sums.integers() == [7, -8]);
            }
        }
    }

    #[test]
    fn sums_are_put_together_of_their_buckets_in_any_order_and_of_no_others() {
        let whole = sums(Reduction::Fast, 1001, 4);
        let mut buckets = whole.clone().into_buckets();
        buckets.rotate_left(3);
        assert_eq!(Sums::from_buckets(buckets.clone()), Some(whole));
        let mut twice = buckets.clone();
        twice[0] = twice[1].clone();
        assert_eq!(Sums::from_buckets(twice), None);
        let other = sums(Reduction::Fast, 1003, 4).into_buckets().swap_remove(2);
        let foreign = |bucket: &Bucket| bucket.number() == other.number();
        let mut mixed = buckets.clone();
        mixed.retain(|bucket| !foreign(bucket));
        mixed.push(other.clone());
        assert_eq!(Sums::from_buckets(mixed), None);
        assert_eq!(Sums::from_buckets(buckets.split_off(1)), None);
        assert_eq!(Sums::from_buckets(Vec::new()), None);
    }

    #[test]
    fn the_first_value_out_of_range_is_named_whatever_bucket_it_is_in() {
        let mut gradient = vec![1.0; 1001];
        gradient[1000] = f32::NAN;
        gradient[7] = f32::INFINITY;
        for reduction in [Reduction::Exact, Reduction::Fast] {
            assert_eq!(sums(reduction, 1001, 4).add(&gradient).unwrap_err().index, 7);
        }
    }

    #[test]
    fn every_bit_shows_in_the_digest_and_the_divisor_does_not() {
        let (mut out, whole) = (vec![0.0; 1001], sums(Reduction::Exact, 1001, 4));
        let digest = whole.settle(1.0, &mut out);
        assert_eq!(whole.settle(3.0, &mut out), digest);
        for number in 0..4 {
            let mut buckets = whole.clone().into_buckets();
            buckets[number].words_mut().0[0] ^= 1;
            let changed = Sums::from_buckets(buckets).unwrap();
            assert_ne!(changed.settle(1.0, &mut out), digest);
        }
        let mut counted = whole;
        counted.integers_mut()[1] = 1;
        assert_ne!(counted.settle(1.0, &mut out), digest);
    }

    #[test]
    fn used_memory_leaves_nothing_behind() {
        let exact = Arithmetic::new(Reduction::Exact, 40, 2);
        let fast = Arithmetic::new(Reduction::Fast, 40, 2);
        let mut used = Sums::zeroed(fast, 9, 1, None);
        used.add(&[1.0; 9]).unwrap();
        used.integers_mut()[0] = 3;
        let again = Sums::zeroed(exact, 4, 2, Some(used));
        assert_eq!(again, Sums::zeroed(exact, 4, 2, None));
    }

    #[test]
    fn fast_sums_take_half_the_bytes() {
        let bytes = |reduction| {
            let arithmetic = Arithmetic::new(reduction, 40, 2);
            Sums::zeroed(arithmetic, 1000, 0, None).bytes()
        };
        assert_eq!((bytes(Reduction::Exact), bytes(Reduction::Fast)), (8000, 4000));
        let bf16 = Arithmetic::new(Reduction::FastBf16, 40, 2);
        let buckets = Sums::zeroed(bf16, 1000, 0, None).into_buckets();
        assert_eq!(
            buckets.into_iter().map(|bucket| bucket.complete().bytes()).sum::<usize>(),
            2000
        );
    }
}
