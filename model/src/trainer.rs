//! The training state, where it is computed with: in this process's memory, or on a device.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use looptrain_proto::Step;
use looptrain_proto::spec::{self, Objective};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::cuda::{CudaEngine, DeviceError, DeviceSpan, DeviceSums, Exchange};
use crate::optimizer::{self, StepSize};
use crate::{
    Device, Engine, Layout, Recompute, SlotBatch, SlotOutput, SlotStatistics, StageSettings,
    TrainState,
};

/// A model's training state and the engine that computes with it.
///
/// What is handed out and taken in lies in the process's memory, flat, in [`Layout`] order, wherever
/// the state is.
pub struct Trainer {
    layout: Layout,
    place: Place,
}

enum Place {
    Host { engine: Box<Engine>, state: Option<TrainState> },
    Device(Box<OnDevice>),
}

/// A state on a device; the threads add up what comes from it.
struct OnDevice {
    engine: CudaEngine,
    recompute: Recompute,
    held: Option<Step>,
    pool: ThreadPool,
    /// Gradients that nobody reads any more, as memory for the next.
    spare: Mutex<Vec<Vec<f32>>>,
}

impl Trainer {
    /// A trainer of a model without a state yet, on a device, with so many threads of this machine.
    ///
    /// # Errors
    /// When the device cannot be used, or not for this model.
    ///
    /// # Panics
    /// If the system cannot start the threads.
    pub fn new(device: Device, model: &spec::Model, threads: usize) -> Result<Self, DeviceError> {
        let place = match device.engine(model)? {
            None => Place::Host { engine: Box::new(Engine::new(model, threads)), state: None },
            Some(engine) => Place::Device(Box::new(OnDevice {
                engine,
                recompute: Recompute::None,
                held: None,
                pool: ThreadPoolBuilder::new()
                    .num_threads(threads.max(1))
                    .thread_name(|thread| format!("trainer-{thread}"))
                    .build()
                    .expect("the system can start the worker's threads"),
                spare: Mutex::default(),
            })),
        };
        Ok(Self { layout: Layout::new(model), place })
    }

    /// The table of the model's tensors.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The committed step whose state is here.
    #[must_use]
    pub fn held(&self) -> Option<Step> {
        match &self.place {
            Place::Host { state, .. } => state.as_ref().map(|state| state.step),
            Place::Device(on) => on.held,
        }
    }

    /// Takes a state in place of the held one.
    ///
    /// # Errors
    /// When the device fails.
    pub fn adopt(&mut self, new: TrainState) -> Result<(), DeviceError> {
        match &mut self.place {
            Place::Host { engine, state } => {
                engine.load(&new.weights);
                *state = Some(new);
            }
            Place::Device(on) => {
                on.held = None;
                on.engine.put(&new)?;
                on.held = Some(new.step);
            }
        }
        Ok(())
    }

