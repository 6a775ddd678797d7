#![allow(clippy::unwrap_used)]

use looptrain_model::Device;
use looptrain_proto::spec::{Objective, Spikes};
use tokio::sync::mpsc;

use super::*;
use crate::testing::tiny_spec;

fn bench_of(spec: Spec, threads: usize, moments: Moments) -> Bench {
    let trainer = Trainer::new(Device::Cpu, &spec.model, threads).unwrap();
    Bench::new(Arc::new(spec), trainer, None, Shelf::default(), moments)
}

fn bench(threads: usize) -> Bench {
    let mut bench = bench_of(tiny_spec("memory://"), threads, Moments::default());
    bench.initialise().unwrap();
    bench
}

fn batches(slots: std::ops::Range<u32>) -> Vec<Slot> {
    let batch = |slot: u32| SlotBatch {
        tokens: (0..18).map(|place| (slot * 31 + place * 7) % 300).collect(),
        sequences: 2,
        sequence_length: 8,
        starts: Vec::new(),
    };
    let slot = |slot: u32| Slot {
        batch: batch(slot),
        sequences: vec![(0, 2 * u64::from(slot)), (0, 2 * u64::from(slot) + 1)],
    };
    slots.map(slot).collect()
}

/// A contribution, and its sums.
fn contributed(
    bench: &mut Bench,
    step: u64,
    first_slot: u32,
    given: Vec<Slot>,
    cancelled: &AtomicBool,
) -> Result<(Contribution, Sums), ComputeError> {
    contributed_by(bench, Route::Host, step, first_slot, given, cancelled)
}

/// The same by a route.
fn contributed_by(
    bench: &mut Bench,
    route: Route,
    step: u64,
    first_slot: u32,
    given: Vec<Slot>,
    cancelled: &AtomicBool,
) -> Result<(Contribution, Sums), ComputeError> {
    let (sender, ready) = mpsc::unbounded_channel();
    let contribution = bench.contribute(Step(step), first_slot, given, route, cancelled, &sender);
    let sums = Sums::from_ready(ready);
    assert_eq!(contribution.is_ok(), sums.is_some(), "the last bucket is a sign of success");
    Ok((contribution?, sums.unwrap()))
}

/// The same of a rank that goes on.
fn given(bench: &mut Bench, first_slot: u32, given: Vec<Slot>) -> (Contribution, Sums) {
    contributed(bench, 1, first_slot, given, &AtomicBool::new(false)).unwrap()
}

fn refused(bench: &mut Bench, step: u64, slot: u32) -> String {
    let on = AtomicBool::new(false);
    contributed(bench, step, slot, batches(slot..slot + 1), &on).unwrap_err().to_string()
}

fn share(bench: &mut Bench, step: u64, slots: std::ops::Range<u32>) -> Sums {
    let on = AtomicBool::new(false);
    contributed(bench, step, slots.start, batches(slots), &on).unwrap().1
}

fn added(a: &[i64], b: &[i64]) -> Vec<i64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// What a ring of two ranks makes of their sums.
fn reduced(a: Sums, b: Sums) -> Sums {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut ranks = crate::testing::ring(2).await;
        let [first, second] = ranks.as_mut_slice() else { panic!() };
        let done = tokio::join!(first.all_reduce(1, a), second.all_reduce(1, b));
        let (a, b) = (done.0.unwrap().sums, done.1.unwrap().sums);
        assert!(a == b);
        a
    })
}

#[test]
fn the_shares_of_any_split_add_up_to_the_same_bits() {
    let whole = share(&mut bench(2), 1, 0..4);
    for cut in 0..=4 {
        let (left, right) = (share(&mut bench(1), 1, 0..cut), share(&mut bench(2), 1, cut..4));
        assert!(reduced(left, right) == whole, "cut at {cut}");
    }
}

#[test]
fn a_gradient_of_several_buckets_has_the_same_bits_for_any_split_and_threads() {
    let mut spec = tiny_spec("memory://");
    spec.model.vocab_size = 90_000;
    let bench = |threads| {
        let mut bench = bench_of(spec.clone(), threads, Moments::default());
        bench.initialise().unwrap();
        bench
    };
    let whole = share(&mut bench(2), 1, 0..4);
    assert!(whole.clone().into_buckets().len() > 2);
    for (cut, threads) in [(0, 1), (1, 3), (2, 2)] {
        let left = share(&mut bench(threads), 1, 0..cut);
        let right = share(&mut bench(1), 1, cut..4);
        assert!(reduced(left, right) == whole, "cut at {cut}");
    }
}

