//! A part of the sums of a step that travels by itself.
//!
//! A backward pass finishes the last elements of the flat gradient first, so bucket 0 holds those, and
//! the last bucket the first elements. The integers, which are known when all slots are added,
//! travel in the last one, too.

use std::ops::Range;

use looptrain_model::DeviceSpan;

use super::fast;
use super::range::OutOfRange;
use super::sums::Arithmetic;

/// What a bucket should not be smaller than: a connection carries it in some milliseconds, against
/// which the way around the ring, which every bucket takes by itself, is nothing.
const BUCKET_BYTES: usize = 4 << 20;

/// With so many the last one, which nothing is left to hide behind, is a small part of the whole.
const MAX_BUCKETS: usize = 16;

/// Words that are hashed and divided while they are in a near cache: 64 KiB.
const CHUNK: usize = 1 << 13;

/// How the sums of a step are cut into buckets: a function of their shape alone, so that all ranks
/// agree.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cut {
    arithmetic: Arithmetic,
    /// Elements of the whole gradient.
    pub(super) elements: usize,
    integers: usize,
    pub(super) buckets: usize,
    /// The gradient's words are not here, but on the device that computes.
    pub(super) elsewhere: bool,
}

impl Cut {
    pub(super) fn new(arithmetic: Arithmetic, elements: usize, integers: usize) -> Self {
        let words = arithmetic.words(elements);
        let bytes = size_of::<i64>() * if arithmetic.narrows() { words.div_ceil(2) } else { words };
        Self::with_buckets(
            arithmetic,
            elements,
            integers,
            (bytes / BUCKET_BYTES).clamp(1, MAX_BUCKETS),
        )
    }

    /// Of a gradient that is summed on a device, where its words stay; the integers are here.
    pub(super) fn elsewhere(
        arithmetic: Arithmetic,
        elements: usize,
        integers: usize,
        buckets: usize,
    ) -> Self {
        Self { elsewhere: true, ..Self::with_buckets(arithmetic, elements, integers, buckets) }
    }

    /// Into so many buckets, at least one.
    pub(super) fn with_buckets(
        arithmetic: Arithmetic,
        elements: usize,
        integers: usize,
        buckets: usize,
    ) -> Self {
        Self { arithmetic, elements, integers, buckets, elsewhere: false }
    }

    /// Words of the flat gradient that are in a bucket.
    fn words(&self, number: usize) -> Range<usize> {
        let here = if self.elsewhere { 0 } else { self.elements };
        let words = self.arithmetic.words(here);
        let edge = |behind: usize| words * (self.buckets - behind) / self.buckets;
        edge(number + 1)..edge(number)
    }

    /// The integers that are in a bucket.
    fn integers(&self, number: usize) -> usize {
        if number + 1 == self.buckets { self.integers } else { 0 }
    }
}

/// What the words of a gradient are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    /// One integer each.
    Integers,
    /// Two f32.
    Floats,
    /// Four bf16.
    Bf16,
}

/// The sums of a range of the flat gradient; the last bucket has the integers beside it.
#[derive(Clone, Debug)]
pub struct Bucket {
    pub(super) cut: Cut,
    number: usize,
    /// Those of the gradient, now.
    numbers: Numbers,
    /// Those of the gradient, then the integers.
    words: Vec<i64>,
    /// Where a device has them: those of the gradient, and in the last bucket the integers.
    spans: Vec<DeviceSpan>,
}

impl PartialEq for Bucket {
    fn eq(&self, other: &Self) -> bool {
        (self.cut, self.number, self.numbers, &self.words)
            == (other.cut, other.number, other.numbers, &other.words)
    }
}

impl Bucket {
    /// All zero, in memory that is of no use any more.
    pub(super) fn zeroed(cut: Cut, number: usize, memory: Option<Self>) -> Self {
        let mut words = memory.map(|bucket| bucket.words).unwrap_or_default();
        words.clear();
        words.resize(cut.words(number).len() + cut.integers(number), 0);
        let numbers = match cut.arithmetic {
            Arithmetic::Exact(_) => Numbers::Integers,
            Arithmetic::Fast(_) => Numbers::Floats,
        };
        Self { cut, number, numbers, words, spans: Vec::new() }
    }

    /// The same with all slots of the rank in it, as it leaves the rank.
    #[must_use]
    pub fn complete(mut self) -> Self {
        if self.cut.arithmetic.narrows() && self.numbers == Numbers::Floats && !self.cut.elsewhere {
            let floats = self.gradient_words();
            fast::narrow(&mut self.words[..floats]);
            self.numbers = Numbers::Bf16;
            let narrow = self.gradient_words();
            self.words.drain(narrow..floats);
        }
        self
    }

