//! The training state on a device, and what is done with it.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use looptrain_proto::spec::{self, Objective};

use super::driver::{Address, Argument, DeviceError, Driver, Launch, Mark, Product, ProductKind};
use super::exchange::{DeviceNumbers, DeviceSpan, Exchange};
use super::kernels::{MOST_LOOPS, Sizes};
use super::memory::{ALIGNED, Memory, Places, Purpose, SlotSizes, Workspace};
use super::slot::{Buffers, Final, Task};
use crate::optimizer::StepSize;
use crate::{
    Gpu, Layout, Recompute, SlotBatch, SlotStatistics, StageSettings, TensorEntry, TrainState,
};

/// Blocks of kernels over flat buffers: enough for any device to be busy, and as many for every device, for the
/// sums' sake.
const MOST_FLAT_BLOCKS: usize = 1024;
const FLAT_THREADS: u32 = 256;

/// Integers that there is room for beside the sums: a few a loop.
const MOST_INTEGERS: usize = 1024;

/// The note of the first element without a place in the sums: there is none.
const NO_FAULT: u64 = u64::MAX;

/// How slots are summed on a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DeviceSums {
    /// As integers, multiples of 1 / `scale`.
    Exact {
        /// A power of two.
        scale: f64,
        /// The largest magnitude that has a place.
        limit: f32,
    },
    /// As f32, in the order of the slots.
    Fast {
        /// The largest magnitude that a sum may have.
        limit: f32,
    },
    /// The same, rounded to bf16 when all slots are in it.
    Narrow {
        /// The largest magnitude that a sum may have.
        limit: f32,
    },
}

/// Weights, moments and gradient in the memory of one device.
pub(crate) struct CudaEngine {
    driver: Arc<dyn Driver>,
    model: spec::Model,
    sizes: Sizes,
    layout: Layout,
    places: Places,
    weights: Memory,
    first_moment: Memory,
    second_moment: Memory,
    narrow: Memory,
    gradient: Memory,
    squares: Memory,
    /// The sums of slots in fixed point.
    fixed_sums: OnceLock<Memory>,
    /// The sums of slots as bf16.
    narrow_sums: OnceLock<Memory>,
    /// What is summed beside them, while other ranks' are added.
    beside: OnceLock<Memory>,
    /// Two words: the first value without a place in the sums, or their digest.
    notes: Memory,
    /// Memory of the last slot, for the next one.
    workspace: Mutex<Option<Workspace>>,
}

impl CudaEngine {
    /// Room for a model on a device whose kernels are compiled for it.
    pub(super) fn new(
        driver: Arc<dyn Driver>,
        model: &spec::Model,
        sizes: Sizes,
    ) -> Result<Self, DeviceError> {
        let layout = Layout::new(model);
        let places = Places::new(&layout, model.num_hidden_layers);
        if u32::try_from(places.len).is_err() {
            let error = format!("{} parameters: a GPU takes up to 2^32", layout.parameters());
            return Err(DeviceError(error));
        }
        let floats = |len: usize| {
            let memory = Memory::new(&driver, len * size_of::<f32>())?;
            driver.zero(memory.base, len * size_of::<f32>())?;
            Ok(memory)
        };
        Ok(Self {
            weights: floats(places.len)?,
            first_moment: floats(places.len)?,
            second_moment: floats(places.len)?,
            gradient: floats(places.len)?,
            narrow: Memory::new(&driver, places.len * size_of::<u16>())?,
            squares: Memory::new(&driver, MOST_FLAT_BLOCKS * size_of::<f64>())?,
            fixed_sums: OnceLock::new(),
            narrow_sums: OnceLock::new(),
            beside: OnceLock::new(),
            notes: Memory::new(&driver, 2 * size_of::<u64>())?,
            driver,
            model: model.clone(),
            sizes,
            layout,
            places,
            workspace: Mutex::default(),
        })
    }