#[test]
fn a_retry_with_other_slots_reuses_what_is_there_and_gives_the_same_bits() {
    let mut bench = bench(1);
    let fresh = share(&mut bench, 1, 1..4);
    share(&mut bench, 1, 0..2);
    assert_eq!(bench.kept.outputs.len(), 4);
    assert!(share(&mut bench, 1, 1..4) == fresh);
}

#[test]
fn what_a_slot_was_computed_from_is_told_also_when_its_gradient_is_of_an_earlier_try() {
    let mut spec = tiny_spec("memory://");
    spec.run.audit = true;
    let mut bench = bench_of(spec, 1, Moments::default());
    bench.initialise().unwrap();
    let first = given(&mut bench, 1, batches(1..3)).0;
    let told = |used: &SlotUse| (used.slot, used.sequences.iter().map(|(_, at)| *at).collect());
    let expected = |slots: std::ops::Range<u32>| -> Vec<(u32, Vec<u64>)> {
        slots.map(|slot| (slot, vec![2 * u64::from(slot), 2 * u64::from(slot) + 1])).collect()
    };
    assert_eq!(first.used.iter().map(told).collect::<Vec<_>>(), expected(1..3));
    // Given something else for the slots whose gradients are there, it tells of what they are of.
    let mut others = batches(0..4);
    others[1].sequences = vec![(0, 98), (0, 99)];
    others[1].batch.tokens[3] ^= 1;
    let second = given(&mut bench, 0, others).0;
    assert_eq!(second.computed, 2);
    assert_eq!(second.used.iter().map(told).collect::<Vec<_>>(), expected(0..4));
    assert_eq!(second.used[1..3], first.used);
    assert_eq!(share_used(&mut self::bench(1)), [], "nobody asked");
}

#[test]
fn what_is_kept_of_an_abandoned_step_tells_what_it_was_computed_from() {
    let mut spec = tiny_spec("memory://");
    spec.run.audit = true;
    let cancelled = Arc::new(AtomicBool::new(false));
    let after_the_first = Arc::clone(&cancelled);
    let moments = Moments::watched_by(move |_| after_the_first.store(true, Ordering::Relaxed));
    let mut bench = bench_of(spec, 1, moments);
    bench.initialise().unwrap();
    let abandoned = contributed(&mut bench, 1, 0, batches(0..4), &cancelled);
    assert!(matches!(abandoned, Err(ComputeError::Cancelled)));
    assert_eq!(bench.kept.outputs.len(), 1);
    cancelled.store(false, Ordering::Relaxed);
    let again = given(&mut bench, 0, batches(0..1)).0;
    assert_eq!((again.computed, again.used.len()), (0, 1));
}

fn share_used(bench: &mut Bench) -> Vec<SlotUse> {
    given(bench, 0, batches(0..2)).0.used
}

#[test]
fn an_update_waits_for_its_commit_and_leads_to_the_next_step() {
    let mut bench = bench(1);
    let before = bench.weights_digest(Step(0)).unwrap();
    let sums = share(&mut bench, 1, 0..4);
    let expected = sums.settle(1.0, &mut vec![0.0; sums.shape().0]);
    let report = bench.prepare(Step(1), sums, None).unwrap();
    assert_eq!(report.digest, expected);
    assert!(report.statistics.loss > 1.0 && report.statistics.grad_norm > 0.0);
    let exits: f64 = report.statistics.exit_pdf.iter().sum();
    assert!((exits - 1.0).abs() < 1e-5, "{exits}");
    assert_eq!(bench.weights_digest(Step(0)).unwrap(), before);

    bench.commit(Step(1)).unwrap();
    assert_eq!(bench.held(), Some(Step(1)));
    assert_ne!(bench.weights_digest(Step(1)).unwrap(), before);
    assert!(bench.kept.outputs.is_empty(), "old slots must not meet new weights");
}

