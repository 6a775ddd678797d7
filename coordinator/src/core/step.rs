//! The life of a step: slots shared out, votes, the commit decision.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use looptrain_proto::spec::OnSpike;
use looptrain_proto::v1::{Commit, Plan, Prepared, StepStatistics, Trend};
use looptrain_proto::{Digest, Generation, Step, WorkerId};

use super::agreement::{self, Verdict};
use super::{Core, Directive, Phase, plural};
use crate::records::{RunEvent, SectionSeconds, StepRecord, mean_depth};

/// Commits that the pace is measured over.
const PACE_WINDOW: usize = 20;

/// Steps in a row that may be committed without an update: after so many the weights are beyond
/// help.
const MAX_SKIPPED: u32 = 10;

/// Steps whose trends are known: more than anybody falls behind.
const TRENDS: usize = 1 << 16;

/// A planned step.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) step: Step,
    started: Duration,
    /// The slots of each rank.
    shares: Vec<Range<u32>>,
    /// One place a rank.
    votes: Vec<Option<Vote>>,
    /// Places that are empty.
    missing: usize,
}

impl Round {
    pub(super) fn awaits(&self, rank: usize) -> bool {
        self.votes.get(rank).is_some_and(Option::is_none)
    }

    /// Slots of a rank.
    pub(super) fn slots(&self, rank: usize) -> u32 {
        self.shares.get(rank).map_or(0, |share| share.len() as u32)
    }
}

/// A rank's word that it holds the reduced gradient.
#[derive(Clone, Debug)]
pub(super) struct Vote {
    pub(super) digest: Digest,
    pub(super) statistics: StepStatistics,
    pub(super) sections: SectionSeconds,
    /// Slots that it computed, not counting those it had kept.
    pub(super) computed_slots: u32,
    /// What it met that keeps the step from being applied.
    pub(super) detail: String,
}

/// When the latest steps were committed: the run's speed.
#[derive(Debug, Default)]
pub(super) struct Pace {
    commits: VecDeque<(Duration, u64)>,
}

impl Pace {
    fn commit(&mut self, now: Duration, tokens: u64) {
        self.commits.push_back((now, tokens));
        if self.commits.len() > PACE_WINDOW {
            self.commits.pop_front();
        }
    }

    /// Tokens per second over the latest commits; 0 before the second one.
    pub(super) fn tokens_per_second(&self) -> f64 {
        match (self.commits.front(), self.commits.back()) {
            (Some((begin, before)), Some((end, after))) if end > begin && after > before => {
                (after - before) as f64 / (*end - *begin).as_secs_f64()
            }
            _ => 0.0,
        }
    }
}

impl Core {
    /// Shares out the slots of the next step. Every rank gets a plan, even an empty one: all
    /// take part in the all-reduce.
    pub(super) fn plan(&mut self) {
        let step = self.committed.next();
        let world = self.members.len();
        let shares = self.share_out(step);
        let trend = self.trend();
        for (worker, slots) in self.members.clone().into_iter().zip(&shares) {
            let plan = Plan {
                generation: self.generation.0,
                step: step.0,
                slot_begin: slots.start,
                slot_end: slots.end,
                trend,
            };
            self.send(worker, Directive::Plan(plan));
        }
        self.away.step_begins();
        let (started, votes) = (self.now, vec![None; world]);
        self.phase = Phase::Training(Round { step, started, shares, votes, missing: world });
        self.explain(format!("generation {}: {world} worker{}", self.generation, plural(world)));
    }

    pub(super) fn on_prepared(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        vote: Vote,
    ) {
        let rank = match self.current_rank(worker, generation) {
            Ok(rank) => rank,
            Err(reason) => return self.ignore(worker, reason),
        };
        let Phase::Training(round) = &mut self.phase else {
            return self.ignore(worker, format!("step {step} is not being trained"));
        };
        if step != round.step {
            let reason = format!("it votes on step {step} while step {} is trained", round.step);
            return self.ignore(worker, reason);
        }
        if let Some(worker) = self.roster.get_mut(worker) {
            worker.sections = vote.sections;
        }
        if round.votes[rank].replace(vote).is_none() {
            round.missing -= 1;
        }
        if round.missing == 0 {
            // Looked at once a step and not once a vote, of which there may be thousands.
            let votes: Vec<Vote> = round.votes.iter().flatten().cloned().collect();
            let started = round.started;
            self.decide(step, started, &votes);
        }
    }

    /// All votes are in.
    fn decide(&mut self, step: Step, started: Duration, votes: &[Vote]) {
        let digests: Vec<Digest> = votes.iter().map(|vote| vote.digest).collect();
        match agreement::compare(&digests, None) {
            Verdict::Unanimous(digest) => match self.spike_to_stop_at(votes) {
                Some(why) => self.end_before(step, &why),
                None => self.commit(step, started, digest, votes),
            },
            Verdict::Odd { ranks, .. } => {
                self.divergences += 1;
                let reason =
                    format!("its reduced gradient of step {step} differs from the others'");
                self.expel_ranks(&ranks, &reason);
            }
            Verdict::Split => {
                self.divergences += 1;
                self.fail_split(&format!("reduced gradient of step {step}"), &digests);
            }
        }
    }

    /// What of the step is a spike, under a spec that ends the run before one.
    fn spike_to_stop_at(&self, votes: &[Vote]) -> Option<String> {
        let guard = self.spec.optimizer.spikes.as_ref()?;
        let spike = &votes.first()?.statistics.spike;
        (guard.action == OnSpike::Stop && !spike.is_empty()).then(|| explained(spike, votes))
    }

