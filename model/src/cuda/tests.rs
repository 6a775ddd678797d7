//! The kernels as the CPU runs them, beside the model on the CPU in f32.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use looptrain_proto::spec::{self, Objective};

use super::CudaEngine;
use super::driver::{DeviceError, Driver};
use super::emulator::Emulator;
use super::engine::DeviceSums;
use super::kernels::{NAMES, Sizes};
use crate::optimizer::StepSize;
use crate::{
    Engine, Layout, Recompute, SlotBatch, SlotOutput, SlotStatistics, StageSettings, TrainState,
};

const SETTINGS: StageSettings = StageSettings {
    loops: 3,
    entropy_weight: 0.05,
    rope_base: 1e4,
    objective: Objective::Language,
};

fn model(head_dim: usize) -> spec::Model {
    spec::Model {
        hidden_size: 2 * head_dim,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 56,
        vocab_size: 88,
        rms_norm_eps: 1e-6,
        // Wide enough for every part to matter.
        initializer_range: 0.5 / (2.0 * head_dim as f64).sqrt(),
    }
}

fn batch(sequences: usize, sequence_length: usize) -> SlotBatch {
    let count = sequences * (sequence_length + 1);
    let tokens = (0..count).map(|i| ((i * 7 + i * i) % 88) as u32).collect();
    SlotBatch { tokens, sequences, sequence_length, ..SlotBatch::default() }
}

fn emulated(model: &spec::Model) -> (CudaEngine, Arc<Emulator>) {
    let sizes = Sizes::of(model).expect("sizes that the kernels take");
    let emulator = Arc::new(Emulator::new(&sizes));
    let driver: Arc<dyn Driver> = emulator.clone();
    (CudaEngine::new(driver, model, sizes).expect("memory"), emulator)
}

/// Adds the gradient of a slot, in two parts; gives the first element that has no place there.
fn add_to_sums(
    engine: &CudaEngine,
    sums: DeviceSums,
    first: bool,
) -> Result<Option<(usize, f32)>, DeviceError> {
    engine.begin_adding()?;
    engine.parts(2).into_iter().try_for_each(|part| engine.add_part(sums, first, part))?;
    engine.fault()
}

fn slot(
    engine: &CudaEngine,
    recompute: Recompute,
    batch: &SlotBatch,
    parameters: usize,
) -> SlotOutput {
    engine.clear().expect("zeros");
    let mut gradient = vec![f32::NAN; parameters];
    let mut end = parameters;
    let queued = engine.queue_slot(&SETTINGS, recompute, batch, &mut |(from, mark)| {
        // What is final must be so now, not only at the end.
        engine.read_gradient(mark, from..end, &mut gradient[from..end]).expect("a gradient");
        end = from;
    });
    let statistics = queued.and_then(|queued| queued.statistics()).expect("a slot");
    assert_eq!(end, 0, "all becomes final");
    let mut whole = vec![f32::NAN; parameters];
    let all = engine.read(0..0, [&mut [], &mut [], &mut []]);
    all.expect("nothing");
    engine.read_gradient(super::driver::Mark(0), 0..parameters, &mut whole).expect("a gradient");
    assert!(whole == gradient, "what was final did not change");
    SlotOutput { gradient, statistics }
}

fn on_the_cpu(model: &spec::Model, state: &TrainState, batch: &SlotBatch) -> SlotOutput {
    let mut engine = Engine::new(model, 2);
    engine.load(&state.weights);
    let found = Mutex::new(None);
    let one = std::slice::from_ref(batch);
    engine.gradients(&SETTINGS, one, &AtomicBool::new(false), &|_, output| {
        *found.lock().expect("no panic") = Some(output);
    });
    found.into_inner().expect("no panic").expect("a slot")
}

/// `|found - exact| / |exact|`.
fn distance(found: &[f32], exact: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let pairs = found.iter().zip(exact);
    let apart = norm(&mut pairs.map(|(a, b)| f64::from(*a) - f64::from(*b)));
    apart / norm(&mut exact.iter().map(|x| f64::from(*x)))
}