    /// On a GPU.
    ///
    /// # Errors
    /// As [`Device::new`], and when the model has sizes that the kernels do not take or does not fit.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(gpu: Gpu, model: &spec::Model) -> Result<Self, DeviceError> {
        let sizes = Sizes::of(model)?;
        Self::new(Arc::new(super::device::Device::new(gpu, &sizes)?), model, sizes)
    }

    /// There are none.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "cuda"))]
    pub(crate) fn on_device(gpu: Gpu, _model: &spec::Model) -> Result<Self, DeviceError> {
        Err(DeviceError(format!(
            "cuda:{gpu}: this program was built without GPUs; build it with --features cuda"
        )))
    }

    /// On the CPU, by the kernels' emulator.
    #[cfg(any(test, feature = "emulator"))]
    pub(crate) fn emulated(model: &spec::Model) -> Result<Self, DeviceError> {
        let sizes = Sizes::of(model)?;
        Self::new(Arc::new(super::emulator::Emulator::new(&sizes)), model, sizes)
    }

    /// Bytes held for each parameter: weights and two moments and the gradient in f32, and the weights
    /// in bf16.
    pub(crate) const BYTES_PER_PARAMETER: u64 = 4 * 4 + 2;

    /// See [`Driver::measure`].
    pub(crate) fn measure(&self, on: bool) {
        self.driver.measure(on);
    }

    /// See [`Driver::take_times`].
    pub(crate) fn take_times(&self) -> Vec<(&'static str, Duration)> {
        self.driver.take_times()
    }

    /// What decides the bits, beside the kernels' source.
    pub(crate) fn arithmetic(&self) -> String {
        self.driver.arithmetic()
    }

    /// Bytes of memory that the device had for the state and the slots, if it tells.
    pub(crate) fn memory(&self) -> Option<u64> {
        self.driver.memory()
    }

    /// Bytes of a slot under way.
    pub(crate) fn slot_bytes(
        &self,
        settings: &StageSettings,
        [sequences, length]: [usize; 2],
        recompute: Recompute,
    ) -> u64 {
        let (loops, layers) = (settings.loops, self.model.num_hidden_layers);
        let purpose = Purpose::Gradient(settings.objective);
        let slot = SlotSizes { sequences, length, loops, layers, recompute, purpose };
        Workspace::bytes(slot, &self.sizes) as u64
    }

    /// Bytes of a slot under way of any device.
    ///
    /// # Errors
    /// When the kernels cannot be made for the model.
    pub(crate) fn slot_bytes_of(
        model: &spec::Model,
        settings: &StageSettings,
        [sequences, length]: [usize; 2],
        recompute: Recompute,
    ) -> Result<u64, DeviceError> {
        let (loops, layers) = (settings.loops, model.num_hidden_layers);
        let purpose = Purpose::Gradient(settings.objective);
        let slot = SlotSizes { sequences, length, loops, layers, recompute, purpose };
        Ok(Workspace::bytes(slot, &Sizes::of(model)?) as u64)
    }

    /// Puts a state on the device.
    pub(crate) fn put(&self, state: &TrainState) -> Result<(), DeviceError> {
        let all = || 0..self.layout.parameters();
        self.upload(&self.weights, all(), &state.weights)?;
        self.upload(&self.first_moment, all(), &state.first_moment)?;
        self.upload(&self.second_moment, all(), &state.second_moment)?;
        self.driver.launch(
            self.flat("as_bf16"),
            &[
                self.weights.base.into(),
                self.narrow.base.into(),
                Argument::Count(self.places.len as u64),
            ],
        )
    }

    /// Fills buffers in layout order with elements of weights and moments.
    pub(crate) fn read(
        &self,
        elements: Range<usize>,
        to: [&mut [f32]; 3],
    ) -> Result<(), DeviceError> {
        let after = self.driver.mark()?;
        let from = [&self.weights, &self.first_moment, &self.second_moment];
        from.into_iter().zip(to).try_for_each(|(from, to)| match to.is_empty() {
            true => Ok(()),
            false => self.download(after, from, elements.clone(), to),
        })
    }

    /// Sets the sum of gradients to zero.
    pub(crate) fn clear(&self, objective: Objective) -> Result<(), DeviceError> {
        let trained = self.places.trained(objective);
        self.driver.zero(self.gradient_at(&trained), trained.len() * size_of::<f32>())
    }

    /// Sets the sums of a step to zero, for a rank without slots.
    pub(crate) fn clear_sums(
        &self,
        sums: DeviceSums,
        objective: Objective,
    ) -> Result<(), DeviceError> {
        let trained = self.places.trained(objective);
        let (at, numbers) = self.sums_at(sums, trained.start)?;
        self.driver.zero(at, trained.len() * numbers.bytes())
    }

    /// Where the sum of gradients has those places.
    fn gradient_at(&self, places: &Range<usize>) -> Address {
        self.gradient.base.plus(places.start * size_of::<f32>())
    }

    /// Where the sums have that place, and what they are made of.
    fn sums_at(
        &self,
        sums: DeviceSums,
        place: usize,
    ) -> Result<(Address, DeviceNumbers), DeviceError> {
        let (base, numbers) = match sums {
            DeviceSums::Exact { .. } => {
                let numbers = DeviceNumbers::Integers;
                (self.sums_in(&self.fixed_sums, numbers)?, numbers)
            }
            DeviceSums::Fast { .. } => (self.gradient.base, DeviceNumbers::Floats),
            DeviceSums::Narrow { .. } => {
                let numbers = DeviceNumbers::Bf16;
                (self.sums_in(&self.narrow_sums, numbers)?, numbers)
            }
        };
        Ok((base.plus(place * numbers.bytes()), numbers))
    }

    /// Where such sums begin; there is room from the first step on that needs it.
    fn sums_in(
        &self,
        memory: &OnceLock<Memory>,
        numbers: DeviceNumbers,
    ) -> Result<Address, DeviceError> {
        if let Some(sums) = memory.get() {
            return Ok(sums.base);
        }
        let bytes = self.places.len * numbers.bytes();
        let sums = Memory::new(&self.driver, bytes)?;
        self.driver.zero(sums.base, bytes)?;
        Ok(memory.get_or_init(|| sums).base)
    }

    /// A slot is about to be added, part by part.
    pub(crate) fn begin_adding(&self) -> Result<(), DeviceError> {
        self.driver.upload(self.notes.base, &NO_FAULT.to_le_bytes())
    }

    /// Queues the addition of a part of a slot's gradient, which is final by then. In single precision the
    /// slots' gradients are one sum already, which is looked at.
    pub(crate) fn add_part(
        &self,
        sums: DeviceSums,
        first: bool,
        part: Range<usize>,
    ) -> Result<(), DeviceError> {
        let (from, until) = (Argument::Count(part.start as u64), Argument::Count(part.end as u64));
        let (gradient, fault) = (self.gradient.base.into(), self.notes.base.into());
        match sums {
            DeviceSums::Exact { scale, limit } => self.driver.launch(
                self.flat("exact_add"),
                &[
                    gradient,
                    from,
                    until,
                    scale.into(),
                    limit.into(),
                    Argument::Int(first.into()),
                    self.sums_at(sums, 0)?.0.into(),
                    fault,
                ],
            ),
            DeviceSums::Fast { limit } => self
                .driver
                .launch(self.flat("check_sums"), &[gradient, from, until, limit.into(), fault]),
            DeviceSums::Narrow { limit } => self.driver.launch(
                self.flat("narrow_sums"),
                &[gradient, from, until, limit.into(), self.sums_at(sums, 0)?.0.into(), fault],
            ),
        }
    }

    /// The first element of the layout that has no place in the sums, and its value.
    pub(crate) fn fault(&self) -> Result<Option<(usize, f32)>, DeviceError> {
        let mut found = [0u8; 8];
        let after = self.driver.mark()?;
        self.driver.download(after, self.notes.base, &mut found)?;
        let found = u64::from_le_bytes(found);
        if found == NO_FAULT {
            return Ok(None);
        }
        // The place, and below it the value: the sums themselves may be on their way to other devices.
        let (place, value) = ((found >> 32) as usize, f32::from_bits(found as u32));
        let shift = self.places.head - self.places.head_in_layout;
        let element = if place >= self.places.head { place - shift } else { place };
        Ok(Some((element, value)))
    }

    /// So many parts of the sums of what is trained, from their end to their beginning, in places of the
    /// device's buffers.
    pub(crate) fn parts(&self, objective: Objective, count: usize) -> Vec<Range<usize>> {
        let trained = self.places.trained(objective);
        let rows = trained.len() / ALIGNED;
        let edge = |part: usize| match part {
            0 => trained.end,
            part => trained.start + rows * (count - part) / count * ALIGNED,
        };
        (0..count).map(|part| edge(part + 1)..edge(part)).collect()
    }

    /// The place of an element of the layout.
    pub(crate) fn place_of(&self, element: usize) -> usize {
        match element >= self.places.head_in_layout {
            true => element + self.places.head - self.places.head_in_layout,
            false => element,
        }
    }

    /// A part of the sums, as all that is queued up to now leaves it.
    pub(crate) fn span(
        &self,
        sums: DeviceSums,
        part: Range<usize>,
    ) -> Result<DeviceSpan, DeviceError> {
        let (at, numbers) = self.sums_at(sums, part.start)?;
        Ok(DeviceSpan { at, len: part.len(), numbers, after: self.driver.mark()? })
    }

    /// Puts integers beside the sums.
    ///
    /// # Panics
    /// If there are more than there is room for.
    pub(crate) fn put_integers(&self, integers: &[i64]) -> Result<DeviceSpan, DeviceError> {
        assert!(integers.len() <= MOST_INTEGERS, "{} integers beside the sums", integers.len());
        let at = match self.beside.get() {
            Some(beside) => beside.base,
            None => {
                let memory = Memory::new(&self.driver, MOST_INTEGERS * size_of::<i64>())?;
                self.beside.get_or_init(|| memory).base
            }
        };
        self.driver.upload(at, bytemuck::cast_slice(integers))?;
        let (len, numbers) = (integers.len(), DeviceNumbers::Integers);
        Ok(DeviceSpan { at, len, numbers, after: self.driver.mark()? })
    }

    /// The device's lane, with so many words.
    pub(crate) fn exchange(&self, words: usize) -> Result<Exchange, DeviceError> {
        Exchange::new(&self.driver, words)
    }

    /// Makes the mean over `divisor` slots of the step's sums the gradient; gives their digest.
    pub(crate) fn settle(
        &self,
        sums: DeviceSums,
        objective: Objective,
        divisor: f64,
    ) -> Result<[u64; 2], DeviceError> {
        self.driver.zero(self.notes.base, 2 * size_of::<u64>())?;
        // A multiple of four, as kernels take that many at a time.
        let trained = self.places.trained(objective);
        let (gradient, digest) = (self.gradient_at(&trained).into(), self.notes.base.into());
        let count = Argument::Count(trained.len() as u64);
        let at = self.sums_at(sums, trained.start)?.0.into();
        match sums {
            DeviceSums::Exact { scale, .. } => self.driver.launch(
                self.flat("exact_settle"),
                &[at, count, scale.into(), divisor.into(), gradient, digest],
            )?,
            DeviceSums::Narrow { .. } => self.driver.launch(
                self.flat("narrow_settle"),
                &[at, count, (divisor as f32).into(), gradient, digest],
            )?,
            DeviceSums::Fast { .. } => self.driver.launch(
                self.flat("fast_settle"),
                &[gradient, count, (divisor as f32).into(), digest],
            )?,
        }
        let mut found = [0u64; 2];
        let after = self.driver.mark()?;
        self.driver.download(after, self.notes.base, bytemuck::cast_slice_mut(&mut found))?;
        Ok(found)
    }

    /// Puts a gradient of what is trained in the place of the sum.
    pub(crate) fn put_gradient(
        &self,
        objective: Objective,
        gradient: &[f32],
    ) -> Result<(), DeviceError> {
        self.upload(&self.gradient, self.layout.trained(objective), gradient)
    }

    /// Queues a slot, whose gradient is added to the sum. `on_final` is called with the first element of
    /// those that are final at some moment, from the end to the beginning.
    pub(crate) fn queue_slot(
        &self,
        settings: &StageSettings,
        recompute: Recompute,
        batch: &SlotBatch,
        on_final: &mut dyn FnMut(Final),
    ) -> Result<Queued<'_>, DeviceError> {
        let purpose = Purpose::Gradient(settings.objective);
        self.with_task(settings, recompute, batch, purpose, |task| {
            task.gradient(settings, batch, on_final)?;
            self.queued(task)
        })
    }

    /// A slot's means, without a gradient.
    pub(crate) fn evaluate(
        &self,
        settings: &StageSettings,
        batch: &SlotBatch,
    ) -> Result<SlotStatistics, DeviceError> {
        self.with_task(settings, Recompute::None, batch, Purpose::Losses, |task| {
            task.losses(settings, batch)?;
            self.queued(task)
        })?
        .statistics()
    }

    /// Elements of the sum of gradients, in layout order, once that moment has come.
    pub(crate) fn read_gradient(
        &self,
        after: Mark,
        elements: Range<usize>,
        to: &mut [f32],
    ) -> Result<(), DeviceError> {
        self.download(after, &self.gradient, elements, to)
    }

    /// The same, once all that is queued is done.
    pub(crate) fn gradient(
        &self,
        elements: Range<usize>,
        to: &mut [f32],
    ) -> Result<(), DeviceError> {
        let after = self.driver.mark()?;
        self.download(after, &self.gradient, elements, to)
    }

    /// Euclidean norm of the sum of gradients.
    pub(crate) fn norm(&self, objective: Objective) -> Result<f64, DeviceError> {
        let trained = self.places.trained(objective);
        self.driver.launch(
            self.flat("squares"),
            &[
                self.gradient_at(&trained).into(),
                Argument::Count(trained.len() as u64),
                self.squares.base.into(),
            ],
        )?;
        let mut sums = vec![0f64; self.flat_blocks()];
        let after = self.driver.mark()?;
        self.driver.download(after, self.squares.base, bytemuck::cast_slice_mut(&mut sums))?;
        Ok(sums.iter().sum::<f64>().sqrt())
    }

    /// One step of AdamW, of what is trained, with `share` of the sum of gradients, which makes a gradient
    /// of that norm.
    pub(crate) fn update(
        &self,
        step: &StepSize<'_>,
        objective: Objective,
        norm: f64,
        share: f64,
    ) -> Result<(), DeviceError> {
        let base = step.clipped(norm);
        let float = size_of::<f32>();
        let trained = self.layout.trained(objective);
        let is_trained = |tensor: &&TensorEntry| trained.contains(&tensor.offset);
        for tensor in self.layout.tensors().iter().filter(is_trained) {
            let (at, count) = (self.place_of(tensor.offset), tensor.len as u64);
            let update = step.of_tensor(&base, tensor.decay);
            let blocks = tensor.len.div_ceil(8 * FLAT_THREADS as usize).min(8192) as u32;
            self.driver.launch(
                Launch { kernel: "adamw", grid: [blocks, 1, 1], threads: FLAT_THREADS },
                &[
                    self.weights.base.plus(at * float).into(),
                    self.first_moment.base.plus(at * float).into(),
                    self.second_moment.base.plus(at * float).into(),
                    self.gradient.base.plus(at * float).into(),
                    self.narrow.base.plus(at * size_of::<u16>()).into(),
                    Argument::Count(count),
                    ((f64::from(update.clip) * share) as f32).into(),
                    update.beta1.into(),
                    update.beta2.into(),
                    update.epsilon.into(),
                    update.step_size.into(),
                    update.inverse_root.into(),
                    update.keep.into(),
                ],
            )?;
        }
        Ok(())
    }

    /// Floating-point operations a second of a large product, the best of some.
    pub(crate) fn matrix_rate(&self) -> Result<f64, DeviceError> {
        const SIDE: usize = 8192;
        const TRIES: usize = 10;
        let bytes = SIDE * SIDE * size_of::<u16>();
        let matrices = [(); 3].map(|()| Memory::new(&self.driver, bytes));
        let [left, right, out] = matrices;
        let (left, right, out) = (left?, right?, out?);
        // Numbers between 1 and 2 of either sign: zeros would be multiplied faster.
        let mut state = 1u32;
        let mut numbers = vec![0u16; SIDE * SIDE];
        for number in &mut numbers {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            *number = 0x3f80 | (state >> 25) as u16 | (state >> 8 & 0x8000) as u16;
        }
        self.driver.upload(left.base, bytemuck::cast_slice(&numbers))?;
        self.driver.upload(right.base, bytemuck::cast_slice(&numbers))?;
        let product = Product {
            kind: ProductKind::Forward,
            rows: SIDE,
            outputs: SIDE,
            inputs: SIDE,
            single: false,
        };
        let mut best = f64::INFINITY;
        for _ in 0..TRIES {
            self.finish()?;
            let start = Instant::now();
            for _ in 0..TRIES {
                self.driver.product(product, left.base, right.base, out.base)?;
            }
            self.finish()?;
            best = best.min(start.elapsed().as_secs_f64() / TRIES as f64);
        }
        Ok(2.0 * (SIDE as f64).powi(3) / best)
    }

    /// See [`Driver::peak_bytes`].
    pub(crate) fn peak_bytes(&self) -> u64 {
        self.driver.peak_bytes()
    }

    /// Waits until all that is queued is done.
    pub(crate) fn finish(&self) -> Result<(), DeviceError> {
        let after = self.driver.mark()?;
        self.driver.download(after, self.squares.base, &mut [0; 8])
    }

    fn flat(&self, kernel: &'static str) -> Launch {
        let blocks = self.flat_blocks() as u32;
        Launch { kernel, grid: [blocks, 1, 1], threads: FLAT_THREADS }
    }

    /// As many as have something to do, four elements a thread.
    fn flat_blocks(&self) -> usize {
        self.places.len.div_ceil(4 * FLAT_THREADS as usize).min(MOST_FLAT_BLOCKS)
    }

    /// Those elements of the layout, which are `values`.
    fn upload(
        &self,
        to: &Memory,
        elements: Range<usize>,
        values: &[f32],
    ) -> Result<(), DeviceError> {
        for (part, place) in self.places.runs_of(&elements) {
            let to = to.base.plus(place * size_of::<f32>());
            let values = &values[part.start - elements.start..part.end - elements.start];
            self.driver.upload(to, bytemuck::cast_slice(values))?;
        }
        Ok(())
    }

    fn download(
        &self,
        after: Mark,
        from: &Memory,
        elements: Range<usize>,
        to: &mut [f32],
    ) -> Result<(), DeviceError> {
        for (part, place) in self.places.runs_of(&elements) {
            let from = from.base.plus(place * size_of::<f32>());
            let to = &mut to[part.start - elements.start..part.end - elements.start];
            self.driver.download(after, from, bytemuck::cast_slice_mut(to))?;
        }
        Ok(())
    }

    fn with_task<R>(
        &self,
        settings: &StageSettings,
        recompute: Recompute,
        batch: &SlotBatch,
        purpose: Purpose,
        work: impl FnOnce(&Task<'_>) -> Result<R, DeviceError>,
    ) -> Result<R, DeviceError> {
        let SlotBatch { sequences, sequence_length: length, .. } = *batch;
        let (loops, layers) = (settings.loops, self.model.num_hidden_layers);
        if loops > MOST_LOOPS {
            return Err(DeviceError(format!("{loops} loops: the GPU takes up to {MOST_LOOPS}")));
        }
        let sizes = SlotSizes { sequences, length, loops, layers, recompute, purpose };
        let mut spare = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let workspace = match spare.take() {
            Some(workspace) if workspace.sizes == sizes => workspace,
            other => {
                // Given back before the new one is asked for.
                drop(other);
                Workspace::new(&self.driver, sizes, &self.sizes)?
            }
        };
        let buffers = Buffers {
            weights: self.weights.base,
            narrow: self.narrow.base,
            gradient: self.gradient.base,
        };
        let result = work(&Task {
            driver: &*self.driver,
            model: &self.sizes,
            places: &self.places,
            buffers,
            work: &workspace,
            eps: self.model.rms_norm_eps as f32,
        });
        *spare = Some(workspace);
        result
    }

    fn queued(&self, task: &Task<'_>) -> Result<Queued<'_>, DeviceError> {
        let SlotSizes { loops, .. } = task.work.sizes;
        let (tokens, sums) = (task.work.sizes.tokens(), task.work.sums);
        let loop_sums = task.work.loop_sums;
        Ok(Queued {
            driver: &*self.driver,
            sums,
            loop_sums,
            tokens,
            loops,
            after: self.driver.mark()?,
        })
    }
}

/// A slot whose work is queued; its sums are there until the next one's.
pub(crate) struct Queued<'a> {
    driver: &'a dyn Driver,
    sums: Address,
    loop_sums: Address,
    tokens: usize,
    loops: usize,
    after: Mark,
}