#[test]
fn training_on_the_same_slots_lowers_the_loss() {
    let mut bench = bench(2);
    let mut losses = Vec::new();
    for step in 1..=4 {
        let sums = share(&mut bench, step, 0..4);
        losses.push(bench.prepare(Step(step), sums, None).unwrap().statistics.loss);
        bench.commit(Step(step)).unwrap();
    }
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{losses:?}");
}

#[test]
fn a_generation_at_the_prepared_step_commits_it_and_one_before_it_does_not() {
    let mut bench = bench(1);
    let sums = share(&mut bench, 1, 0..4);
    bench.prepare(Step(1), sums, None).unwrap();
    assert!(bench.reach(Step(0)).unwrap());
    assert_eq!(bench.held(), Some(Step(0)));
    assert!(bench.reach(Step(1)).unwrap());
    assert_eq!(bench.held(), Some(Step(1)));
    assert!(!bench.reach(Step(3)).unwrap(), "a state further on has to come from elsewhere");
}

#[test]
fn what_does_not_follow_the_held_step_is_refused() {
    let mut bench = bench(1);
    let text = refused(&mut bench, 3, 0);
    assert_eq!(text, "this worker holds the state of step 0, so it cannot compute step 3");
    assert!(bench.commit(Step(1)).is_err());
    assert!(bench.snapshot(Step(2), 0, 1).is_err());
    assert!(refused(&mut bench, 0, 0).contains("cannot compute step 0"));
    let short = Sums::zeroed(Arithmetic::new(Reduction::Exact, 40, 4), 3, 7, None);
    assert!(matches!(bench.prepare(Step(1), short, None), Err(ComputeError::Shape { .. })));
}

#[test]
fn a_cancelled_share_is_given_up() {
    let mut bench = bench(1);
    let result = contributed(&mut bench, 1, 0, batches(0..4), &AtomicBool::new(true));
    assert!(matches!(result, Err(ComputeError::Cancelled)));
}

#[test]
fn a_number_that_is_none_is_traced_to_its_slot() {
    let mut bench = bench(1);
    let mut state = TrainState::initial(&bench.spec.model, 7);
    state.weights.fill(f32::NAN);
    bench.adopt(state).unwrap();
    let text = refused(&mut bench, 1, 2);
    assert!(
        text.starts_with("the loss is NaN at step 1, slot 2, sequences 4 to 5 of stage"),
        "{text}"
    );
}

#[test]
fn an_evaluation_does_not_depend_on_how_it_is_shared_out() {
    let on = AtomicBool::new(false);
    let all: Vec<SlotBatch> = batches(0..5).into_iter().map(|slot| slot.batch).collect();
    let (whole, tokens) = bench(2).evaluate(Step(0), &all, &on).unwrap();
    let (left, some) = bench(1).evaluate(Step(0), &all[..2], &on).unwrap();
    let (right, others) = bench(1).evaluate(Step(0), &all[2..], &on).unwrap();
    assert_eq!(added(&left, &right), whole);
    assert_eq!((some + others, tokens), (80, 80));
    let (nothing, none) = bench(1).evaluate(Step(0), &[], &on).unwrap();
    assert!(nothing.iter().all(|sum| *sum == 0) && none == 0);
}

/// A bench of a run that skips steps, and batches of which slot 2 has a token that the model's
/// weights turn into NaN.
fn skipping(threads: usize, reduction: Reduction) -> (Bench, Vec<Slot>) {
    let mut spec = tiny_spec("memory://");
    spec.optimizer.non_finite = NonFinite::Skip;
    spec.cluster.reduction = reduction;
    let mut bench = bench_of(spec, threads, Moments::default());
    let mut state = TrainState::initial(&bench.spec.model, 7);
    let tensors = bench.layout.tensors().iter();
    let embedding = tensors.clone().find(|tensor| tensor.name.contains("embed_tokens")).unwrap();
    let embedding = embedding.range();
    let poison = embedding.len() / 300 * 299;
    state.weights[embedding][poison] = f32::NAN;
    bench.adopt(state).unwrap();
    let mut batches = batches(0..4);
    batches.iter_mut().flat_map(|slot| &mut slot.batch.tokens).for_each(|token| *token %= 299);
    batches[2].batch.tokens[0] = 299;
    (bench, batches)
}

