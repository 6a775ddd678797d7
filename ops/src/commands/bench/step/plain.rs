//! Steps without what a worker adds for its peers: the slots' gradients are added in floating point, in
//! the order in which they come, and no digest is taken. Also for the model in plain Burn operations,
//! which workers do not compute with.

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use burn::tensor::Device;
use looptrain_model::{
    Engine, Recompute, SlotBatch, SlotOutput, StageSettings, TrainState, Trainer, composite,
};
use looptrain_proto::spec::{self, Objective};
use looptrain_proto::{Spec, Step};
use looptrain_worker::bench::{BareStep, FixedSteps};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::cli::Kernels;

/// All steps of the spec on the same slots; the first `warm_up` do not count for the sections.
pub(super) fn steps(
    spec: &Spec,
    threads: usize,
    kernels: Kernels,
    slots: &[SlotBatch],
    warm_up: usize,
) -> Result<FixedSteps> {
    let settings = StageSettings::from(&spec.stages[0]);
    let mut engine = Engine::new(&spec.model, threads);
    engine.set_recompute(recompute(spec));
    let lanes = match kernels {
        Kernels::Fused => Vec::new(),
        Kernels::Composite => lanes(threads, slots.len())?,
    };
    let mut state = TrainState::initial(&spec.model, spec.run.seed);
    engine.load(&state.weights);
    let mut steps = Vec::new();
    for index in 0..spec.total_steps().0 as usize {
        if index == warm_up {
            let _warm_up = engine.take_sections();
        }
        let start = Instant::now();
        let sum = Sum::default();
        match kernels {
            Kernels::Fused => {
                let add = |_, output| {
                    if let Some(gradient) = sum.add(output) {
                        engine.recycle(gradient);
                    }
                };
                engine.gradients(&settings, slots, &AtomicBool::new(false), &add);
            }
            Kernels::Composite => in_lanes(&lanes, slots, &|slot| {
                let (model, device) = (&spec.model, Device::flex());
                sum.add(composite::gradient(model, &state.weights, &settings, slot, &device));
            }),
        }
        let computed = Instant::now();
        let (gradient, loss) = sum.mean(slots.len());
        let prepared = Instant::now();
        let rate = spec.learning_rate(state.step.next());
        engine.update(&mut state, &gradient, &spec.optimizer, Objective::Language, rate);
        engine.load(&state.weights);
        engine.recycle(gradient);
        steps.push(BareStep {
            compute: computed - start,
            prepare: prepared - computed,
            update: prepared.elapsed(),
            loss,
        });
    }
    Ok(FixedSteps { steps, sections: engine.take_sections(), device_bytes: None })
}

/// The same on a device, which the gradient never leaves, and one step more for the sections.
pub(super) fn steps_on_device(
    spec: &Spec,
    mut trainer: Trainer,
    slots: &[SlotBatch],
) -> Result<FixedSteps> {
    let settings = StageSettings::from(&spec.stages[0]);
    trainer.set_recompute(recompute(spec));
    trainer.adopt(TrainState::initial(&spec.model, spec.run.seed))?;
    let mut steps = Vec::new();
    let total = spec.total_steps().0 as usize;
    for index in 0..=total {
        trainer.measure(index == total);
        let start = Instant::now();
        let rate = spec.learning_rate(Step(index.min(total - 1) as u64 + 1));
        let loss = trainer.step_on_device(&settings, slots, &spec.optimizer, rate)?;
        let step = BareStep {
            compute: start.elapsed(),
            prepare: Duration::ZERO,
            update: Duration::ZERO,
            loss: loss.context("the CPU has other steps")?,
        };
        if index < total {
            steps.push(step);
        }
    }
    let (sections, device_bytes) = (trainer.take_sections(), trainer.device_bytes());
    Ok(FixedSteps { steps, sections, device_bytes })
}

fn recompute(spec: &Spec) -> Recompute {
    match spec.compute.recompute {
        spec::Recompute::Loop => Recompute::Loop,
        spec::Recompute::Layer => Recompute::Layer,
        spec::Recompute::None | spec::Recompute::Auto => Recompute::None,
    }
}

/// The gradients and losses of slots, added up.
#[derive(Default)]
struct Sum(Mutex<(Option<Vec<f32>>, f64)>);

impl Sum {
    /// Gives the gradient back, unless it is the first and the others are added to it.
    fn add(&self, output: SlotOutput) -> Option<Vec<f32>> {
        let mut added = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (sum, loss) = &mut *added;
        *loss += output.statistics.loss;
        match sum {
            Some(sum) => {
                sum.iter_mut().zip(&output.gradient).for_each(|(sum, value)| *sum += value);
                Some(output.gradient)
            }
            None => {
                *sum = Some(output.gradient);
                None
            }
        }
    }

    fn mean(self, slots: usize) -> (Vec<f32>, f64) {
        let (sum, loss) = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut gradient = sum.unwrap_or_default();
        if slots > 1 {
            let share = 1.0 / slots as f32;
            gradient.iter_mut().for_each(|value| *value *= share);
        }
        (gradient, loss / slots as f64)
    }
}

/// Pools for slots side by side, as the engine has them.
fn lanes(threads: usize, slots: usize) -> Result<Vec<ThreadPool>> {
    let count = threads.min(slots);
    let pool = |lane| {
        let threads = threads / count + usize::from(lane < threads % count);
        ThreadPoolBuilder::new().num_threads(threads).build()
    };
    (0..count)
        .map(pool)
        .collect::<Result<_, _>>()
        .context("cannot start threads; use fewer --threads")
}

fn in_lanes(lanes: &[ThreadPool], slots: &[SlotBatch], work: &(dyn Fn(&SlotBatch) + Sync)) {
    std::thread::scope(|scope| {
        for (first, lane) in lanes.iter().enumerate() {
            let own = slots.iter().skip(first).step_by(lanes.len());
            scope.spawn(move || lane.install(|| own.for_each(work)));
        }
    });
}