fn assert_near(found: &SlotStatistics, exact: &SlotStatistics) {
    let all = |of: &SlotStatistics| {
        let mut values = vec![of.loss, of.entropy];
        values.extend(of.loss_per_loop.iter().chain(&of.exit_pdf).chain(&of.hidden_rms_per_loop));
        values
    };
    for (found, exact) in all(found).into_iter().zip(all(exact)) {
        assert!((found - exact).abs() < 1e-2 * exact.abs().max(0.1), "{found} against {exact}");
    }
}

fn assert_loops_near(found: &SlotStatistics, exact: &SlotStatistics) {
    let pairs = found.gradient_norm_per_loop.iter().zip(&exact.gradient_norm_per_loop);
    for (found, exact) in pairs {
        assert!((found - exact).abs() < 0.04 * exact, "{found} against {exact}");
    }
    // Few tokens are so near to another one that rounding changes which is the likeliest.
    for (found, exact) in found.agreement_per_loop.iter().zip(&exact.agreement_per_loop) {
        assert!((found - exact).abs() < 0.1, "{found} against {exact}");
    }
    assert_eq!(found.agreement_per_loop.last(), Some(&1.0));
    assert!(exact.agreement_per_loop[0] < 0.9, "loops differ in what they say");
}

/// Against f32 on the CPU, within what bf16 rounds.
fn compare(head_dim: usize, sequences: usize, length: usize) {
    compare_batch(head_dim, &batch(sequences, length));
}

fn compare_batch(head_dim: usize, batch: &SlotBatch) {
    let model = model(head_dim);
    let state = TrainState::initial(&model, 5);
    let (engine, emulator) = emulated(&model);
    engine.put(&state).expect("weights");
    let layout = Layout::new(&model);
    let found = slot(&engine, Recompute::None, batch, layout.parameters());
    let exact = on_the_cpu(&model, &state, batch);
    assert_near(&found.statistics, &exact.statistics);
    assert_loops_near(&found.statistics, &exact.statistics);
    for tensor in layout.tensors() {
        let apart = distance(&found.gradient[tensor.range()], &exact.gradient[tensor.range()]);
        // The gate's gradient is a sum of numbers that nearly cancel each other.
        let limit = match tensor.name.contains("exit_gate") {
            true if tensor.len == 1 => 0.5,
            true => 0.08,
            false => 0.04,
        };
        assert!(apart < limit, "{} is {apart} apart", tensor.name);
    }
    assert_near(&engine.evaluate(&SETTINGS, batch).expect("losses"), &found.statistics);
    for recompute in [Recompute::Loop, Recompute::Layer] {
        let again = slot(&engine, recompute, batch, layout.parameters());
        assert!(again == found, "{recompute:?} has other bits");
    }
    engine.norm().expect("a norm");
    let settings = spec::Optimizer::default();
    let size = StepSize { settings: &settings, step: state.step.next(), learning_rate: 1e-2 };
    engine.update(&size, 1.0, 1.0).expect("an update");
    for sums in [
        DeviceSums::Exact { scale: 2f64.powi(40), limit: 1e3 },
        DeviceSums::Fast { limit: f32::MAX },
    ] {
        assert_eq!(add_to_sums(&engine, sums, true).expect("sums"), None);
        engine.settle(sums, 1.0).expect("means");
    }
    let unused: Vec<_> = {
        let launched = emulator.launched.lock().expect("no panic");
        NAMES.into_iter().filter(|name| !launched.contains(name)).collect()
    };
    assert!(unused.is_empty(), "never launched: {unused:?}");
}

#[test]
fn heads_of_16_in_one_block() {
    compare(16, 2, 40);
}

#[test]
fn heads_of_32_in_several_blocks() {
    compare(32, 1, 150);
}

