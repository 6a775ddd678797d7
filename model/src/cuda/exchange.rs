//! The sums of a step in a device's memory, as a collective reaches them: beside the kernels' queue the
//! device has a lane, in which sums wait for the moment when they are final and go over to other devices,
//! while the kernels go on.

use std::fmt;
use std::sync::Arc;

use super::driver::{Address, DeviceError, Driver, Mark};
use super::memory::Memory;

/// What the numbers of a span are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceNumbers {
    /// 64-bit integers.
    Integers,
    /// f32.
    Floats,
    /// bf16.
    Bf16,
}

impl DeviceNumbers {
    /// Bytes of a number.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Integers => size_of::<i64>(),
            Self::Floats => size_of::<f32>(),
            Self::Bf16 => size_of::<u16>(),
        }
    }
}

/// Some of the numbers of a step, in the memory of the device that computes them, final from a moment of its
/// queue on.
#[derive(Clone, Debug)]
pub struct DeviceSpan {
    pub(super) at: Address,
    pub(super) len: usize,
    pub(super) numbers: DeviceNumbers,
    pub(super) after: Mark,
}

impl DeviceSpan {
    /// Where they begin.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.at.0
    }

    /// How many numbers there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What they are.
    #[must_use]
    pub fn numbers(&self) -> DeviceNumbers {
        self.numbers
    }
}

/// The lane of a device, and some words of its memory for what a collective has to say beside the sums.
pub struct Exchange {
    driver: Arc<dyn Driver>,
    words: Memory,
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").finish_non_exhaustive()
    }
}

impl Exchange {
    /// With so many 32-bit words.
    pub(super) fn new(driver: &Arc<dyn Driver>, words: usize) -> Result<Self, DeviceError> {
        let words = Memory::new(driver, words * size_of::<u32>())?;
        Ok(Self { driver: Arc::clone(driver), words })
    }

    /// Makes the device that of the calling thread, for libraries that ask which it is.
    ///
    /// # Errors
    /// When the device fails, as in all that follows.
    pub fn enter(&self) -> Result<(), DeviceError> {
        self.driver.enter()
    }

    /// The driver's handle of the lane.
    #[must_use]
    pub fn queue(&self) -> u64 {
        self.driver.lane()
    }

    /// What is put in the lane from now on waits until the numbers are final.
    ///
    /// # Errors
    /// See [`Exchange::enter`].
    pub fn wait_for(&self, span: &DeviceSpan) -> Result<(), DeviceError> {
        self.driver.lane_waits(span.after)
    }

    /// Whether all that was put in the lane is done.
    ///
    /// # Errors
    /// See [`Exchange::enter`].
    pub fn is_idle(&self) -> Result<bool, DeviceError> {
        self.driver.lane_is_idle()
    }

    /// Where the words from that one on are.
    #[must_use]
    pub fn address(&self, word: usize) -> u64 {
        self.words.base.plus(word * size_of::<u32>()).0
    }

    /// Puts into the lane that the words from that one on become these.
    ///
    /// # Errors
    /// See [`Exchange::enter`].
    pub fn write(&self, word: usize, words: &[u32]) -> Result<(), DeviceError> {
        self.driver.lane_write(Address(self.address(word)), words)
    }

    /// Reads the words from that one on; for when the lane is idle.
    ///
    /// # Errors
    /// See [`Exchange::enter`].
    pub fn read(&self, word: usize, words: &mut [u32]) -> Result<(), DeviceError> {
        self.driver.lane_read(Address(self.address(word)), bytemuck::cast_slice_mut(words))
    }

    /// Reads the integers of a span; for when the lane is idle.
    ///
    /// # Errors
    /// See [`Exchange::enter`].
    ///
    /// # Panics
    /// If the span has another number of them.
    pub fn read_integers(&self, span: &DeviceSpan, to: &mut [i64]) -> Result<(), DeviceError> {
        let integers = DeviceNumbers::Integers;
        assert_eq!((span.numbers, span.len), (integers, to.len()), "a span of integers");
        self.driver.lane_read(span.at, bytemuck::cast_slice_mut(to))
    }
}

/// The memory of an emulated device, for tests of collectives without a model.
#[cfg(any(test, feature = "emulator"))]
pub struct DeviceMemory {
    driver: Arc<dyn Driver>,
    kept: std::sync::Mutex<Vec<Memory>>,
}

#[cfg(any(test, feature = "emulator"))]
#[allow(clippy::missing_panics_doc, clippy::missing_errors_doc)]
impl DeviceMemory {
    /// A device without kernels.
    #[must_use]
    pub fn emulated() -> Self {
        Self { driver: Arc::new(super::emulator::Emulator::bare()), kept: Default::default() }
    }

    /// Its lane.
    pub fn exchange(&self, words: usize) -> Result<Exchange, DeviceError> {
        Exchange::new(&self.driver, words)
    }

    /// Puts words into its memory, which are so many numbers; in spans from the end to the beginning.
    pub fn put(
        &self,
        words: &[i64],
        (numbers, count): (DeviceNumbers, usize),
        spans: usize,
    ) -> Vec<DeviceSpan> {
        let memory = Memory::new(&self.driver, size_of_val(words)).expect("memory");
        self.driver.upload(memory.base, bytemuck::cast_slice(words)).expect("an upload");
        let after = self.driver.mark().expect("a mark");
        let bytes = numbers.bytes();
        let edge = |span: usize| count * (spans - span) / spans / 4 * 4;
        let edge = |span: usize| if span == 0 { count } else { edge(span) };
        let base = memory.base;
        self.kept.lock().expect("no test panics here").push(memory);
        let span = |span: usize| {
            let (from, until) = (edge(span + 1), edge(span));
            DeviceSpan { at: base.plus(from * bytes), len: until - from, numbers, after }
        };
        (0..spans).map(span).collect()
    }

    /// The words of a span.
    pub fn words(&self, span: &DeviceSpan) -> Vec<i64> {
        let bytes = span.len * span.numbers.bytes();
        let mut words = vec![0i64; bytes.div_ceil(size_of::<i64>())];
        let to = &mut bytemuck::cast_slice_mut(&mut words)[..bytes];
        self.driver.lane_read(span.at, to).expect("a copy");
        words
    }
}
