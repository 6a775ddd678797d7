//! The buffer that is reduced: a gradient, and integers beside it, in one array of 64-bit words.
//!
//! An exact gradient has one fixed-point integer a word, a fast one two floats a word. The integers
//! come last, and are integers whatever the gradient is, so counts and statistics are always exact.
//! One all-reduce carries all of it.

use looptrain_proto::spec::Reduction;

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
        }
    }

    fn words(self, elements: usize) -> usize {
        match self {
            Self::Exact(_) => elements,
            Self::Fast(_) => elements.div_ceil(2),
        }
    }
}

/// The sums of a step: first of one rank's slots, once reduced of all.
#[derive(Clone, Debug, PartialEq)]
pub struct Sums {
    arithmetic: Arithmetic,
    /// Elements of the gradient.
    elements: usize,
    words: Vec<i64>,
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
        let mut words = memory.map(|sums| sums.words).unwrap_or_default();
        words.clear();
        words.resize(arithmetic.words(elements) + integers, 0);
        Self { arithmetic, elements, words }
    }

    /// Elements of the gradient, and number of integers.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.elements, self.integers().len())
    }

    /// All of it, as it travels and is hashed: the same bytes on all ranks once it is reduced.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    /// Adds a slot's gradient.
    ///
    /// # Errors
    /// Names the first value that has no place in the sum; the gradient then has no meaning.
    ///
    /// # Panics
    /// When the gradient has another number of elements.
    pub fn add(&mut self, gradient: &[f32]) -> Result<(), OutOfRange> {
        let (words, elements) = (self.gradient_words(), self.elements);
        let sums = &mut self.words[..words];
        match self.arithmetic {
            Arithmetic::Exact(fixed) => fixed.encode_add(sums, gradient),
            Arithmetic::Fast(single) => {
                single.add(&mut bytemuck::cast_slice_mut(sums)[..elements], gradient)
            }
        }
    }

    /// The gradient, divided by `divisor`.
    ///
    /// # Panics
    /// When `out` has another number of elements.
    pub fn mean(&self, divisor: f64, out: &mut [f32]) {
        let sums = &self.words[..self.gradient_words()];
        match self.arithmetic {
            Arithmetic::Exact(fixed) => fixed.decode(sums, divisor, out),
            Arithmetic::Fast(single) => {
                single.divide(&bytemuck::cast_slice(sums)[..self.elements], divisor, out);
            }
        }
    }

    /// Makes the gradient zero.
    pub fn clear_gradient(&mut self) {
        let words = self.gradient_words();
        self.words[..words].fill(0);
    }

    /// What is summed beside the gradient.
    #[must_use]
    pub fn integers(&self) -> &[i64] {
        &self.words[self.gradient_words()..]
    }

    /// What is summed beside the gradient.
    #[must_use]
    pub fn integers_mut(&mut self) -> &mut [i64] {
        let words = self.gradient_words();
        &mut self.words[words..]
    }

    fn gradient_words(&self) -> usize {
        self.arithmetic.words(self.elements)
    }

    /// All words, and how many of them, at the front, are pairs of floats.
    pub(super) fn words_mut(&mut self) -> (&mut [i64], usize) {
        let pairs = match self.arithmetic {
            Arithmetic::Exact(_) => 0,
            Arithmetic::Fast(_) => self.gradient_words(),
        };
        (&mut self.words, pairs)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_gradient_comes_back_as_its_mean_and_the_integers_stay_beside_it() {
        for reduction in [Reduction::Exact, Reduction::Fast] {
            for elements in [0, 1, 4, 5] {
                let arithmetic = Arithmetic::new(reduction, 40, 2);
                let mut sums = Sums::zeroed(arithmetic, elements, 2, None);
                let values: Vec<f32> = (0..elements).map(|i| i as f32 - 1.5).collect();
                sums.integers_mut().copy_from_slice(&[7, -8]);
                sums.add(&values).unwrap();
                sums.add(&values).unwrap();
                let mut mean = vec![0.0; elements];
                sums.mean(2.0, &mut mean);
                assert_eq!(mean, values);
                assert_eq!((sums.integers(), sums.shape()), (&[7, -8][..], (elements, 2)));
                sums.clear_gradient();
                sums.mean(2.0, &mut mean);
                assert!(mean.iter().all(|value| *value == 0.0) && sums.integers() == [7, -8]);
            }
        }
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
            Sums::zeroed(arithmetic, 1000, 0, None).as_bytes().len()
        };
        assert_eq!((bytes(Reduction::Exact), bytes(Reduction::Fast)), (8000, 4000));
    }
}