#[test]
fn a_step_with_a_bad_slot_is_the_same_for_every_split_and_changes_nothing_but_the_step() {
    // Fast ones, too: what is left of a skipped step is statistics.
    for reduction in [Reduction::Exact, Reduction::Fast, Reduction::FastBf16] {
        a_bad_slot_changes_nothing_but_the_step(reduction);
    }
}

fn a_bad_slot_changes_nothing_but_the_step(reduction: Reduction) {
    let (mut whole, batches) = skipping(2, reduction);
    let (all, sums) = given(&mut whole, 0, batches.clone());
    assert!(all.detail.contains("step 1, slot 2"), "{}", all.detail);
    let report = whole.prepare(Step(1), sums, None).unwrap();
    assert_eq!((report.statistics.bad_slots, report.statistics.grad_norm), (1, 0.0));
    assert!(report.statistics.loss.is_finite(), "the mean over the other slots");
    for cut in 0..=4 {
        let (mut left, mut right) = (skipping(1, reduction).0, skipping(1, reduction).0);
        let (a, a_sums) = given(&mut left, 0, batches[..cut].to_vec());
        let (_, b_sums) = given(&mut right, cut as u32, batches[cut..].to_vec());
        assert_eq!(a.detail.is_empty(), cut <= 2);
        let split = left.prepare(Step(1), reduced(a_sums, b_sums), None).unwrap();
        assert_eq!(split.digest, report.digest, "cut at {cut}");
        // A retry, all of it kept from the first try.
        let (again, _) = given(&mut left, 0, batches[..cut].to_vec());
        assert_eq!((again.computed, again.detail), (0, a.detail));
    }
    let before = whole.trainer.state().unwrap().into_owned();
    whole.commit(Step(1)).unwrap();
    let after = whole.trainer.state().unwrap().into_owned();
    assert_eq!(after.step, Step(1));
    let bits = |state: &TrainState| -> Vec<u32> {
        let buffers = [&state.weights, &state.first_moment, &state.second_moment];
        buffers.into_iter().flatten().map(|value| value.to_bits()).collect()
    };
    assert!(bits(&after) == bits(&before));
}

fn fast(threads: usize) -> Bench {
    let mut spec = tiny_spec("memory://");
    spec.cluster.reduction = Reduction::Fast;
    let mut bench = bench_of(spec, threads, Moments::default());
    bench.initialise().unwrap();
    bench
}

/// The reduced gradient that waits in memory.
fn here(bench: &Bench) -> &[f32] {
    match &bench.prepared.as_ref().unwrap().gradient {
        Gradient::Here(gradient) => gradient,
        Gradient::OnDevice(_) => panic!("the gradient is on the device"),
    }
}

#[test]
fn a_fast_step_is_the_exact_one_but_for_rounding_and_its_statistics_are_exact() {
    let mut exact = bench(1);
    let sums = share(&mut exact, 1, 0..4);
    let expected = exact.prepare(Step(1), sums, None).unwrap().statistics;
    let gradient = here(&exact);
    let scale = gradient.iter().fold(0f32, |most, value| most.max(value.abs()));
    for cut in 0..=4 {
        let (mut left, mut right) = (fast(1), fast(2));
        let (a, b) = (share(&mut left, 1, 0..cut), share(&mut right, 1, cut..4));
        let sums = reduced(a, b);
        let one = left.prepare(Step(1), sums.clone(), None).unwrap();
        let other = right.prepare(Step(1), sums, None).unwrap();
        assert_eq!((one.digest, &one.statistics), (other.digest, &other.statistics));
        let norm = one.statistics.grad_norm;
        assert!((norm / expected.grad_norm - 1.0).abs() < 1e-5, "{norm}");
        let others = StepStatistics { grad_norm: expected.grad_norm, ..one.statistics };
        assert_eq!(others, expected, "cut at {cut}");
        let found = here(&left);
        assert!(found.iter().zip(gradient).all(|(a, b)| (a - b).abs() <= 1e-6 * scale));
        left.commit(Step(1)).unwrap();
        right.commit(Step(1)).unwrap();
        let digest = |bench: &Bench| bench.weights_digest(Step(1)).unwrap();
        assert_eq!(digest(&left), digest(&right));
    }
}

