//! The kernels as the CPU runs them, beside the model on the CPU in f32.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use looptrain_proto::spec::{self, Objective};

use super::CudaEngine;
use super::driver::{Address, DeviceError, Driver, Mark};
use super::emulator::Emulator;
use super::engine::DeviceSums;
use super::kernels::{NAMES, Sizes, Target};
use super::memory::{Memory, Places, Purpose, SlotSizes, Workspace};
use super::slot::{Buffers, Task};
use crate::optimizer::StepSize;
use crate::{
    Engine, Layout, Recompute, SlotBatch, SlotOutput, SlotStatistics, StageSettings, TrainState,
    stage_two,
};

const SETTINGS: StageSettings = StageSettings {
    loops: 3,
    entropy_weight: 0.05,
    rope_base: 1e4,
    objective: Objective::Language,
};

/// Over three warps.
const VOCAB: usize = 264;

fn model(head_dim: usize) -> spec::Model {
    spec::Model {
        hidden_size: 2 * head_dim,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 56,
        vocab_size: VOCAB,
        rms_norm_eps: 1e-6,
        // Wide enough for every part to matter.
        initializer_range: 0.5 / (2.0 * head_dim as f64).sqrt(),
    }
}

fn batch(sequences: usize, sequence_length: usize) -> SlotBatch {
    let count = sequences * (sequence_length + 1);
    let tokens = (0..count).map(|i| ((i * 7 + i * i) % VOCAB) as u32).collect();
    SlotBatch { tokens, sequences, sequence_length, ..SlotBatch::default() }
}

fn emulated(model: &spec::Model) -> (CudaEngine, Arc<Emulator>) {
    emulated_as(model, true)
}

/// As on a device that has groups of warps, or not.
fn emulated_as(model: &spec::Model, has_warp_groups: bool) -> (CudaEngine, Arc<Emulator>) {
    let sizes = Sizes::of(model).expect("sizes that the kernels take");
    let emulator = Arc::new(Emulator::of(Target::new(sizes, has_warp_groups)));
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
    engine
        .parts(Objective::Language, 2)
        .into_iter()
        .try_for_each(|part| engine.add_part(sums, first, part))?;
    engine.fault()
}

fn slot(
    engine: &CudaEngine,
    settings: &StageSettings,
    recompute: Recompute,
    batch: &SlotBatch,
    trained: Range<usize>,
) -> SlotOutput {
    engine.clear(settings.objective).expect("zeros");
    let mut gradient = vec![f32::NAN; trained.len()];
    let mut end = trained.end;
    let queued = engine.queue_slot(settings, recompute, batch, &mut |(from, mark)| {
        // What is final must be so now, not only at the end.
        let to = &mut gradient[from - trained.start..end - trained.start];
        engine.read_gradient(mark, from..end, to).expect("a gradient");
        end = from;
    });
    let statistics = queued.and_then(|queued| queued.statistics()).expect("a slot");
    assert_eq!(end, trained.start, "all becomes final");
    let mut whole = vec![f32::NAN; trained.len()];
    let all = engine.read(0..0, [&mut [], &mut [], &mut []]);
    all.expect("nothing");
    engine.read_gradient(Mark(0), trained, &mut whole).expect("a gradient");
    assert!(whole == gradient, "what was final did not change");
    SlotOutput { gradient, statistics }
}