    /// The same, whose numbers a device has.
    #[must_use]
    pub fn on_device(self, spans: Vec<DeviceSpan>) -> Self {
        Self { spans, ..self }
    }

    /// Where a device has its numbers: those of the gradient, and in the last bucket the integers.
    #[must_use]
    pub fn spans(&self) -> &[DeviceSpan] {
        &self.spans
    }

    /// Elements of the whole gradient, buckets, and integers of a step, and what the gradient is made of, as a
    /// number.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the ring compares words"))]
    pub(super) fn shape(&self) -> (usize, usize, usize, u32) {
        let Cut { arithmetic, elements, integers, buckets, .. } = self.cut;
        let kind = match arithmetic {
            Arithmetic::Exact(_) => 0,
            Arithmetic::Fast(_) if arithmetic.narrows() => 2,
            Arithmetic::Fast(_) => 1,
        };
        (elements, buckets, integers, kind)
    }

    /// Its place in the order in which backward finishes them, from 0.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// Its elements of the flat gradient.
    #[must_use]
    pub fn elements(&self) -> Range<usize> {
        let words = self.cut.words(self.number);
        let element = |word: usize| (word * self.cut.arithmetic.per_word()).min(self.cut.elements);
        element(words.start)..element(words.end)
    }

    /// Adds its elements of a slot's whole gradient.
    ///
    /// # Errors
    /// Names the first value, by its index in the whole gradient, that has no place in the sum; the
    /// bucket then has no meaning.
    ///
    /// # Panics
    /// When the gradient has another number of elements, and when the bucket is complete.
    pub fn add(&mut self, gradient: &[f32]) -> Result<(), OutOfRange> {
        assert_eq!(gradient.len(), self.cut.elements, "a sum has one element per value");
        assert!(self.numbers != Numbers::Bf16, "nothing is added to what has left the rank");
        let (elements, words) = (self.elements(), self.gradient_words());
        let start = elements.start;
        let added = self.cut.arithmetic.add(&mut self.words[..words], &gradient[elements]);
        added.map_err(|OutOfRange { index, value }| OutOfRange { index: start + index, value })
    }

    /// What is summed beside the gradient; nothing but for the last bucket.
    #[must_use]
    pub fn integers_mut(&mut self) -> &mut [i64] {
        let words = self.gradient_words();
        &mut self.words[words..]
    }

    pub(super) fn integers(&self) -> &[i64] {
        &self.words[self.gradient_words()..]
    }

    pub(super) fn clear_gradient(&mut self) {
        let words = self.gradient_words();
        self.words[..words].fill(0);
    }

    /// Its elements of the gradient, divided by `divisor`.
    pub(super) fn mean(&self, divisor: f64, out: &mut [f32]) {
        self.mean_of(&self.words[..self.gradient_words()], divisor, out);
    }

    /// The means that some of its words make.
    fn mean_of(&self, words: &[i64], divisor: f64, out: &mut [f32]) {
        match self.numbers {
            Numbers::Bf16 => fast::divide_bf16(words, divisor, out),
            Numbers::Integers | Numbers::Floats => self.cut.arithmetic.mean(words, divisor, out),
        }
    }

    /// Elements in a word, now.
    fn per_word(&self) -> usize {
        match self.numbers {
            Numbers::Bf16 => 2 * self.cut.arithmetic.per_word(),
            Numbers::Integers | Numbers::Floats => self.cut.arithmetic.per_word(),
        }
    }

    /// As [`Bucket::mean`], and the digest of all its words, in one pass over them.
    pub(super) fn settle(&self, divisor: f64, out: &mut [f32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let (gradient, integers) = self.words.split_at(self.gradient_words());
        let outs = out.chunks_mut(CHUNK * self.per_word());
        for (words, out) in gradient.chunks(CHUNK).zip(outs) {
            hasher.update(bytemuck::cast_slice(words));
            self.mean_of(words, divisor, out);
        }
        hasher.update(bytemuck::cast_slice(integers));
        *hasher.finalize().as_bytes()
    }

    /// Whether no other bucket of its step comes after it in a stream that takes every
    /// `streams`-th.
    pub(super) fn is_last_of(&self, streams: usize) -> bool {
        self.number + streams >= self.cut.buckets
    }

    /// Bytes that travel, once it is complete.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.words.as_slice())
    }

    /// All words, and what those at the front are, of the gradient, of which there are so many.
    ///
    /// # Panics
    /// When the bucket should be complete, and is not.
    pub(super) fn words_mut(&mut self) -> (&mut [i64], (Numbers, usize)) {
        let complete = !self.cut.arithmetic.narrows() || self.numbers == Numbers::Bf16;
        assert!(complete, "what travels is complete");
        let front = (self.numbers, self.gradient_words());
        (&mut self.words, front)
    }