#[test]
fn a_fast_update_that_was_not_committed_is_forgotten_for_its_step_may_come_out_otherwise() {
    let (mut exact, mut fast) = (bench(1), fast(1));
    for bench in [&mut exact, &mut fast] {
        let sums = share(bench, 1, 0..4);
        bench.prepare(Step(1), sums, None).unwrap();
        assert!(bench.reach(Step(0)).unwrap());
    }
    assert_eq!((exact.prepared(), fast.prepared()), (Some(Step(1)), None));
    let sums = share(&mut fast, 1, 0..4);
    fast.prepare(Step(1), sums, None).unwrap();
    assert!(fast.reach(Step(1)).unwrap() && fast.held() == Some(Step(1)));
}

#[test]
fn a_fast_gradient_that_is_no_number_is_traced_to_its_slot() {
    let mut bench = fast(1);
    let mut state = TrainState::initial(&bench.spec.model, 7);
    state.weights.fill(f32::NAN);
    bench.adopt(state).unwrap();
    let text = refused(&mut bench, 1, 2);
    assert!(text.starts_with("the loss is NaN at step 1, slot 2, sequences 4 to 5"), "{text}");
}

/// A bench on the GPU's kernels.
fn on_device(reduction: Reduction) -> Bench {
    on_device_for(reduction, Objective::Language)
}

fn on_device_for(reduction: Reduction, objective: Objective) -> Bench {
    let mut spec = tiny_spec("memory://");
    spec.cluster.reduction = reduction;
    spec.stages[0].objective = objective;
    (spec.model.hidden_size, spec.model.intermediate_size) = (32, 40);
    spec.model.vocab_size = 304;
    let trainer = Trainer::new(Device::Emulated, &spec.model, 2).unwrap();
    Bench::new(Arc::new(spec), trainer, None, Shelf::default(), Moments::default())
}

#[test]
fn on_a_device_any_split_and_any_new_start_lead_to_the_same_bits() {
    let mut whole = on_device(Reduction::Exact);
    whole.initialise().unwrap();
    let mut ranks = [(); 2].map(|()| on_device(Reduction::Exact));
    ranks.iter_mut().for_each(|rank| rank.initialise().unwrap());
    for step in 1..=3 {
        let [left, right] = &mut ranks;
        let cut = step as u32;
        let all = share(&mut whole, step, 0..4);
        let (a, b) = (share(left, step, 0..cut), share(right, step, cut..4));
        let both = reduced(a, b);
        assert!(both == all, "cut at {cut}");
        for bench in [&mut whole, left, right] {
            bench.prepare(Step(step), both.clone(), None).unwrap();
            bench.commit(Step(step)).unwrap();
        }
        // One rank is lost, and another takes its place with the state of those that are left.
        let state = left.trainer.state().unwrap().into_owned();
        assert_eq!(state.step, Step(step));
        *right = on_device(Reduction::Exact);
        right.adopt(state).unwrap();
        let digests = [&whole, left, right].map(|bench| bench.weights_digest(Step(step)).unwrap());
        assert!(digests[0] == digests[1] && digests[1] == digests[2]);
    }
    let evaluated =
        whole.evaluate(Step(3), &[batches(0..1).remove(0).batch], &AtomicBool::new(false));
    assert_eq!(evaluated.unwrap().1, 16);
}

/// The sums of a rank that is alone with its device, where they stay.
fn alone(bench: &mut Bench, step: u64, slots: Vec<Slot>) -> Result<Sums, ComputeError> {
    let on = AtomicBool::new(false);
    let sums = contributed_by(bench, Route::Stay, step, 0, slots, &on)?.1;
    assert!(sums.is_beside_device());
    Ok(sums)
}