    /// Where loss and gradient norm stand after the committed step.
    pub(super) fn trend(&self) -> Option<Trend> {
        self.trends.get(&self.committed).copied()
    }

    /// Notes the trends that an earlier coordinator and the one that left the checkpoint knew.
    pub(super) fn note_trends(&mut self) {
        let mark = self.checkpoint.as_ref().map(|mark| (mark.step, mark.trend));
        let tail = self.tail.iter().map(|record| (record.step, record.trend));
        let known: Vec<(Step, Option<Trend>)> = tail.chain(mark).collect();
        known.into_iter().for_each(|(step, trend)| self.note_trend(step, trend));
        let votes: Vec<Prepared> = self.bequest.iter().flat_map(|it| it.recent.clone()).collect();
        self.note_trends_of(&votes);
    }

    /// Notes those that a worker remembers: each is a function of the steps before, whoever tells it.
    pub(super) fn note_trends_of(&mut self, votes: &[Prepared]) {
        for vote in votes {
            let trend = vote.statistics.as_ref().and_then(|statistics| statistics.trend);
            self.note_trend(Step(vote.step), trend);
        }
    }

    fn note_trend(&mut self, step: Step, trend: Option<Trend>) {
        if let Some(trend) = trend {
            self.trends.insert(step, trend);
        }
        while self.trends.len() > TRENDS {
            self.trends.pop_first();
        }
    }

    fn commit(&mut self, step: Step, started: Duration, digest: Digest, votes: &[Vote]) {
        for worker in self.members.clone() {
            let commit = Commit { generation: self.generation.0, step: step.0 };
            self.send(worker, Directive::Commit(commit));
        }
        let held_up = self.away.step_ends();
        let seconds = (self.now - started).saturating_sub(held_up).as_secs_f64();
        self.observe(votes, seconds);
        let mut record = StepRecord { seconds, ..self.record(step, digest, votes) };
        record.mfu = self.mfu(&record);
        let of_depth = self.watch_depth(&mut record);
        self.book_step(step, votes);
        self.note_trend(step, record.trend);
        self.committed = step;
        self.logged = step;
        self.fruitless = 0;
        self.stalls = 0;
        self.trouble = None;
        self.pace.commit(self.now, record.tokens);
        self.last = Some(record.clone());
        self.skipped = if record.skipped.is_some() { self.skipped + 1 } else { 0 };
        let why = record.skipped.clone().unwrap_or_default();
        self.publish(RunEvent::Committed(Box::new(record)));
        of_depth.into_iter().for_each(|event| self.publish(event));
        if self.skipped >= MAX_SKIPPED {
            return self.fail(format!(
                "{MAX_SKIPPED} steps in a row had to be skipped, the last one since {why}"
            ));
        }
        self.proceed();
    }

    /// Which share of what its workers' devices could do a step has needed, where the spec says that.
    pub(super) fn mfu(&self, record: &StepRecord) -> Option<f64> {
        let peak = 1e12 * self.spec.cluster.peak_tflops * f64::from(record.world);
        (peak > 0.0 && record.seconds > 0.0).then(|| record.flops / record.seconds / peak)
    }

    /// The record of a step that this generation commits with these votes; how long it took is
    /// for the caller to say.
    pub(super) fn record(&self, step: Step, digest: Digest, votes: &[Vote]) -> StepRecord {
        // All but what follows from the plan's trend is part of the digest: all ranks hold the same.
        let statistics = votes.first().map(|vote| vote.statistics.clone()).unwrap_or_default();
        let StepStatistics { loss, loss_per_loop, exit_pdf, entropy, grad_norm, bad_slots, .. } =
            statistics;
        let skipped = match statistics.spike.as_str() {
            "" => (bad_slots > 0).then(|| why_skipped(bad_slots, votes)),
            spike => Some(explained(&format!("a spike: {spike}"), votes)),
        };
        let sections = votes.iter().map(|vote| vote.sections);
        StepRecord {
            step,
            generation: self.generation,
            world: self.world(),
            loss,
            loss_per_loop,
            mean_depth: mean_depth(&exit_pdf),
            exit_pdf,
            entropy,
            grad_norm,
            hidden_rms_per_loop: statistics.hidden_rms_per_loop,
            gradient_norm_per_loop: statistics.gradient_norm_per_loop,
            agreement_per_loop: statistics.agreement_per_loop,
            loss_rise_per_loop: Vec::new(),
            lr: self.spec.learning_rate(step),
            tokens: self.spec.tokens_after(step),
            step_tokens: self.spec.tokens_of(step),
            cursor: self.spec.cursor_after(step),
            seconds: 0.0,
            flops: self.spec.step_operations(step),
            mfu: None,
            digest,
            bad_slots,
            skipped,
            trend: statistics.trend,
            sections: sections.fold(SectionSeconds::default(), SectionSeconds::max),
        }
    }
}

/// What kept a step from being applied, as the ranks that met it say.
fn why_skipped(bad_slots: u32, votes: &[Vote]) -> String {
    match details(votes) {
        none if none.is_empty() => {
            format!("{bad_slots} slot{} with no usable gradient", plural(bad_slots as usize))
        }
        details => details,
    }
}

/// The same with what ranks have to say of it.
fn explained(what: &str, votes: &[Vote]) -> String {
    match details(votes) {
        none if none.is_empty() => what.to_owned(),
        details => format!("{what}; {details}"),
    }
}

fn details(votes: &[Vote]) -> String {
    let details = votes.iter().map(|vote| vote.detail.as_str()).filter(|detail| !detail.is_empty());
    details.collect::<Vec<_>>().join("; ")
}