    fn gradient_words(&self) -> usize {
        let words = self.cut.words(self.number).len();
        match self.numbers {
            Numbers::Integers | Numbers::Floats => words,
            Numbers::Bf16 => words.div_ceil(2),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::spec::Reduction;

    use super::*;

    #[test]
    fn buckets_are_of_a_few_mebibytes_and_not_many() {
        let exact = Arithmetic::new(Reduction::Exact, 40, 1);
        let fast = Arithmetic::new(Reduction::Fast, 40, 1);
        let buckets = |arithmetic, elements| Cut::new(arithmetic, elements, 3).buckets;
        assert_eq!([0, 1, 1 << 20, 3 << 19].map(|elements| buckets(exact, elements)), [1, 1, 2, 3]);
        assert_eq!([1 << 20, 3 << 20].map(|elements| buckets(fast, elements)), [1, 3]);
        let bf16 = Arithmetic::new(Reduction::FastBf16, 40, 1);
        assert_eq!([2 << 20, 6 << 20].map(|elements| buckets(bf16, elements)), [1, 3]);
        assert_eq!(buckets(exact, 1 << 30), 16);
    }

    #[test]
    fn buckets_share_out_the_gradient_from_its_end() {
        for reduction in [Reduction::Exact, Reduction::Fast] {
            for (elements, buckets) in [(0, 1), (1, 4), (7, 3), (40, 16), (41, 16), (1001, 5)] {
                let arithmetic = Arithmetic::new(reduction, 40, 1);
                let cut = Cut::with_buckets(arithmetic, elements, 2, buckets);
                let mut end = elements;
                for number in 0..buckets {
                    let mut bucket = Bucket::zeroed(cut, number, None);
                    assert_eq!(bucket.elements().end, end);
                    end = bucket.elements().start;
                    assert_eq!(
                        bucket.integers_mut().len(),
                        if number + 1 == buckets { 2 } else { 0 }
                    );
                    // Only the top end of the gradient may leave half a word empty.
                    let words = bucket.elements().len().div_ceil(arithmetic.per_word());
                    assert_eq!(words, bucket.gradient_words());
                    assert!(
                        number == 0
                            || bucket.elements().len().is_multiple_of(arithmetic.per_word())
                    );
                }
                assert_eq!(end, 0);
            }
        }
    }

    #[test]
    fn a_complete_bucket_has_its_means_and_integers_in_bf16_and_no_more_words_than_those() {
        let arithmetic = Arithmetic::new(Reduction::FastBf16, 40, 1);
        for (elements, buckets) in [(0, 1), (1, 1), (2, 1), (7, 1), (41, 3), (50_001, 2)] {
            let cut = Cut::with_buckets(arithmetic, elements, 2, buckets);
            let gradient: Vec<f32> = (0..elements).map(|i| (i % 101) as f32 - 50.5).collect();
            for number in 0..buckets {
                let mut bucket = Bucket::zeroed(cut, number, None);
                bucket.add(&gradient).unwrap();
                let last = number + 1 == buckets;
                let integers: &[i64] = if last { &[-1, 1 << 60] } else { &[] };
                bucket.integers_mut().copy_from_slice(integers);
                let mut bucket = bucket.complete();
                let range = bucket.elements();
                let words = range.len().div_ceil(4) + integers.len();
                assert_eq!(bucket.bytes(), 8 * words, "{elements} {number}");
                assert_eq!(bucket.integers(), integers);
                let mut mean = vec![f32::NAN; range.len()];
                bucket.mean(1.0, &mut mean);
                assert_eq!(mean, gradient[range.clone()]);
                mean.fill(f32::NAN);
                let digest = bucket.settle(1.0, &mut mean);
                assert_eq!(mean, gradient[range]);
                assert!(bucket.clone().complete() == bucket, "once is enough");
                bucket.clear_gradient();
                assert!(mean.is_empty() || bucket.settle(1.0, &mut mean) != digest);
                assert!(mean.iter().all(|mean| *mean == 0.0));
                let again = Bucket::zeroed(cut, number, Some(bucket));
                assert!(again == Bucket::zeroed(cut, number, None));
            }
        }
    }

    #[test]
    fn a_value_out_of_range_is_named_by_its_index_in_the_whole_gradient() {
        for reduction in [Reduction::Exact, Reduction::Fast] {
            let cut = Cut::with_buckets(Arithmetic::new(reduction, 40, 1), 100, 0, 4);
            let mut gradient = vec![1.0; 100];
            gradient[60] = f32::NAN;
            let added = |number| Bucket::zeroed(cut, number, None).add(&gradient);
            assert_eq!(added(1).unwrap_err().index, 60);
            assert!([0, 2, 3].into_iter().all(|number| added(number).is_ok()));
        }
    }
}