#[test]
fn alone_with_its_device_a_rank_comes_to_the_bits_of_ranks_that_are_not() {
    let mut host = on_device(Reduction::Exact);
    let mut device = on_device(Reduction::Exact);
    host.initialise().unwrap();
    device.initialise().unwrap();
    device.offer(Step(0)).unwrap();
    for step in 1..=2 {
        let sums = share(&mut host, step, 0..4);
        let expected = host.prepare(Step(step), sums, None).unwrap();
        let sums = alone(&mut device, step, batches(0..4)).unwrap();
        let report = device.prepare(Step(step), sums, None).unwrap();
        let rounded = |mut statistics: StepStatistics| {
            // Summed in another order.
            statistics.grad_norm = (statistics.grad_norm * 1e6).round();
            statistics
        };
        assert_eq!(rounded(report.statistics), rounded(expected.statistics));
        // A try that is done again leads to the same.
        let again = alone(&mut device, step, batches(0..4)).unwrap();
        assert_eq!(device.prepared(), None, "its place was needed");
        assert_eq!(device.prepare(Step(step), again, None).unwrap().digest, report.digest);
        host.commit(Step(step)).unwrap();
        device.commit(Step(step)).unwrap();
        let digests = [&host, &device].map(|bench| bench.weights_digest(Step(step)).unwrap());
        assert_eq!(digests[0], digests[1], "step {step}");
    }
}

#[test]
fn where_the_gate_alone_is_trained_its_gradient_is_all_that_travels() {
    let gate = || on_device_for(Reduction::Exact, Objective::ExitGate);
    let on_cpu = || {
        let mut spec = tiny_spec("memory://");
        spec.stages[0].objective = Objective::ExitGate;
        bench_of(spec, 2, Moments::default())
    };
    for new in [&gate as &dyn Fn() -> Bench, &on_cpu] {
        let [mut whole, mut left, mut right] = [(); 3].map(|()| new());
        for bench in [&mut whole, &mut left, &mut right] {
            bench.initialise().unwrap();
        }
        let begin = whole.trainer.state().unwrap().into_owned();
        let trained = whole.layout.trained(Objective::ExitGate);
        for step in 1..=2 {
            let all = share(&mut whole, step, 0..4);
            assert_eq!(all.shape().0, trained.len());
            let (a, b) = (share(&mut left, step, 0..1), share(&mut right, step, 1..4));
            let both = reduced(a, b);
            assert!(both == all, "step {step}");
            for bench in [&mut whole, &mut left] {
                bench.prepare(Step(step), both.clone(), None).unwrap();
                bench.commit(Step(step)).unwrap();
            }
            // Those who join follow by what was reduced.
            let mut update = vec![0.0; trained.len()];
            both.mean(4.0, &mut update);
            right.update(Step(step), update).unwrap();
            let digests =
                [&whole, &left, &right].map(|bench| bench.weights_digest(Step(step)).unwrap());
            assert!(digests[0] == digests[1] && digests[1] == digests[2]);
        }
        let end = whole.trainer.state().unwrap();
        assert_ne!(end.weights[trained.clone()], begin.weights[trained.clone()]);
        assert_eq!(end.weights[..trained.start], begin.weights[..trained.start]);
        assert_eq!(end.weights[trained.end..], begin.weights[trained.end..]);
    }
    // On a device that is alone, and where the sums go to other devices.
    for reduction in [Reduction::Exact, Reduction::Fast] {
        let mut host = on_device_for(reduction, Objective::ExitGate);
        let mut device = on_device_for(reduction, Objective::ExitGate);
        host.initialise().unwrap();
        device.initialise().unwrap();
        let sums = share(&mut host, 1, 0..4);
        let expected = host.prepare(Step(1), sums, None).unwrap().statistics;
        let sums = alone(&mut device, 1, batches(0..4)).unwrap();
        let found = device.prepare(Step(1), sums, None).unwrap().statistics;
        assert!((found.grad_norm / expected.grad_norm - 1.0).abs() < 1e-5);
        host.commit(Step(1)).unwrap();
        device.commit(Step(1)).unwrap();
        let digests = [&host, &device].map(|bench| bench.weights_digest(Step(1)).unwrap());
        assert!(reduction == Reduction::Fast || digests[0] == digests[1]);
    }
}