fn on_the_cpu(
    model: &spec::Model,
    settings: &StageSettings,
    state: &TrainState,
    batch: &SlotBatch,
) -> SlotOutput {
    let mut engine = Engine::new(model, 2);
    engine.load(&state.weights);
    let found = Mutex::new(None);
    let one = std::slice::from_ref(batch);
    engine.gradients(settings, one, &AtomicBool::new(false), &|_, output| {
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
fn compare(head_dim: usize, batch: &SlotBatch) {
    compare_as(head_dim, true, batch);
}

fn compare_as(head_dim: usize, has_warp_groups: bool, batch: &SlotBatch) {
    // Long sequences take the emulator long.
    let num_hidden_layers = if batch.sequence_length <= 150 { 3 } else { 1 };
    let model = spec::Model { num_hidden_layers, ..model(head_dim) };
    let state = TrainState::initial(&model, 5);
    let (engine, emulator) = emulated_as(&model, has_warp_groups);
    engine.put(&state).expect("weights");
    let layout = Layout::new(&model);
    let all = layout.trained(Objective::Language);
    let found = slot(&engine, &SETTINGS, Recompute::None, batch, all.clone());
    let exact = on_the_cpu(&model, &SETTINGS, &state, batch);
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
        let again = slot(&engine, &SETTINGS, recompute, batch, all.clone());
        assert!(again == found, "{recompute:?} has other bits");
    }
    compare_gate(&engine, &model, &state, batch);
    engine.norm(Objective::Language).expect("a norm");
    let settings = spec::Optimizer::default();
    let size = StepSize { settings: &settings, step: state.step.next(), learning_rate: 1e-2 };
    engine.update(&size, Objective::Language, 1.0, 1.0).expect("an update");
    for sums in [
        DeviceSums::Exact { scale: 2f64.powi(40), limit: 1e3 },
        DeviceSums::Fast { limit: f32::MAX },
        DeviceSums::Narrow { limit: f32::MAX },
    ] {
        assert_eq!(add_to_sums(&engine, sums, true).expect("sums"), None);
        engine.settle(sums, Objective::Language, 1.0).expect("means");
    }
    let unused: Vec<_> = {
        let launched = emulator.launched.lock().expect("no panic");
        NAMES.into_iter().filter(|name| !launched.contains(name)).collect()
    };
    assert!(unused.is_empty(), "never launched: {unused:?}");
}

/// A slot that trains the gate alone.
fn compare_gate(engine: &CudaEngine, model: &spec::Model, state: &TrainState, batch: &SlotBatch) {
    let settings = StageSettings { objective: Objective::ExitGate, ..SETTINGS };
    let trained = Layout::new(model).trained(Objective::ExitGate);
    let found = slot(engine, &settings, Recompute::None, batch, trained.clone());
    let exact = on_the_cpu(model, &settings, state, batch);
    assert_near(&found.statistics, &exact.statistics);
    assert!(found.statistics.gradient_norm_per_loop.iter().all(|norm| *norm == 0.0));
    // The label of a loop that helps a little is steep in losses that are rounded.
    let apart = distance(&found.gradient, &exact.gradient);
    assert!(apart < 0.2, "the gate's gradient is {apart} apart");
    let again = slot(engine, &settings, Recompute::Layer, batch, trained);
    assert!(again == found, "nothing is computed again");
}

#[test]
fn the_loss_of_the_second_stage_and_its_gradient_are_those_in_double_precision() {
    let model = model(16);
    let (loops, tokens, d) = (4, 300, model.hidden_size);
    let model_sizes = Sizes::of(&model).expect("sizes that the kernels take");
    let driver: Arc<dyn Driver> = Arc::new(Emulator::new(&model_sizes));
    let purpose = Purpose::Gradient(Objective::ExitGate);
    let recompute = Recompute::None;
    let sizes = SlotSizes { sequences: 3, length: 100, loops, layers: 3, recompute, purpose };
    let work = Workspace::new(&driver, sizes, &model_sizes).expect("memory");
    let gradient = Memory::new(&driver, (d + 1) * size_of::<f32>()).expect("memory");
    driver.zero(gradient.base, (d + 1) * size_of::<f32>()).expect("zeros");

    let value = |at: usize, by: f32| ((at * 7 + at / tokens) as f32 * by).sin();
    let losses: Vec<f32> = (0..loops * tokens).map(|at| 3.0 + 0.1 * value(at, 1.7)).collect();
    let gates: Vec<f32> = (0..loops * tokens).map(|at| 40.0 * value(at, 0.3).powi(5)).collect();
    // As bf16 has them.
    let states: Vec<u16> =
        (0..loops * tokens * d).map(|at| (value(at, 0.9).to_bits() >> 16) as u16).collect();
    driver.upload(work.losses, bytemuck::cast_slice(&losses)).expect("losses");
    driver.upload(work.gate_logits, bytemuck::cast_slice(&gates)).expect("gates");
    driver.upload(work.states, bytemuck::cast_slice(&states)).expect("states");
    let mut places = Places::new(&Layout::new(&model), model.num_hidden_layers);
    (places.exit_weight, places.exit_bias) = (0, d);
    let none = Address::NONE;
    let buffers = Buffers { weights: none, narrow: none, gradient: gradient.base };
    let (driver, model) = (&*driver, &model_sizes);
    let task = Task { driver, model, places: &places, buffers, work: &work, eps: 1e-6 };
    task.gate_backward().expect("a gradient");

    let exact = stage_two(&losses, &gates, loops);
    let mut dgates = vec![0f32; loops * tokens];
    driver.download(Mark(0), work.dgate_logits, bytemuck::cast_slice_mut(&mut dgates)).expect("it");
    for (found, exact) in dgates.iter().zip(&exact.dgates) {
        assert!((found - exact).abs() <= 1e-6 * exact.abs() + 1e-12, "{found} against {exact}");
    }
    let width = 3 + 2 * loops;
    let mut sums = vec![0f64; tokens.div_ceil(Workspace::EXIT_THREADS) * width];
    driver.download(Mark(0), work.sums, bytemuck::cast_slice_mut(&mut sums)).expect("sums");
    let mean = |at: usize| sums.chunks(width).map(|row| row[at]).sum::<f64>() / tokens as f64;
    let SlotStatistics { loss, entropy, loss_per_loop, exit_pdf, .. } = exact.statistics;
    let means: Vec<f64> =
        [loss, entropy].into_iter().chain(loss_per_loop).chain(exit_pdf).collect();
    for (at, exact) in [0, 1].into_iter().chain(3..width).zip(means) {
        assert!((mean(at) - exact).abs() < 1e-12, "{at}: {} against {exact}", mean(at));
    }
    let mut found = vec![0f32; d + 1];
    driver.download(Mark(0), gradient.base, bytemuck::cast_slice_mut(&mut found)).expect("it");
    let wide = |state: u16| f64::from(f32::from_bits(u32::from(state) << 16));
    for (column, found) in found.iter().enumerate() {
        let of_row = |(row, dgate): (usize, &f32)| {
            f64::from(*dgate) * if column < d { wide(states[row * d + column]) } else { 1.0 }
        };
        let sum: f64 = exact.dgates.iter().enumerate().map(of_row).sum();
        assert!((f64::from(*found) - sum).abs() < 1e-7, "{column}: {found} against {sum}");
    }
}

#[test]
fn heads_of_16_in_one_block() {
    compare(16, &batch(2, 40));
}

#[test]
fn heads_of_32_in_several_blocks() {
    compare(32, &batch(1, 150));
}

/// Sequences of 300 tokens, the first one of several documents.
fn documents(sequences: usize) -> SlotBatch {
    let batch = batch(sequences, 300);
    // The first sequence in documents that end within tiles, with them, and blocks after they began.
    let starts =
        |at: usize| [0, 20, 64, 65, 250].into_iter().rfind(|&start| start <= at).unwrap_or(0);
    let starts =
        (0..300 * sequences).map(|at| if at < 300 { starts(at) as u32 } else { 0 }).collect();
    SlotBatch { starts, ..batch }
}

#[test]
fn documents_that_do_not_see_each_other_over_several_blocks() {
    compare(16, &documents(2));
}

#[test]
fn heads_of_64_in_several_blocks_of_groups_of_warps() {
    compare(64, &documents(1));
}

#[test]
fn heads_of_128_in_several_blocks_of_groups_of_warps() {
    compare(128, &documents(1));
}

#[test]
fn heads_of_128_by_warps_alone() {
    compare_as(128, false, &batch(1, 200));
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
            engine.put_gradient(Objective::Language, slot).expect("a gradient");
            assert_eq!(add_to_sums(&engine, sums, number == 0).expect("sums"), None);
        }
        let objective = Objective::Language;
        let digest = engine.settle(sums, objective, slots.len() as f64).expect("means");
        let mut means = vec![0f32; parameters];
        engine.gradient(0..parameters, &mut means).expect("means");
        (digest, means)
    };
    // Whole numbers up to 255, of which bf16 holds all bits.
    let narrow = DeviceSums::Narrow { limit: 1e3 };
    let small: Vec<f32> = (0..parameters).map(|i| (i * 7 % 256) as f32).collect();
    let (digest, means) = sum(narrow, std::slice::from_ref(&small));
    assert!(means == small);
    let mut changed = small.clone();
    changed[parameters / 3] += 1.0;
    assert_ne!(sum(narrow, &[changed]).0, digest);
    let (tie, above) = (256.0 + 1.0, 256.0 + 3.0);
    let (_, means) =
        sum(narrow, &[vec![tie, above].into_iter().cycle().take(parameters).collect()]);
    assert_eq!(means[..2], [256.0, 260.0], "to the even one");

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
        let limit = 100.0;
        for sums in [exact, DeviceSums::Fast { limit }, DeviceSums::Narrow { limit }] {
            engine.put_gradient(Objective::Language, &changed[0]).expect("a gradient");
            let found = add_to_sums(&engine, sums, true).expect("a place");
            assert_eq!(found, Some((place, -500.0)));
        }
    }
}