    /// The held state; that of a device is copied from there.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// If no state is held.
    pub fn state(&self) -> Result<Cow<'_, TrainState>, DeviceError> {
        match &self.place {
            Place::Host { state, .. } => {
                Ok(Cow::Borrowed(state.as_ref().expect("a state has been adopted")))
            }
            Place::Device(on) => {
                let step = on.held.expect("a state has been adopted");
                let all = 0..self.layout.parameters();
                let mut buffers = [(); 3].map(|()| vec![0.0; all.len()]);
                let [weights, first, second] = &mut buffers;
                on.pool.install(|| on.engine.read(all, [weights, first, second]))?;
                let [weights, first_moment, second_moment] = buffers;
                Ok(Cow::Owned(TrainState { step, weights, first_moment, second_moment }))
            }
        }
    }

    /// The held weights; those of a device are copied from there.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// If no state is held.
    pub fn weights(&self) -> Result<Cow<'_, [f32]>, DeviceError> {
        match &self.place {
            Place::Host { state, .. } => {
                Ok(Cow::Borrowed(&state.as_ref().expect("a state has been adopted").weights))
            }
            Place::Device(on) => {
                let all = 0..self.layout.parameters();
                let mut weights = vec![0.0; all.len()];
                on.pool.install(|| on.engine.read(all, [&mut weights, &mut [], &mut []]))?;
                Ok(Cow::Owned(weights))
            }
        }
    }

    /// What backward computes again from now on.
    pub fn set_recompute(&mut self, recompute: Recompute) {
        match &mut self.place {
            Place::Host { engine, .. } => engine.set_recompute(recompute),
            Place::Device(on) => on.recompute = recompute,
        }
    }

    /// See [`Engine::gradients_as_final`]. On a device slots are computed one after the other; what one
    /// leaves is handed on while the next is computed.
    ///
    /// # Errors
    /// When the device fails; slots may have been handed on before.
    ///
    /// # Panics
    /// If no state is held.
    pub fn gradients_as_final(
        &self,
        settings: &StageSettings,
        batches: &[SlotBatch],
        cancelled: &AtomicBool,
        on_final: &(dyn Fn(usize, &[f32], usize) + Sync),
        on_slot: &(dyn Fn(usize, SlotOutput) + Sync),
    ) -> Result<(), DeviceError> {
        match &self.place {
            Place::Host { engine, .. } => {
                engine.gradients_as_final(settings, batches, cancelled, on_final, on_slot);
                Ok(())
            }
            Place::Device(on) => {
                let trained = self.layout.trained(settings.objective);
                on.gradients(trained, settings, batches, cancelled, on_final, on_slot)
            }
        }
    }

    /// See [`Engine::evaluate`].
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// If no state is held.
    pub fn evaluate(
        &self,
        settings: &StageSettings,
        batches: &[SlotBatch],
        cancelled: &AtomicBool,
    ) -> Result<Vec<SlotStatistics>, DeviceError> {
        match &self.place {
            Place::Host { engine, .. } => Ok(engine.evaluate(settings, batches, cancelled)),
            Place::Device(on) => {
                let one = |batch| match cancelled.load(Ordering::Relaxed) {
                    true => Ok(SlotStatistics::default()),
                    false => on.engine.evaluate(settings, batch),
                };
                batches.iter().map(one).collect()
            }
        }
    }

    /// Whether the sums of slots can stay where the state is: on a device.
    #[must_use]
    pub fn can_sum(&self) -> bool {
        matches!(self.place, Place::Device(_))
    }

    /// The lane of the device, in which a collective reaches the sums, with room for so many words; `None` on
    /// the CPU.
    ///
    /// # Errors
    /// When the device has no memory for that.
    pub fn exchange(&self, words: usize) -> Result<Option<Exchange>, DeviceError> {
        match &self.place {
            Place::Host { .. } => Ok(None),
            Place::Device(on) => on.engine.exchange(words).map(Some),
        }
    }

    /// Computes slots and adds their gradients up on the device, one after the other; when `on_slot` gives
    /// false, the rest is not computed. The sums are also given away in so many parts, from their end to
    /// their beginning, each as soon as it is queued that it becomes final.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// On the CPU, and if no state is held.
    pub fn sum_slots(
        &self,
        settings: &StageSettings,
        batches: &[SlotBatch],
        (sums, parts): (DeviceSums, usize),
        cancelled: &AtomicBool,
        on_part: &mut dyn FnMut(DeviceSpan),
        on_slot: &mut dyn FnMut(SummedSlot) -> bool,
    ) -> Result<(), DeviceError> {
        let on = self.device();
        let engine = &on.engine;
        let objective = settings.objective;
        let parts = engine.parts(objective, parts);
        if batches.is_empty() {
            engine.clear_sums(sums, objective)?;
            return parts.into_iter().try_for_each(|part| {
                on_part(engine.span(sums, part)?);
                Ok(())
            });
        }
        // In single precision the gradient itself is the sum.
        let adds_apart = matches!(sums, DeviceSums::Exact { .. });
        if !adds_apart {
            engine.clear(objective)?;
        }
        let mut parts = parts.into_iter().peekable();
        for (slot, batch) in batches.iter().enumerate() {
            if cancelled.load(Ordering::Relaxed) {
                break;
            }
            if adds_apart {
                engine.clear(objective)?;
            }
            engine.begin_adding()?;
            let (first, last) = (slot == 0, slot + 1 == batches.len());
            let mut added = Ok(());
            let queued = engine.queue_slot(settings, on.recompute, batch, &mut |(from, _)| {
                let final_from = engine.place_of(from);
                while added.is_ok()
                    && let Some(part) = parts.next_if(|part| last && part.start >= final_from)
                {
                    added = engine.add_part(sums, first, part.clone()).and_then(|()| {
                        on_part(engine.span(sums, part)?);
                        Ok(())
                    });
                }
            })?;
            added?;
            if !last {
                engine
                    .parts(objective, 1)
                    .into_iter()
                    .try_for_each(|all| engine.add_part(sums, first, all))?;
            }
            let statistics = queued.statistics()?;
            let first_element = self.layout.trained(objective).start;
            let outside = engine.fault()?.map(|(at, value)| (at - first_element, value));
            if outside.is_some() && !last {
                // What it left must not be taken for that of the slots after it.
                engine.clear(objective)?;
            }
            if !on_slot(SummedSlot { slot, statistics, outside }) {
                break;
            }
        }
        Ok(())
    }

    /// Puts integers beside the sums on the device.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// On the CPU, and if there are more than a thousand.
    pub fn put_integers(&self, integers: &[i64]) -> Result<DeviceSpan, DeviceError> {
        self.device().engine.put_integers(integers)
    }

    /// Makes the mean over `divisor` slots of the sums the gradient that waits for
    /// [`Trainer::update_from_sums`]; gives the sums' digest and the gradient's norm.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// On the CPU.
    pub fn settle_sums(
        &self,
        sums: DeviceSums,
        objective: Objective,
        divisor: f64,
    ) -> Result<([u64; 2], f64), DeviceError> {
        let on = self.device();
        Ok((on.engine.settle(sums, objective, divisor)?, on.engine.norm(objective)?))
    }

    /// As [`Trainer::update`], with the gradient that waits on the device.
    ///
    /// # Errors
    /// When the device fails; the state is then lost.
    ///
    /// # Panics
    /// On the CPU, and if no state is held.
    pub fn update_from_sums(
        &mut self,
        norm: f64,
        settings: &spec::Optimizer,
        objective: Objective,
        learning_rate: f64,
    ) -> Result<(), DeviceError> {
        let Place::Device(on) = &mut self.place else { panic!("the gradient is on a device") };
        let step = on.held.take().expect("a state has been adopted").next();
        on.engine.update(&StepSize { settings, step, learning_rate }, objective, norm, 1.0)?;
        on.engine.finish()?;
        on.held = Some(step);
        Ok(())
    }

    /// The gradient by what is trained that waits on the device.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// On the CPU.
    pub fn waiting_gradient(&self, objective: Objective) -> Result<Vec<f32>, DeviceError> {
        let on = self.device();
        let trained = self.layout.trained(objective);
        let mut gradient = vec![0.0; trained.len()];
        on.pool.install(|| on.engine.gradient(trained, &mut gradient))?;
        Ok(gradient)
    }

    fn device(&self) -> &OnDevice {
        match &self.place {
            Place::Host { .. } => panic!("the sums are on a device"),
            Place::Device(on) => on,
        }
    }

    /// A whole step on the device, whose gradient never leaves it: the mean of the slots' gradients, in
    /// single precision, clipped and applied. Gives the mean loss; `None` on the CPU.
    ///
    /// # Errors
    /// When the device fails; the state is then lost.
    ///
    /// # Panics
    /// If no state is held.
    pub fn step_on_device(
        &mut self,
        settings: &StageSettings,
        batches: &[SlotBatch],
        optimizer: &spec::Optimizer,
        learning_rate: f64,
    ) -> Result<Option<f64>, DeviceError> {
        let Place::Device(on) = &mut self.place else { return Ok(None) };
        let step = on.held.take().expect("a state has been adopted").next();
        let objective = settings.objective;
        on.engine.clear(objective)?;
        let mut loss = 0.0;
        for batch in batches {
            let slot = on.engine.queue_slot(settings, on.recompute, batch, &mut |_| {})?;
            loss += slot.statistics()?.loss;
        }
        let share = 1.0 / batches.len() as f64;
        let norm = share * on.engine.norm(objective)?;
        let size = StepSize { settings: optimizer, step, learning_rate };
        on.engine.update(&size, objective, norm, share)?;
        on.engine.finish()?;
        on.held = Some(step);
        Ok(Some(loss * share))
    }

    /// Clips the gradient and applies AdamW to what the objective trains; the held state is then that of
    /// the next step. Returns the gradient's norm before clipping.
    ///
    /// # Errors
    /// When the device fails; the state is then lost.
    ///
    /// # Panics
    /// If no state is held, or the gradient has other elements than the objective trains.
    pub fn update(
        &mut self,
        gradient: &[f32],
        settings: &spec::Optimizer,
        objective: Objective,
        learning_rate: f64,
    ) -> Result<f64, DeviceError> {
        match &mut self.place {
            Place::Host { engine, state } => {
                let state = state.as_mut().expect("a state has been adopted");
                let norm = engine.update(state, gradient, settings, objective, learning_rate);
                engine.load(&state.weights);
                Ok(norm)
            }
            Place::Device(on) => {
                let trained = self.layout.trained(objective).len();
                assert_eq!(gradient.len(), trained, "a gradient has the elements that are trained");
                let step = on.held.take().expect("a state has been adopted").next();
                on.engine.put_gradient(objective, gradient)?;
                let norm = on.engine.norm(objective)?;
                let size = StepSize { settings, step, learning_rate };
                on.engine.update(&size, objective, norm, 1.0)?;
                on.engine.finish()?;
                on.held = Some(step);
                Ok(norm)
            }
        }
    }

    /// Goes to the next step with the state as it is.
    ///
    /// # Panics
    /// If no state is held.
    pub fn skip(&mut self) {
        let held = match &mut self.place {
            Place::Host { state, .. } => state.as_mut().map(|state| &mut state.step),
            Place::Device(on) => on.held.as_mut(),
        };
        let step = held.expect("a state has been adopted");
        *step = step.next();
    }

    /// Runs something in the pool of all threads.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.place {
            Place::Host { engine, .. } => engine.run(work),
            Place::Device(on) => on.pool.install(work),
        }
    }

    /// Euclidean norm of a flat gradient.
    #[must_use]
    pub fn norm(&self, gradient: &[f32]) -> f64 {
        self.run(|| optimizer::global_norm(gradient))
    }

    /// Takes back the gradient of a slot that nobody reads any more, as memory for the next ones.
    pub fn recycle(&self, gradient: Vec<f32>) {
        match &self.place {
            Place::Host { engine, .. } => engine.recycle(gradient),
            Place::Device(on) => on.recycle(gradient),
        }
    }

    /// The time that went into each section since the last call: on the CPU added up over threads; on a
    /// device by kernel, once [`Trainer::measure`] has been called.
    #[must_use]
    pub fn take_sections(&self) -> Vec<(&'static str, Duration)> {
        match &self.place {
            Place::Host { engine, .. } => engine.take_sections(),
            Place::Device(on) => on.engine.take_times(),
        }
    }

    /// Has a device take the time of each kernel, one after the other, which is slower. On the CPU times
    /// are always taken.
    pub fn measure(&self, on: bool) {
        if let Place::Device(device) = &self.place {
            device.engine.measure(on);
        }
    }

    /// Floating-point operations a second of a large product of bf16 matrices on the device; `None` on the CPU.
    ///
    /// # Errors
    /// When the device fails.
    pub fn device_rate(&self) -> Result<Option<f64>, DeviceError> {
        match &self.place {
            Place::Host { .. } => Ok(None),
            Place::Device(on) => on.engine.matrix_rate().map(Some),
        }
    }

    /// Most bytes that were taken from the device at a time; `None` on the CPU.
    #[must_use]
    pub fn device_bytes(&self) -> Option<u64> {
        match &self.place {
            Place::Host { .. } => None,
            Place::Device(on) => Some(on.engine.peak_bytes()),
        }
    }

    /// What steps need of the memory that the state is in.
    #[must_use]
    pub fn memory(&self) -> MemoryNeed {
        match &self.place {
            Place::Host { engine, .. } => MemoryNeed::of_cpu(engine.threads()),
            Place::Device(on) => {
                MemoryNeed { available: on.engine.memory(), ..MemoryNeed::of_gpu() }
            }
        }
    }

    /// Bytes that a slot takes while it is under way.
    #[must_use]
    pub fn slot_bytes(
        &self,
        model: &spec::Model,
        settings: &StageSettings,
        [sequences, length]: [usize; 2],
        recompute: Recompute,
    ) -> u64 {
        match &self.place {
            Place::Host { .. } => Engine::slot_bytes(model, settings, sequences, length, recompute),
            Place::Device(on) => on.engine.slot_bytes(settings, [sequences, length], recompute),
        }
    }
}