#[test]
fn where_the_gate_alone_is_trained_its_bad_gradient_is_named() {
    let mut bench = on_device_for(Reduction::Exact, Objective::ExitGate);
    let mut spec = Spec::clone(&bench.spec);
    // There is room for 512.
    spec.cluster.fraction_bits = 52;
    bench.spec = Arc::new(spec);
    let mut state = TrainState::initial(&bench.spec.model, 7);
    // Large states, which leave the losses where they are.
    let gate = "model.early_exit_gate.weight";
    for (name, value) in [("model.norm.weight", 1e6), ("lm_head.weight", 0.0), (gate, 0.0)] {
        let tensor = bench.layout.tensors().iter().find(|tensor| tensor.name == name).unwrap();
        state.weights[tensor.range()].fill(value);
    }
    bench.adopt(state).unwrap();
    for route in [Route::Host, Route::Stay] {
        let on = AtomicBool::new(false);
        let error = contributed_by(&mut bench, route, 1, 0, batches(0..4), &on).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("the gradient of {gate}, element")), "{text}");
    }
}

#[test]
fn what_waits_on_a_device_is_given_up_when_another_try_takes_its_place() {
    for again in [Route::Stay, Route::Host] {
        let mut bench = on_device(Reduction::Exact);
        bench.initialise().unwrap();
        let sums = alone(&mut bench, 1, batches(0..4)).unwrap();
        bench.prepare(Step(1), sums, None).unwrap();
        assert_eq!(bench.prepared(), Some(Step(1)));
        // A try that ends before it has sums of its own.
        let at_once = AtomicBool::new(true);
        let slots = batches(0..4);
        contributed_by(&mut bench, again, 1, 0, slots, &at_once).unwrap_err();
        assert_eq!(bench.prepared(), None);
        assert!(!bench.reach(Step(1)).unwrap());
    }
}

#[test]
fn alone_with_its_device_a_fast_step_is_the_exact_one_but_for_rounding() {
    a_fast_step_is_near(Reduction::Fast, 1e-5, 1);
    // Of eight bits.
    a_fast_step_is_near(Reduction::FastBf16, 1e-2, 10);
}

/// The norm to that relative error, and so many weights of a thousand elsewhere.
fn a_fast_step_is_near(reduction: Reduction, error: f64, elsewhere: usize) {
    let [mut exact, mut fast] = [Reduction::Exact, reduction].map(on_device);
    let mut statistics = Vec::new();
    for bench in [&mut exact, &mut fast] {
        bench.initialise().unwrap();
        let sums = alone(bench, 1, batches(0..4)).unwrap();
        statistics.push(bench.prepare(Step(1), sums, None).unwrap().statistics);
        bench.commit(Step(1)).unwrap();
    }
    let norm = statistics[1].grad_norm;
    assert!((norm / statistics[0].grad_norm - 1.0).abs() < error, "{norm}");
    let weights = [&exact, &fast].map(|bench| bench.trainer.weights().unwrap());
    // Adam divides by a gradient's magnitude: where that is next to nothing, rounding shows.
    let far = weights[0].iter().zip(&*weights[1]).filter(|(a, b)| (*a - *b).abs() > 1e-4).count();
    assert!(far * 1000 < elsewhere * weights[0].len(), "{far} weights are elsewhere");
}

#[test]
fn alone_with_its_device_a_bad_slot_is_named_and_skipped() {
    for reduction in [Reduction::Exact, Reduction::Fast, Reduction::FastBf16] {
        let mut bench = on_device(reduction);
        let mut state = TrainState::initial(&bench.spec.model, 7);
        // A row of the embedding that only slot 2 has.
        let poison = 32 * 303;
        state.weights[poison] = f32::NAN;
        let mut slots = batches(0..4);
        slots[2].batch.tokens[0] = 303;
        bench.adopt(state.clone()).unwrap();
        let error = alone(&mut bench, 1, slots.clone()).unwrap_err().to_string();
        assert!(error.starts_with("the loss is NaN at step 1, slot 2"), "{error}");
        let mut spec = Spec::clone(&bench.spec);
        spec.optimizer.non_finite = NonFinite::Skip;
        bench.spec = Arc::new(spec);
        let sums = alone(&mut bench, 1, slots).unwrap();
        let report = bench.prepare(Step(1), sums, None).unwrap();
        assert_eq!((report.statistics.bad_slots, report.statistics.grad_norm), (1, 0.0));
        bench.commit(Step(1)).unwrap();
        let after = bench.trainer.state().unwrap();
        assert_eq!(after.step, Step(1));
        assert!(after.weights[1..poison] == state.weights[1..poison]);
        assert!(after.first_moment.iter().all(|value| *value == 0.0));
    }
}

