//! What the compute thread owns, and its jobs: plain blocking functions.
//!
//! Invariants: the prepared update, if there is one, leads from the held step to the next; kept slot outputs belong to that next step and the
//! held weights.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[cfg(feature = "cuda")]
use looptrain_model::Exchange;
use looptrain_model::{
    DeviceError, Layout, Recompute, SlotBatch, SlotOutput, SlotStatistics, StageSettings,
    SummedSlot, TrainState, Trainer,
};
use looptrain_proto::spec::{NonFinite, OnSpike, Reduction};
use looptrain_proto::v1::{StepStatistics, Trend};
use looptrain_proto::{Digest, Spec, Step, spec};
use looptrain_storage::SlotUse;
use tokio::sync::mpsc::UnboundedSender;

use super::gather::Gathering;
use super::{recompute, sums};
use crate::audit;
use crate::data::Slot;
use crate::reduce::{Arithmetic, Bucket, OutOfRange, Route, Sums};
use crate::state::{self, Part};
use crate::transfer::Shelf;
use crate::{Moment, Moments};

/// Bytes of slot gradients that are kept for a retry of their step.
pub(super) const KEPT_BYTES: usize = 512 << 20;

/// Why a job has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ComputeError {
    #[error("the computation was abandoned")]
    Cancelled,
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{what} is {value} at {place}: {remedy}")]
    NotFinite { place: String, what: String, value: f64, remedy: String },
    #[error("this worker holds {}, so it cannot {action} step {step}", describe(*held))]
    WrongStep { held: Option<Step>, action: &'static str, step: Step },
    #[error("the reduced buffer of step {step} has the shape {found:?} instead of {expected:?}")]
    Shape { step: Step, found: (usize, usize), expected: (usize, usize) },
}

fn describe(held: Option<Step>) -> String {
    held.map_or_else(|| "no state".into(), |step| format!("the state of step {step}"))
}

/// This rank's share of a step, beside the sums to be reduced.
#[derive(Debug)]
pub(crate) struct Contribution {
    /// Time it took.
    pub(crate) seconds: f64,
    /// Slots that were computed; the others were kept from an earlier try.
    pub(crate) computed: usize,
    /// What keeps the step from being applied, under a spec that skips such steps.
    pub(crate) detail: String,
    /// What the slots were computed from, now or in an earlier try, in an audited run.
    pub(crate) used: Vec<SlotUse>,
}

/// What is reported of a reduced step.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) digest: Digest,
    pub(crate) statistics: StepStatistics,
    /// This rank's part in a spike.
    pub(crate) detail: String,
    /// Time the update before this step took.
    pub(crate) optimizer_seconds: f64,
}

/// A reduced gradient that waits for its commit; filled with NaN, which no reduced sum has, it
/// stands for a step that is skipped, here and wherever updates go.
struct Prepared {
    step: Step,
    gradient: Gradient,
}

/// Where a reduced gradient is.
enum Gradient {
    Here(Vec<f32>),
    /// With the state; its norm.
    OnDevice(f64),
}

/// Slot outputs of one step, so that a retry with other slots computes only what is new.
#[derive(Default)]
struct Kept {
    step: Step,
    outputs: BTreeMap<u32, SlotOutput>,
    /// What they were computed from, and others that there was no room or no time for.
    used: BTreeMap<u32, SlotUse>,
}

/// Everything behind the compute thread.
pub(crate) struct Bench {
    spec: Arc<Spec>,
    layout: Layout,
    trainer: Trainer,
    /// What backward computes again, of each stage.
    recompute: Vec<Recompute>,
    prepared: Option<Prepared>,
    kept: Kept,
    /// Of this rank's slots in the step that is computed, the one with the highest loss, and that.
    worst: Option<(f64, u32)>,
    /// The buffer of the last step, to be used again.
    spare: Option<Sums>,
    optimizer_seconds: f64,
    /// What joiners may fetch.
    shelf: Shelf,
    moments: Moments,
}