/// A slot whose gradient has been added up on a device.
#[derive(Clone, Debug, PartialEq)]
pub struct SummedSlot {
    /// Its index among those given.
    pub slot: usize,
    /// Means over its tokens.
    pub statistics: SlotStatistics,
    /// The first element that has no place in the sums, and its value: the sums have no meaning then.
    pub outside: Option<(usize, f32)>,
}

/// What a trainer needs of the memory that its state is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Bytes that there were before the state was there, of a device that tells.
    pub available: Option<u64>,
    /// Bytes held for each parameter by a device; without one it is up to whoever holds the rest.
    pub per_parameter: Option<u64>,
    /// Most slots under way at a time.
    pub slots_at_once: usize,
}

impl MemoryNeed {
    fn of_cpu(threads: usize) -> Self {
        Self { available: None, per_parameter: None, slots_at_once: threads }
    }

    fn of_gpu() -> Self {
        let per_parameter = Some(CudaEngine::BYTES_PER_PARAMETER);
        Self { available: None, per_parameter, slots_at_once: 1 }
    }

    /// That of any device of this kind, which need not be there, for a trainer of so many threads.
    #[must_use]
    pub fn of(device: Device, threads: usize) -> Self {
        match device {
            Device::Cpu => Self::of_cpu(threads),
            _ => Self::of_gpu(),
        }
    }
}