#[test]
fn documents_that_do_not_see_each_other_over_several_blocks() {
    let batch = batch(2, 300);
    // The first sequence in documents that end within tiles, with them, and blocks after they began.
    let starts =
        |at: usize| [0, 20, 64, 65, 250].into_iter().rfind(|&start| start <= at).unwrap_or(0);
    let starts = (0..600).map(|at| if at < 300 { starts(at) as u32 } else { 0 }).collect();
    compare_batch(16, &SlotBatch { starts, ..batch });
}

#[test]
fn heads_of_128_in_two_blocks() {
    compare(128, 1, 70);
}

#[test]
fn sums_name_the_first_value_without_a_place_and_every_bit_shows_in_their_digest() {
    let model = model(16);
    let (engine, _) = emulated(&model);
    let parameters = Layout::new(&model).parameters();
    let values = |slot: usize| -> Vec<f32> {
        (0..parameters).map(|i| ((i * 7 + slot * 31) % 1009) as f32 / 64.0 - 5.0).collect()
    };
    let exact = DeviceSums::Exact { scale: 2f64.powi(20), limit: 100.0 };
    let sum = |sums, slots: &[Vec<f32>]| {
        for (number, slot) in slots.iter().enumerate() {
            engine.put_gradient(slot).expect("a gradient");
            assert_eq!(add_to_sums(&engine, sums, number == 0).expect("sums"), None);
        }
        let digest = engine.settle(sums, slots.len() as f64).expect("means");
        let mut means = vec![0f32; parameters];
        engine.gradient(0..parameters, &mut means).expect("means");
        (digest, means)
    };
    let (slots, turned) = ([values(0), values(1)], [values(1), values(0)]);
    let (digest, means) = sum(exact, &slots);
    let expected = slots[0].iter().zip(&slots[1]).map(|(a, b)| (a + b) / 2.0);
    assert!(means.iter().copied().eq(expected));
    assert_eq!(sum(exact, &turned).0, digest, "the order does not matter");
    for place in [0, 1, parameters / 2, parameters - 1] {
        let mut changed = slots.clone();
        changed[0][place] += 1.0 / 64.0;
        assert_ne!(sum(exact, &changed).0, digest, "{place}");
        changed[0][place] = -500.0;
        for sums in [exact, DeviceSums::Fast { limit: 100.0 }] {
            engine.put_gradient(&changed[0]).expect("a gradient");
            let found = add_to_sums(&engine, sums, true).expect("a place");
            assert_eq!(found, Some((place, -500.0)));
        }
    }
}

#[test]
fn an_update_is_that_of_the_cpu() {
    let model = model(32);
    let mut state = TrainState::initial(&model, 5);
    let (engine, _) = emulated(&model);
    let layout = Layout::new(&model);
    let parameters = layout.parameters();
    let reference = Engine::new(&model, 1);
    let settings = spec::Optimizer { clip_norm: 0.5, ..spec::Optimizer::default() };
    engine.put(&state).expect("weights");
    for round in 0..3 {
        let gradient: Vec<f32> =
            (0..parameters).map(|i| ((i * 37 + round * 11) % 101) as f32 / 5e3 - 0.01).collect();
        engine.put_gradient(&gradient).expect("a gradient");
        let norm = engine.norm().expect("a norm");
        let size = StepSize { settings: &settings, step: state.step.next(), learning_rate: 1e-2 };
        engine.update(&size, norm, 1.0).expect("an update");
        let exact = reference.update(&mut state, &gradient, &settings, Objective::Language, 1e-2);
        assert!((norm - exact).abs() < 1e-9 * exact, "{norm} against {exact}");
    }
    let mut found = [(); 3].map(|()| vec![0f32; parameters]);
    let [weights, first, second] = &mut found;
    engine.read(0..parameters, [weights, first, second]).expect("a state");
    let exact = [&state.weights, &state.first_moment, &state.second_moment];
    for (found, exact) in found.iter().zip(exact) {
        assert!(distance(found, exact) < 1e-6, "{}", distance(found, exact));
    }
}