#[test]
fn on_a_device_a_slot_without_numbers_is_named_as_on_the_cpu() {
    let mut bench = on_device(Reduction::Exact);
    let mut state = TrainState::initial(&bench.spec.model, 7);
    state.weights.fill(f32::NAN);
    bench.adopt(state).unwrap();
    let text = refused(&mut bench, 1, 2);
    assert!(text.starts_with("the loss is NaN at step 1, slot 2, sequences 4 to 5"), "{text}");
}

/// A bench under a guard that judges after two steps, and a trend of two steps far below what a first step
/// has.
fn guarded(mut bench: Bench, action: OnSpike) -> (Bench, Trend) {
    let mut spec = Spec::clone(&bench.spec);
    spec.optimizer.spikes = Some(Spikes { action, window: 4, ..Spikes::default() });
    bench.spec = Arc::new(spec);
    let figures = |mean: f64| (mean, 1e-4);
    let (loss_mean, loss_variance) = figures(1.0);
    let (grad_norm_mean, grad_norm_variance) = figures(1e-3);
    let trend =
        Trend { stage: 0, steps: 2, loss_mean, loss_variance, grad_norm_mean, grad_norm_variance };
    (bench, trend)
}

/// Prepares and commits step 1, whose loss is a spike; what was reported, and the weights before and
/// after.
fn spiking(bench: Bench, action: OnSpike, alone_on_device: bool) -> (Report, [Vec<f32>; 2]) {
    let (mut bench, trend) = guarded(bench, action);
    let weights = |bench: &Bench| bench.trainer.weights().unwrap().into_owned();
    let before = weights(&bench);
    let sums = match alone_on_device {
        true => alone(&mut bench, 1, batches(0..4)).unwrap(),
        false => share(&mut bench, 1, 0..4),
    };
    let report = bench.prepare(Step(1), sums, Some(trend)).unwrap();
    bench.commit(Step(1)).unwrap();
    assert_eq!(bench.held(), Some(Step(1)));
    (report, [before, weights(&bench)])
}

#[test]
fn a_spike_is_told_with_the_slot_at_fault_and_changes_nothing_where_it_is_skipped() {
    let (report, [before, after]) = spiking(bench(2), OnSpike::Skip, false);
    assert!(before == after);
    let said = &report.statistics.spike;
    assert!(said.starts_with("loss ") && said.contains("gradient norm "), "{said}");
    assert!(report.detail.starts_with("step 1, slot "), "{}", report.detail);
    assert!(report.detail.contains("has the loss "), "{}", report.detail);
    let trend = report.statistics.trend.unwrap();
    // It counts as no more than the bound, which is 1 and six deviations of 0.01.
    assert!(trend.steps == 3 && trend.loss_mean < 1.03, "{trend:?}");

    let mut device = on_device(Reduction::Exact);
    device.initialise().unwrap();
    let (on_device, [before, after]) = spiking(device, OnSpike::Skip, true);
    assert!(before == after);
    assert!(on_device.statistics.spike.starts_with("loss "), "{}", on_device.statistics.spike);

    // Whether it is committed is for the coordinator to say, where the run is to stop.
    let (stopping, [before, after]) = spiking(bench(1), OnSpike::Stop, false);
    assert!(before != after);
    assert_eq!(stopping.statistics, report.statistics);
    assert_eq!(stopping.digest, report.digest, "the digest is that of what was summed");
}

#[test]
fn a_usual_step_moves_the_trend_and_the_weights() {
    let (mut bench, _) = guarded(bench(1), OnSpike::Skip);
    let before = bench.weights_digest(Step(0)).unwrap();
    let sums = share(&mut bench, 1, 0..4);
    let report = bench.prepare(Step(1), sums, None).unwrap();
    let (trend, loss) = (report.statistics.trend.unwrap(), report.statistics.loss);
    assert_eq!((trend.steps, trend.loss_mean, report.statistics.spike.as_str()), (1, loss, ""));
    bench.commit(Step(1)).unwrap();
    assert_ne!(bench.weights_digest(Step(1)).unwrap(), before);
}