#[test]
fn an_update_is_that_of_the_cpu() {
    for objective in [Objective::Language, Objective::ExitGate] {
        an_update_of(objective);
    }
}

fn an_update_of(objective: Objective) {
    let model = model(32);
    let mut state = TrainState::initial(&model, 5);
    let (engine, _) = emulated(&model);
    let layout = Layout::new(&model);
    let parameters = layout.parameters();
    let trained = layout.trained(objective);
    let begin = state.clone();
    let reference = Engine::new(&model, 1);
    let settings = spec::Optimizer { clip_norm: 0.5, ..spec::Optimizer::default() };
    engine.put(&state).expect("weights");
    for round in 0..3 {
        let value = |i: usize| ((i * 37 + round * 11) % 101) as f32 / 5e3 - 0.01;
        let gradient: Vec<f32> = trained.clone().map(value).collect();
        engine.put_gradient(objective, &gradient).expect("a gradient");
        let norm = engine.norm(objective).expect("a norm");
        let size = StepSize { settings: &settings, step: state.step.next(), learning_rate: 1e-2 };
        engine.update(&size, objective, norm, 1.0).expect("an update");
        let exact = reference.update(&mut state, &gradient, &settings, objective, 1e-2);
        assert!((norm - exact).abs() < 1e-9 * exact, "{norm} against {exact}");
    }
    let mut found = [(); 3].map(|()| vec![0f32; parameters]);
    let [weights, first, second] = &mut found;
    engine.read(0..parameters, [weights, first, second]).expect("a state");
    let exact = [&state.weights, &state.first_moment, &state.second_moment];
    for (found, exact) in found.iter().zip(exact) {
        let apart = distance(&found[trained.clone()], &exact[trained.clone()]);
        assert!(apart < 1e-6, "{apart}");
    }
    let [weights, first, second] = &found;
    let untouched = |of: &[f32], then: &[f32]| {
        of[..trained.start] == then[..trained.start] && of[trained.end..] == then[trained.end..]
    };
    assert!(untouched(weights, &begin.weights));
    assert!(untouched(first, &begin.first_moment) && untouched(second, &begin.second_moment));
}