impl Queued<'_> {
    /// Waits for the slot; gives its means.
    pub(crate) fn statistics(self) -> Result<SlotStatistics, DeviceError> {
        let width = 3 + 2 * self.loops;
        let mut sums = vec![0f64; self.tokens.div_ceil(Workspace::EXIT_THREADS) * width];
        self.driver.download(self.after, self.sums, bytemuck::cast_slice_mut(&mut sums))?;
        let mean = |column: usize| {
            sums.chunks_exact(width).map(|row| row[column]).sum::<f64>() / self.tokens as f64
        };
        let mut loop_sums = vec![0f64; 3 * self.loops];
        self.driver.download(
            self.after,
            self.loop_sums,
            bytemuck::cast_slice_mut(&mut loop_sums),
        )?;
        let tokens = self.tokens as f64;
        let of_loops = |place: usize| loop_sums[place..].iter().step_by(3);
        Ok(SlotStatistics {
            loss: mean(0),
            entropy: mean(1),
            loss_per_loop: (3..3 + self.loops).map(mean).collect(),
            exit_pdf: (3 + self.loops..3 + 2 * self.loops).map(mean).collect(),
            hidden_rms_per_loop: of_loops(0).map(|sum| sum / tokens).collect(),
            agreement_per_loop: of_loops(1).map(|sum| sum / tokens).collect(),
            gradient_norm_per_loop: of_loops(2).map(|sum| (tokens * sum).sqrt()).collect(),
        })
    }
}