/// Bytes that a slot takes while it is under way on any device of this kind, which need not be there.
///
/// # Errors
/// When there are no kernels for the model.
pub fn slot_bytes(
    device: Device,
    model: &spec::Model,
    settings: &StageSettings,
    [sequences, length]: [usize; 2],
    recompute: Recompute,
) -> Result<u64, DeviceError> {
    match device {
        Device::Cpu => Ok(Engine::slot_bytes(model, settings, sequences, length, recompute)),
        _ => CudaEngine::slot_bytes_of(model, settings, [sequences, length], recompute),
    }
}

impl OnDevice {
    fn recycle(&self, gradient: Vec<f32>) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        // One that is being filled and one that is being read.
        if spare.len() < 2 {
            spare.push(gradient);
        }
    }

    fn gradients(
        &self,
        trained: Range<usize>,
        settings: &StageSettings,
        batches: &[SlotBatch],
        cancelled: &AtomicBool,
        on_final: &(dyn Fn(usize, &[f32], usize) + Sync),
        on_slot: &(dyn Fn(usize, SlotOutput) + Sync),
    ) -> Result<(), DeviceError> {
        // No more than one slot waits while another is handed on, so that memory stays bounded.
        let (done, to_hand_on) = sync_channel::<(usize, SlotOutput)>(0);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for (slot, output) in to_hand_on {
                    self.pool.install(|| on_slot(slot, output));
                }
            });
            for (slot, batch) in batches.iter().enumerate() {
                if cancelled.load(Ordering::Relaxed) {
                    break;
                }
                let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
                // That of a stage which trains more is of no use.
                let enough = 2 * trained.len();
                let mut gradient =
                    spare.filter(|spare| spare.capacity() <= enough).unwrap_or_default();
                gradient.resize(trained.len(), 0.0);
                let first = trained.start;
                let statistics =
                    self.slot(settings, batch, (first, &mut gradient), &|gradient, from| {
                        on_final(slot, gradient, from);
                    })?;
                // The receiver is gone only when it has panicked, which the scope passes on.
                let _ = done.send((slot, SlotOutput { gradient, statistics }));
            }
            drop(done);
            Ok(())
        })
    }

    /// One slot's gradient, whose first element is that one of the layout, read from the device from its end
    /// to its beginning as it becomes final.
    fn slot(
        &self,
        settings: &StageSettings,
        batch: &SlotBatch,
        (first, gradient): (usize, &mut [f32]),
        on_final: &(dyn Fn(&[f32], usize) + Sync),
    ) -> Result<SlotStatistics, DeviceError> {
        self.engine.clear(settings.objective)?;
        // All is queued before anything is waited for.
        let mut finals = Vec::new();
        let queued = self.engine.queue_slot(settings, self.recompute, batch, &mut |part| {
            finals.push(part);
        })?;
        let mut end = gradient.len();
        for (element, after) in finals {
            let from = element - first;
            let elements = element..first + end;
            self.pool.install(|| {
                self.engine.read_gradient(after, elements, &mut gradient[from..end])?;
                if from > 0 {
                    on_final(gradient, from);
                }
                Ok::<_, DeviceError>(())
            })?;
            end = from;
        }
        queued.statistics()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpu;

    #[test]
    fn a_device_that_is_not_there_is_told_with_what_helps() {
        let model = looptrain_proto::spec::Model {
            hidden_size: 64,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            intermediate_size: 64,
            vocab_size: 64,
            rms_norm_eps: 1e-6,
            initializer_range: 0.02,
        };
        // No machine has so many.
        let error =
            Trainer::new(Device::Cuda(Gpu::Number(4095)), &model, 1).err().expect("no such device");
        let told = error.to_string();
        assert!(told.contains("--device cpu") || told.contains("cuda:4095"), "{told}");
        let odd = spec::Model { hidden_size: 60, ..model };
        let error = Trainer::new(Device::Emulated, &odd, 1).err().expect("an odd size");
        assert!(error.to_string().contains("model.hidden_size = 60"), "{error}");
    }
}