impl Bench {
    pub(super) fn new(
        spec: Arc<Spec>,
        trainer: Trainer,
        memory: Option<u64>,
        shelf: Shelf,
        moments: Moments,
    ) -> Self {
        Self {
            layout: Layout::new(&spec.model),
            recompute: recompute::of_stages(&spec, &trainer, memory),
            trainer,
            prepared: None,
            kept: Kept::default(),
            worst: None,
            spare: None,
            optimizer_seconds: 0.0,
            shelf,
            moments,
            spec,
        }
    }

    /// The time that went into each section of the engine since the last call, added up over threads.
    pub(crate) fn take_sections(&self) -> Vec<(&'static str, Duration)> {
        self.trainer.take_sections()
    }

    /// See [`Trainer::exchange`].
    #[cfg(feature = "cuda")]
    pub(crate) fn exchange(&self, words: usize) -> Result<Option<Exchange>, DeviceError> {
        self.trainer.exchange(words)
    }

    /// See [`Trainer::measure`].
    pub(crate) fn measure(&self, on: bool) {
        self.trainer.measure(on);
    }

    /// See [`Trainer::device_bytes`].
    pub(crate) fn device_bytes(&self) -> Option<u64> {
        self.trainer.device_bytes()
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The committed step whose state is here.
    pub(crate) fn held(&self) -> Option<Step> {
        self.trainer.held()
    }

    /// The step whose reduced gradient waits for its commit.
    pub(crate) fn prepared(&self) -> Option<Step> {
        self.prepared.as_ref().map(|prepared| prepared.step)
    }

    /// Checks that the held state is what `action` on `step` needs.
    fn must_hold(
        &self,
        needed: Option<Step>,
        action: &'static str,
        step: Step,
    ) -> Result<(), ComputeError> {
        let held = self.held();
        match held.is_some() && held == needed {
            true => Ok(()),
            false => Err(ComputeError::WrongStep { held, action, step }),
        }
    }

    /// Takes the initial state of the run's seed.
    pub(crate) fn initialise(&mut self) -> Result<(), ComputeError> {
        self.adopt(TrainState::initial(&self.spec.model, self.spec.run.seed))
    }

    /// Takes a state from elsewhere; whatever was prepared on another one is forgotten.
    pub(crate) fn adopt(&mut self, state: TrainState) -> Result<(), ComputeError> {
        self.prepared = None;
        self.kept = Kept::default();
        self.shelf.clear();
        Ok(self.trainer.adopt(state)?)
    }

    /// Puts a copy of the held state where joiners can fetch it; the updates of later commits
    /// follow.
    pub(crate) fn offer(&self, step: Step) -> Result<(), ComputeError> {
        self.must_hold(Some(step), "offer", step)?;
        self.shelf.put(self.trainer.state()?.into_owned());
        Ok(())
    }

    /// Nobody fetches the state any more, or anything.
    pub(crate) fn withdraw(&self, keep_updates: bool) {
        if keep_updates {
            self.shelf.keep_updates();
        } else {
            self.shelf.clear();
        }
    }

    /// Digest of the held weights.
    pub(crate) fn weights_digest(&self, step: Step) -> Result<Digest, ComputeError> {
        self.must_hold(Some(step), "vouch for", step)?;
        Ok(state::digest(&self.layout, &self.trainer.weights()?))
    }

    /// Whether the committed state of `step` is here; a prepared update that leads to it is
    /// applied, for a new generation at that step means that it was committed. One that leads further
    /// was not, and its step is done again: exact sums come out the same, fast ones may not, so
    /// that nobody must take this update for theirs.
    pub(crate) fn reach(&mut self, step: Step) -> Result<bool, ComputeError> {
        if self.prepared.as_ref().is_some_and(|prepared| prepared.step == step) {
            tracing::info!(%step, "committing the prepared step that the new generation starts from");
            return self.commit(step).map(|()| true);
        }
        if self.spec.cluster.reduction != Reduction::Exact {
            self.prepared = None;
        }
        Ok(self.held() == Some(step))
    }

    /// Sums the gradients and statistics of some slots of the step after the held one. Each bucket of
    /// the sums goes to `ready` when it is complete, while the last slots are still under way; the
    /// last bucket does when this returns a contribution, and only then. What is summed on a device stays
    /// there if the route is not by the host.
    pub(crate) fn contribute(
        &mut self,
        step: Step,
        first_slot: u32,
        given: Vec<Slot>,
        route: Route,
        cancelled: &AtomicBool,
        ready: &UnboundedSender<Bucket>,
    ) -> Result<Contribution, ComputeError> {
        // What waits on the device is about to be written over.
        self.prepared =
            self.prepared.take().filter(|old| matches!(old.gradient, Gradient::Here(_)));
        if route != Route::Host && self.trainer.can_sum() {
            return self.contribute_on_device(step, first_slot, given, route, cancelled, ready);
        }
        let start = Instant::now();
        self.must_hold(step.0.checked_sub(1).map(Step), "compute", step)?;
        let number = self.spec.stage_of(step);
        let stage = &self.spec.stages[number];
        self.trainer.set_recompute(self.recompute[number]);
        let elements = self.layout.trained(stage.objective).len();
        if self.kept.step != step {
            self.kept = Kept { step, ..Kept::default() };
        }
        let room = KEPT_BYTES / (elements * size_of::<f32>()).max(1);

        let (arithmetic, beside) = (arithmetic(&self.spec, stage), sums::tail_len(stage.loops));
        let sums = Sums::zeroed(arithmetic, elements, beside, self.spare.take());
        let gathering = self.trainer.run(|| Gathering::new(sums, given.len(), ready));
        let notes = Mutex::default();
        let (spec, layout) = (&self.spec, &self.layout);
        let adding = Adding { spec, layout, step, stage, first_slot, notes: &notes };
        let (mut places, mut missing) = (Vec::new(), Vec::new());
        let all = first_slot..first_slot + given.len() as u32;
        let mut used = Vec::new();
        for (place, given) in given.into_iter().enumerate() {
            let slot = first_slot + place as u32;
            match self.kept.outputs.get(&slot) {
                Some(output) => self.trainer.run(|| adding.take(&gathering, place, output))?,
                None => {
                    if self.spec.run.audit {
                        used.push(audit::use_of(&self.spec, slot, &given));
                    }
                    places.push(place);
                    missing.push(given.batch);
                }
            }
        }
        // Before they are computed: what is kept of a step that is abandoned tells of itself, too.
        self.kept.used.extend(used.into_iter().map(|used| (used.slot, used)));
        if !missing.is_empty() {
            let shared = Mutex::new((&mut self.kept.outputs, Ok(()), 0));
            let computed = self.trainer.gradients_as_final(
                &StageSettings::from(stage),
                &missing,
                cancelled,
                &|index, gradient, from| gathering.add(places[index], gradient, from),
                &|index, output| {
                    self.moments.at(Moment::Compute(step));
                    let added = adding.take(&gathering, places[index], &output);
                    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    let (kept, result, done) = &mut *shared;
                    if let Err(error) = added {
                        // The step is lost; the slots not yet begun need not be computed.
                        *result = Err(error);
                        cancelled.store(true, Ordering::Relaxed);
                    }
                    if kept.len() < room {
                        kept.insert(first_slot + places[index] as u32, output);
                    } else {
                        self.trainer.recycle(output.gradient);
                    }
                    *done += 1;
                },
            );
            let (_, result, done) = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
            result?;
            computed?;
            if done < missing.len() {
                return Err(ComputeError::Cancelled);
            }
        }
        let used = all.filter_map(|slot| self.kept.used.get(&slot).cloned()).collect();
        let detail;
        (self.worst, detail) = told(notes);
        let seconds = start.elapsed().as_secs_f64();
        Ok(Contribution { seconds, computed: missing.len(), detail, used })
    }

    /// The same where all stays on the device. Nothing is kept for a retry: a step that is done again
    /// computes all of its slots.
    fn contribute_on_device(
        &mut self,
        step: Step,
        first_slot: u32,
        given: Vec<Slot>,
        route: Route,
        cancelled: &AtomicBool,
        ready: &UnboundedSender<Bucket>,
    ) -> Result<Contribution, ComputeError> {
        let start = Instant::now();
        self.must_hold(step.0.checked_sub(1).map(Step), "compute", step)?;
        let number = self.spec.stage_of(step);
        let stage = &self.spec.stages[number];
        self.trainer.set_recompute(self.recompute[number]);
        let used = match self.spec.run.audit {
            true => {
                (first_slot..).zip(&given).map(|(n, s)| audit::use_of(&self.spec, n, s)).collect()
            }
            false => Vec::new(),
        };
        let arithmetic = arithmetic(&self.spec, stage);
        let elements = self.layout.trained(stage.objective).len();
        let beside = sums::tail_len(stage.loops);
        let parts = match route {
            Route::Device => Sums::buckets(arithmetic, elements),
            Route::Stay | Route::Host => 1,
        };
        let mut integers = vec![0; beside];
        let sums = Sums::beside_device(arithmetic, elements, beside, parts);
        let mut buckets = sums.into_buckets().into_iter();
        // The last one waits for the integers.
        let mut last = None;
        let notes = Mutex::default();
        let (spec, layout) = (&self.spec, &self.layout);
        let adding = Adding { spec, layout, step, stage, first_slot, notes: &notes };
        let batches: Vec<SlotBatch> = given.into_iter().map(|slot| slot.batch).collect();
        let (mut done, mut result) = (0, Ok(()));
        self.trainer.sum_slots(
            &StageSettings::from(stage),
            &batches,
            (Sums::on_device(arithmetic, batches.len() as u32), parts),
            cancelled,
            &mut |span| match buckets.next() {
                // When nobody reduces any more, the step is abandoned.
                Some(bucket) if buckets.len() > 0 => drop(ready.send(bucket.on_device(vec![span]))),
                bucket => last = bucket.map(|bucket| (bucket, span)),
            },
            &mut |SummedSlot { slot: place, statistics, outside }| {
                self.moments.at(Moment::Compute(step));
                let outside = outside.map(|(index, value)| OutOfRange { index, value });
                let added = outside.map_or(Ok(()), Err);
                result = adding.take_note(place, &statistics, added, |change| {
                    change(&mut integers);
                });
                done += 1;
                result.is_ok()
            },
        )?;
        result?;
        if done < batches.len() {
            return Err(ComputeError::Cancelled);
        }
        let (mut bucket, span) = last.expect("the sums of all slots have a last part");
        bucket.integers_mut().copy_from_slice(&integers);
        let spans = match route {
            Route::Device => vec![span, self.trainer.put_integers(&integers)?],
            Route::Stay | Route::Host => Vec::new(),
        };
        let _ = ready.send(bucket.on_device(spans));
        let detail;
        (self.worst, detail) = told(notes);
        let seconds = start.elapsed().as_secs_f64();
        Ok(Contribution { seconds, computed: done, detail, used })
    }

    /// Takes the reduced buffer of the step after the held one; the update waits for its commit. `trend` is
    /// that of the steps before, for a guard against spikes.
    pub(crate) fn prepare(
        &mut self,
        step: Step,
        mut reduced: Sums,
        trend: Option<Trend>,
    ) -> Result<Report, ComputeError> {
        self.must_hold(step.0.checked_sub(1).map(Step), "prepare", step)?;
        let stage = &self.spec.stages[self.spec.stage_of(step)];
        let elements = self.layout.trained(stage.objective).len();
        let (found, expected) = (reduced.shape(), (elements, sums::tail_len(stage.loops)));
        if found != expected {
            return Err(ComputeError::Shape { step, found, expected });
        }
        let skip = reduced.integers().last().is_some_and(|bad_slots| *bad_slots != 0);
        if skip {
            // How far the bad slots were added depends on who computed them.
            reduced.clear_gradient();
        }
        let divisor = f64::from(self.spec.slots_of(step));
        if reduced.is_beside_device() {
            return self.prepare_on_device(step, &reduced, skip, trend);
        }
        let mut gradient = match self.prepared.take().map(|old| old.gradient) {
            Some(Gradient::Here(gradient)) => gradient,
            _ => Vec::new(),
        };
        gradient.resize(elements, 0.0);
        let digest = self.trainer.run(|| reduced.settle(divisor, &mut gradient));
        let norm = self.trainer.norm(&gradient);
        let mut statistics = sums::step_statistics(reduced.integers(), &self.spec, step, norm);
        let detail = self.judge(step, &mut statistics, trend);
        if skip || self.is_skipped(&statistics) {
            gradient.fill(f32::NAN);
        }
        self.prepared = Some(Prepared { step, gradient: Gradient::Here(gradient) });
        self.spare = Some(reduced);
        Ok(Report { digest, statistics, detail, optimizer_seconds: self.optimizer_seconds })
    }

    /// The same of sums that are on the device.
    fn prepare_on_device(
        &mut self,
        step: Step,
        reduced: &Sums,
        skip: bool,
        trend: Option<Trend>,
    ) -> Result<Report, ComputeError> {
        let stage = &self.spec.stages[self.spec.stage_of(step)];
        let elements = self.layout.trained(stage.objective).len();
        let integers = reduced.integers();
        let mut hasher = blake3::Hasher::new();
        let mut norm = 0.0;
        if !skip {
            let sums = Sums::on_device(arithmetic(&self.spec, stage), stage.slots);
            let divisor = f64::from(self.spec.slots_of(step));
            let settled = self.trainer.settle_sums(sums, stage.objective, divisor)?;
            hasher.update(bytemuck::cast_slice(&settled.0));
            norm = settled.1;
        }
        hasher.update(bytemuck::cast_slice(integers));
        let mut statistics = sums::step_statistics(integers, &self.spec, step, norm);
        let detail = self.judge(step, &mut statistics, trend);
        let gradient = match skip || self.is_skipped(&statistics) {
            true => Gradient::Here(vec![f32::NAN; elements]),
            false => Gradient::OnDevice(norm),
        };
        self.prepared = Some(Prepared { step, gradient });
        let digest = Digest::from(hasher.finalize());
        Ok(Report { digest, statistics, detail, optimizer_seconds: self.optimizer_seconds })
    }

    /// Says in the statistics of a step whether it is a spike, and what the trend is with it; gives what
    /// this rank has to say of a spike.
    fn judge(&self, step: Step, statistics: &mut StepStatistics, trend: Option<Trend>) -> String {
        let Some(guard) = &self.spec.optimizer.spikes else { return String::new() };
        if statistics.bad_slots > 0 {
            // Its figures are not those of all slots.
            statistics.trend = trend;
            return String::new();
        }
        let stage = self.spec.stage_of(step);
        let before = trend.unwrap_or_default();
        statistics.spike = before.spike(guard, stage, statistics);
        statistics.trend = Some(before.with(guard, stage, statistics));
        let bound = before.bounds(guard, stage).map_or(f64::INFINITY, |bounds| bounds.loss);
        match self.worst.filter(|(loss, _)| !statistics.spike.is_empty() && *loss > bound) {
            Some((loss, slot)) => {
                format!("{} has the loss {loss:.4}", place_of(&self.spec, step, slot))
            }
            None => String::new(),
        }
    }

    fn is_skipped(&self, statistics: &StepStatistics) -> bool {
        let action = self.spec.optimizer.spikes.as_ref().map(|guard| guard.action);
        action == Some(OnSpike::Skip) && !statistics.spike.is_empty()
    }

    /// Applies the prepared update.
    pub(crate) fn commit(&mut self, step: Step) -> Result<(), ComputeError> {
        let wrong = ComputeError::WrongStep { held: self.held(), action: "commit", step };
        let prepared = self.prepared.take_if(|prepared| prepared.step == step).ok_or(wrong)?;
        match prepared.gradient {
            Gradient::Here(gradient) => self.update(step, gradient),
            Gradient::OnDevice(norm) => self.update_on_device(step, norm),
        }
    }

    /// Applies the gradient that waits on the device.
    fn update_on_device(&mut self, step: Step, norm: f64) -> Result<(), ComputeError> {
        let start = Instant::now();
        self.must_hold(step.0.checked_sub(1).map(Step), "update to", step)?;
        let _span = tracing::info_span!("optimizer", %step).entered();
        // It leaves the device for those who follow, if there are any.
        let objective = self.spec.stages[self.spec.stage_of(step)].objective;
        let followed = match self.shelf.is_open() {
            true => Some(self.trainer.waiting_gradient(objective)?),
            false => None,
        };
        let rate = self.spec.learning_rate(step);
        self.trainer.update_from_sums(norm, &self.spec.optimizer, objective, rate)?;
        self.kept = Kept::default();
        if let Some(gradient) = followed {
            self.shelf.add(step, gradient);
        }
        self.optimizer_seconds = start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Applies the reduced gradient of the step after the held one.
    pub(crate) fn update(&mut self, step: Step, gradient: Vec<f32>) -> Result<(), ComputeError> {
        let start = Instant::now();
        self.must_hold(step.0.checked_sub(1).map(Step), "update to", step)?;
        let _span = tracing::info_span!("optimizer", %step).entered();
        if gradient.first().is_some_and(|value| value.is_nan()) {
            self.trainer.skip();
        } else {
            let rate = self.spec.learning_rate(step);
            let objective = self.spec.stages[self.spec.stage_of(step)].objective;
            self.trainer.update(&gradient, &self.spec.optimizer, objective, rate)?;
        }
        for output in std::mem::take(&mut self.kept).outputs.into_values() {
            self.trainer.recycle(output.gradient);
        }
        self.shelf.add(step, gradient);
        self.optimizer_seconds = start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Sums over the tokens of validation batches, in fixed point, and the number of tokens.
    pub(crate) fn evaluate(
        &self,
        step: Step,
        batches: &[SlotBatch],
        cancelled: &AtomicBool,
    ) -> Result<(Vec<i64>, u64), ComputeError> {
        self.must_hold(Some(step), "evaluate", step)?;
        let stage = &self.spec.stages[self.spec.stage_of(step)];
        let mut totals = vec![0; sums::evaluation_len(stage.loops)];
        let mut tokens = 0;
        if batches.is_empty() {
            return Ok((totals, tokens));
        }
        let all = self.trainer.evaluate(&StageSettings::from(stage), batches, cancelled)?;
        if cancelled.load(Ordering::Relaxed) {
            return Err(ComputeError::Cancelled);
        }
        for (index, (batch, statistics)) in batches.iter().zip(all).enumerate() {
            let count = (batch.sequences * batch.sequence_length) as u64;
            sums::add_evaluation(&mut totals, &statistics, count).map_err(|(what, value)| {
                ComputeError::NotFinite {
                    place: format!("validation batch {index} of the evaluation after step {step}"),
                    what,
                    value,
                    remedy: "the weights diverged; lower the learning rate".into(),
                }
            })?;
            tokens += count;
        }
        Ok((totals, tokens))
    }

    /// Copies this rank's part of the held state: the only moment for which a save stops the
    /// training.
    pub(crate) fn snapshot(
        &self,
        step: Step,
        part: usize,
        parts: usize,
    ) -> Result<Part, ComputeError> {
        self.must_hold(Some(step), "save", step)?;
        Ok(Part::copy(&self.layout, &*self.trainer.state()?, part, parts))
    }
}

/// Adding slots to the sums of a step, with the words for when it fails.
struct Adding<'a> {
    spec: &'a Spec,
    layout: &'a Layout,
    step: Step,
    stage: &'a spec::Stage,
    first_slot: u32,
    notes: &'a Mutex<Notes>,
}

/// What is told of a rank's slots.
#[derive(Default)]
struct Notes {
    /// Those that cannot be added, and why, under a spec that skips the step then.
    bad: Vec<(u32, String)>,
    /// The highest loss, and the slot that has it.
    worst: Option<(f64, u32)>,
}

/// The worst slot, and what is wrong with the bad ones, in the order of slots, whatever thread was first.
fn told(notes: Mutex<Notes>) -> (Option<(f64, u32)>, String) {
    let Notes { mut bad, worst } = notes.into_inner().unwrap_or_else(PoisonError::into_inner);
    bad.sort_unstable();
    (worst, bad.into_iter().map(|(_, why)| why).collect::<Vec<_>>().join("; "))
}

/// A slot of a step and its data, in words.
fn place_of(spec: &Spec, step: Step, slot: u32) -> String {
    let stage = &spec.stages[spec.stage_of(step)];
    let per_slot = stage.slot_sequences as u64;
    let begin = spec.position(step).map_or(0, |at| at.first_sequence) + u64::from(slot) * per_slot;
    let (end, name) = (begin + per_slot - 1, &stage.name);
    format!("step {step}, slot {slot}, sequences {begin} to {end} of stage `{name}`")
}

/// How the gradients of a stage are summed.
fn arithmetic(spec: &Spec, stage: &spec::Stage) -> Arithmetic {
    Arithmetic::new(spec.cluster.reduction, spec.cluster.fraction_bits, stage.slots)
}

impl Adding<'_> {
    /// Adds the `place`-th of the rank's slots. One that cannot be added is counted, and described in
    /// the notes, under a spec that skips the step then.
    fn take(
        &self,
        gathering: &Gathering<'_>,
        place: usize,
        output: &SlotOutput,
    ) -> Result<(), ComputeError> {
        let added = gathering.finish(place, &output.gradient);
        self.take_note(place, &output.statistics, added, |change| gathering.close(change))
    }

    /// Has `close` change the integers for a slot, given whether its gradient could be added.
    fn take_note(
        &self,
        place: usize,
        statistics: &SlotStatistics,
        added: Result<(), OutOfRange>,
        close: impl FnOnce(&dyn Fn(&mut [i64])),
    ) -> Result<(), ComputeError> {
        let slot = self.first_slot + place as u32;
        let notes = || self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        match (self.checked(slot, statistics, added), self.spec.optimizer.non_finite) {
            (Ok(integers_of_slot), _) => {
                let (mut notes, loss) = (notes(), statistics.loss);
                // Of equal ones the first, whatever thread was faster.
                let is_worse = |(other, at)| loss > other || (loss == other && slot < at);
                if notes.worst.is_none_or(is_worse) {
                    notes.worst = Some((loss, slot));
                }
                drop(notes);
                close(&|integers| {
                    integers
                        .iter_mut()
                        .zip(&integers_of_slot)
                        .for_each(|(sum, value)| *sum += value);
                });
            }
            (Err(error), NonFinite::Skip) => {
                notes().bad.push((slot, error.to_string()));
                close(&|integers| integers.iter_mut().last().map_or((), |n| *n += 1));
            }
            (Err(error), NonFinite::Stop) => return Err(error),
        }
        Ok(())
    }

    /// The slot's statistics as integers, when they and its gradient have a place in the sums. Of
    /// both faults that of the statistics is told, which says more.
    fn checked(
        &self,
        slot: u32,
        statistics: &SlotStatistics,
        added: Result<(), OutOfRange>,
    ) -> Result<Vec<i64>, ComputeError> {
        let statistics = sums::encoded(statistics)
            .map_err(|(what, value)| self.not_finite(slot, what, value))?;
        added.map_err(|OutOfRange { index, value }| {
            let first = self.layout.trained(self.stage.objective).start;
            let what = match self.layout.owner(first + index) {
                Some((tensor, element)) => {
                    format!("the gradient of {}, element {element}", tensor.name)
                }
                None => format!("the gradient's element {index}"),
            };
            self.not_finite(slot, what, f64::from(value))
        })?;
        Ok(statistics)
    }

    fn not_finite(&self, slot: u32, what: String, value: f64) -> ComputeError {
        let place = place_of(self.spec, self.step, slot);
        let exact = self.spec.cluster.reduction == Reduction::Exact;
        let remedy = if value.is_finite() && exact {
            format!(
                "more than cluster.fraction_bits = {} leaves room for; have a branch of this run (`looptrain \
                 branch`) lower that or the learning rate",
                self.spec.cluster.fraction_bits
            )
        } else {
            "the run diverged; have a branch of this run (`looptrain branch`) lower the learning rate, or skip \
             such steps (optimizer.non_finite)"
                .into()
        };
        ComputeError::NotFinite { place, what, value, remedy }
    }
}

#[cfg(test)]
#[path = "bench_tests.rs"]
mod tests;
