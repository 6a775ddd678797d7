//! What the model needs of a GPU: memory, copies, kernels and matrix products, in the order of one
//! queue.
//!
//! [`Device`](super::device::Device) is the real one. The tests have one more, which runs the same
//! kernels on the CPU.

use std::ops::Range;
use std::time::Duration;

/// An address in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) u64);

impl Address {
    /// No memory: what a kernel takes for "not wanted".
    pub(super) const NONE: Self = Self(0);

    /// So many bytes further.
    pub(super) fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Why the device cannot do something; the words name the device and, where there is one, the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Argument {
    Address(u64),
    Int(i32),
    Count(u64),
    Float(f32),
    Double(f64),
}

impl Argument {
    /// As the first bytes of a word.
    pub(super) fn word(&self) -> u64 {
        match *self {
            Self::Address(value) | Self::Count(value) => value,
            Self::Int(value) => u64::from(value as u32),
            Self::Float(value) => u64::from(value.to_bits()),
            Self::Double(value) => value.to_bits(),
        }
    }
}

impl From<Address> for Argument {
    fn from(address: Address) -> Self {
        Self::Address(address.0)
    }
}

impl From<usize> for Argument {
    /// A size, which the kernels take as a 32-bit integer.
    ///
    /// # Panics
    /// If it is too large for that.
    fn from(size: usize) -> Self {
        Self::Int(i32::try_from(size).expect("a size that kernels take fits in 31 bits"))
    }
}

impl From<u64> for Argument {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl From<f64> for Argument {
    fn from(value: f64) -> Self {
        Self::Double(value)
    }
}

/// A kernel and how it is cut into blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub(super) kernel: &'static str,
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) threads: u32,
}

/// Which product of a linear layer with weight `[outputs, inputs]`, over rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ProductKind {
    /// `y [rows, outputs] = x [rows, inputs] w^T`: left x, right w.
    Forward,
    /// `dx [rows, inputs] = dy [rows, outputs] w`: left dy, right w.
    Input,
    /// `dw [outputs, inputs] += dy^T x`: left dy, right x.
    Weight,
}

/// A product of two bf16 matrices, without gaps between their rows, summed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) kind: ProductKind,
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Whether the result is f32 rather than bf16; that of [`ProductKind::Weight`] is.
    pub(super) single: bool,
}

/// A moment in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark(pub(super) usize);

/// A device with one queue. Whatever is queued runs after what was queued before it; errors of the
/// device may come up at any later call.
pub(super) trait Driver: Send + Sync {
    /// Memory with anything in it, aligned for every use.
    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError>;

    /// Gives memory back, once all that is queued is done.
    fn free(&self, address: Address);

    /// Queues zeros.
    fn zero(&self, to: Address, bytes: usize) -> Result<(), DeviceError>;

    /// Queues a copy within the device.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError>;

    /// Copies to the device, in the queue; returns when the bytes may change.
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Queues a kernel.
    fn launch(&self, launch: Launch, arguments: &[Argument]) -> Result<(), DeviceError>;

    /// Queues a product.
    fn product(
        &self,
        product: Product,
        left: Address,
        right: Address,
        out: Address,
    ) -> Result<(), DeviceError>;

    /// Whether to take the time of each kernel and product from now on, one after the other, which is
    /// slower.
    fn measure(&self, on: bool);

    /// The times taken since the last call.
    fn take_times(&self) -> Vec<(&'static str, Duration)>;

    /// Names what decides the bits of the arithmetic, beside the kernels' source.
    fn arithmetic(&self) -> String;

    /// Bytes of memory that the device had to give when it was opened, if it tells.
    fn memory(&self) -> Option<u64>;

    /// Most bytes that were allocated at a time.
    fn peak_bytes(&self) -> u64;

    /// The moment when all that is queued up to now is done. The last [`MARKS`] are told apart: a mark older
    /// than that stands for a later moment.
    fn mark(&self) -> Result<Mark, DeviceError>;

    /// Copies from the device once that moment has come, beside whatever else is queued; returns when
    /// the copy is done.
    fn download(&self, after: Mark, from: Address, to: &mut [u8]) -> Result<(), DeviceError>;

    /// Makes the device that of the calling thread, for libraries that ask which it is.
    fn enter(&self) -> Result<(), DeviceError>;

    /// The handle of a second queue, the lane, for what goes on beside the kernels.
    fn lane(&self) -> u64;

    /// What is put in the lane from now on waits for that moment of the queue.
    fn lane_waits(&self, after: Mark) -> Result<(), DeviceError>;

    /// Whether all that was put in the lane is done.
    fn lane_is_idle(&self) -> Result<bool, DeviceError>;

    /// Puts words into the lane; they need not stay.
    fn lane_write(&self, to: Address, words: &[u32]) -> Result<(), DeviceError>;

    /// Copies from the device, behind what is in the lane; returns when the copy is done.
    fn lane_read(&self, from: Address, to: &mut [u8]) -> Result<(), DeviceError>;
}

/// Marks that a driver tells apart.
pub(super) const MARKS: usize = 1024;

/// Where parts of one allocation begin, each aligned for every use.
#[derive(Debug, Default)]
pub(super) struct Parts {
    bytes: usize,
}

impl Parts {
    /// The place of so many bytes more.
    pub(super) fn place(&mut self, bytes: usize) -> Range<usize> {
        let from = self.bytes.next_multiple_of(256);
        self.bytes = from + bytes;
        from..self.bytes
    }

    /// Bytes of all of them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
