//! The instruments of the coordinator: fed from what happens, or read from the board when somebody
//! looks.

use std::sync::{Arc, Weak};

use looptrain_proto::Spec;
use looptrain_proto::metrics::{self, Metric, Series};
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram};

use crate::board::Board;
use crate::core::Snapshot;
use crate::ledger::{Category, Ledger};
use crate::records::{EvaluationRecord, LossCause, RunEvent, Section, SectionSeconds, StepRecord};

/// All phases of a run, as a snapshot names them.
const PHASES: [&str; 8] =
    ["waiting", "forming", "training", "evaluating", "paused", "finishing", "finished", "failed"];

macro_rules! instruments {
    ($($field:ident: $type:ty = $id:ident.$make:ident(),)*) => {
        /// Instruments that are fed when something happens.
        pub(crate) struct Instruments {
            $($field: $type,)*
        }

        impl Instruments {
            /// Instruments on the process's global meter; some read `board` when they are looked at.
            pub(crate) fn new(board: &Arc<Board>, spec: &Spec) -> Self {
                observe(board, spec);
                let instruments = Self { $($field: metrics::$id.$make(),)* };
                instruments.begin(spec);
                instruments
            }
        }

        #[cfg(test)]
        const FED: &[Metric] = &[$(metrics::$id),*];
    };
}

instruments! {
    steps: Counter<u64> = STEPS.counter(),
    tokens: Counter<u64> = TOKENS.counter(),
    loop_loss_rises: Counter<u64> = LOOP_LOSS_RISES.counter(),
    gate_collapses: Counter<u64> = GATE_COLLAPSES.counter(),
    step_duration: Histogram<f64> = STEP_DURATION.histogram(),
    section_duration: Histogram<f64> = SECTION_DURATION.histogram(),
    generations: Counter<u64> = GENERATIONS.counter(),
    workers_joined: Counter<u64> = WORKERS_JOINED.counter(),
    workers_refused: Counter<u64> = WORKERS_REFUSED.counter(),
    workers_lost: Counter<u64> = WORKERS_LOST.counter(),
    skipped: Counter<u64> = SKIPPED.counter(),
    stragglers: Counter<u64> = STRAGGLERS.counter(),
    rewinds: Counter<u64> = REWINDS.counter(),
    checkpoint_duration: Histogram<f64> = CHECKPOINT_DURATION.histogram(),
    checkpoint_stall: Histogram<f64> = CHECKPOINT_STALL.histogram(),
    checkpoint_failures: Counter<u64> = CHECKPOINT_FAILURES.counter(),
    checkpoint_delays: Counter<u64> = CHECKPOINT_DELAYS.counter(),
}

/// What is read from the board, for the newest value is all that matters of it.
const OBSERVED: &[(Metric, Read)] = &[
    (metrics::RUN_INFO, |it| {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        vec![(vec![it.run.clone(), version], 1.0)]
    }),
    (metrics::RUN_STEPS, |it| vec![(vec![], it.total_steps)]),
    (metrics::RUN_PHASE, |it| {
        let current = it.snapshot().map_or("waiting", |snapshot| snapshot.phase);
        let series = |phase: &&str| (vec![(*phase).to_owned()], f64::from(*phase == current));
        PHASES.iter().map(series).collect()
    }),
    (metrics::STEP, |it| it.of_snapshot(|snapshot| Some(snapshot.step.0 as f64))),
    (metrics::RUN_TOKENS, |it| it.of_snapshot(|snapshot| Some(snapshot.tokens as f64))),
    (metrics::GENERATION, |it| it.of_snapshot(|snapshot| Some(snapshot.generation.0 as f64))),
    (metrics::WORLD, |it| {
        it.of_snapshot(|snapshot| {
            let members = snapshot.workers.iter().filter(|worker| worker.rank.is_some());
            Some(members.count() as f64)
        })
    }),
    (metrics::LOSS, |it| it.last(|last| Some(last.loss))),
    (metrics::EXIT_DEPTH, |it| it.last(|last| Some(last.mean_depth))),
    (metrics::EXIT_ENTROPY, |it| it.last(|last| Some(last.entropy))),
    (metrics::GRADIENT_NORM, |it| it.last(|last| Some(last.grad_norm))),
    (metrics::LEARNING_RATE, |it| it.last(|last| Some(last.lr))),
    (metrics::COMPUTE_RATE, |it| {
        it.last(|last| (last.seconds > 0.0).then(|| last.flops / last.seconds))
    }),
    (metrics::MFU, |it| it.last(|last| last.mfu)),
    (metrics::CHECKPOINT_STEP, |it| {
        it.of_snapshot(|snapshot| snapshot.checkpoint_step.map(|step| step.0 as f64))
    }),
    (metrics::CHECKPOINT_SIZE, |it| {
        let size = it.board.checkpoint_size().map(|bytes| (vec![], bytes as f64));
        size.into_iter().collect()
    }),
    (metrics::VALIDATION_LOSS, |it| it.evaluation(|newest| newest.loss)),
    (metrics::VALIDATION_PERPLEXITY, |it| it.evaluation(|newest| newest.perplexity)),
    (metrics::VALIDATION_LOOP_LOSS, |it| {
        let snapshot = it.snapshot();
        let newest = snapshot.as_ref().and_then(|snapshot| snapshot.evaluation.as_ref());
        by_loop(newest.map_or(&[][..], |newest| &newest.loss_per_loop))
    }),
    (metrics::LOOP_LOSS, |it| it.loops(|last| &last.loss_per_loop)),
    (metrics::LOOP_LOSS_ABOVE_LOWEST, |it| it.loops(|last| &last.loss_rise_per_loop)),
    (metrics::LOOP_HIDDEN_RMS, |it| it.loops(|last| &last.hidden_rms_per_loop)),
    (metrics::LOOP_GRADIENT_NORM, |it| it.loops(|last| &last.gradient_norm_per_loop)),
    (metrics::LOOP_AGREEMENT, |it| it.loops(|last| &last.agreement_per_loop)),
    (metrics::EXIT_PROBABILITY, |it| it.loops(|last| &last.exit_pdf)),
    (metrics::COMMIT_AGE, |it| vec![(vec![], it.board.commit_age().as_secs_f64())]),
    (metrics::CHECKPOINT_AGE, |it| vec![(vec![], it.board.checkpoint_age().as_secs_f64())]),
    (metrics::WORKER_SECTION_DURATION, |it| {
        let named = |member: Vec<String>, (section, seconds): (&str, f64)| {
            ([member, vec![section.to_owned()]].concat(), seconds)
        };
        let of = |(member, view): (Vec<String>, &crate::core::WorkerView)| {
            by_section(view.sections).map(|section| named(member.clone(), section))
        };
        it.members(|member, view| of((member, view)).to_vec())
    }),
    (metrics::WORKER_SLOTS, |it| it.members(|member, view| vec![(member, f64::from(view.slots))])),
    (metrics::WORKER_SLOT_RATE, |it| {
        it.members(|member, view| {
            view.slots_per_second.map(|rate| (member, rate)).into_iter().collect()
        })
    }),
    (metrics::WORKER_STRAGGLES, |it| {
        it.members(|member, view| {
            let series = |section: Section| ([member, vec![section.to_string()]].concat(), 1.0);
            view.straggles_in.map(series).into_iter().collect()
        })
    }),
    (metrics::RETRIED, |it| it.of_snapshot(|snapshot| Some(snapshot.retried_steps as f64))),
    (metrics::DIVERGENCES, |it| it.of_snapshot(|snapshot| Some(snapshot.divergences as f64))),
    (metrics::GOODPUT, |it| {
        let share = it.board.of_ledger(Ledger::share).flatten();
        share.map(|share| (vec![], share)).into_iter().collect()
    }),
    (metrics::RUN_TIME, |it| it.by_category(|ledger, category| ledger.seconds(category))),
    (metrics::GOODPUT_TIME, |it| {
        // From nothing on with each coordinator: the ledger that it goes on with may be a little older
        // than what the one before has told.
        it.by_category(|ledger, category| ledger.seconds_since_start(category))
    }),
];

/// The series of a metric now.
type Read = fn(&Glance) -> Vec<Series>;

/// What observed metrics are read from.
struct Glance {
    run: String,
    total_steps: f64,
    board: Arc<Board>,
}

impl Glance {
    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.board.glance()
    }

    fn of_snapshot(&self, value: impl Fn(&Snapshot) -> Option<f64>) -> Vec<Series> {
        let value = self.snapshot().and_then(|snapshot| value(&snapshot));
        value.map(|value| (vec![], value)).into_iter().collect()
    }

    /// Of the newest step.
    fn last(&self, value: impl Fn(&StepRecord) -> Option<f64>) -> Vec<Series> {
        self.of_snapshot(|snapshot| snapshot.last.as_ref().and_then(&value))
    }

    /// Of the newest evaluation.
    fn evaluation(&self, value: impl Fn(&EvaluationRecord) -> f64) -> Vec<Series> {
        self.of_snapshot(|snapshot| snapshot.evaluation.as_ref().map(&value))
    }

    fn by_category(&self, seconds: impl Fn(&Ledger, Category) -> f64) -> Vec<Series> {
        let series = self.board.of_ledger(|ledger| {
            Category::ALL.map(|it| (vec![it.name().to_owned()], seconds(ledger, it)))
        });
        series.into_iter().flatten().collect()
    }

    /// A series for each loop that the newest step has, and for no other.
    fn loops(&self, values: impl Fn(&StepRecord) -> &Vec<f64>) -> Vec<Series> {
        let snapshot = self.snapshot();
        let last = snapshot.as_ref().and_then(|snapshot| snapshot.last.as_ref());
        by_loop(last.map_or(&[][..], |last| values(last)))
    }

    /// Series of each member of the generation, from its labels (name and rank) and what is known of it.
    fn members(
        &self,
        series: impl Fn(Vec<String>, &crate::core::WorkerView) -> Vec<Series>,
    ) -> Vec<Series> {
        let Some(snapshot) = self.snapshot() else { return Vec::new() };
        let members = snapshot.workers.iter().filter_map(|view| {
            let rank = view.rank?;
            Some(series(vec![view.name.clone(), rank.to_string()], view))
        });
        members.flatten().collect()
    }
}

/// A series for each loop, counted from 1.
fn by_loop(values: &[f64]) -> Vec<Series> {
    values.iter().enumerate().map(|(at, value)| (vec![(at + 1).to_string()], *value)).collect()
}

fn observe(board: &Arc<Board>, spec: &Spec) {
    for (metric, read) in OBSERVED {
        let (run, total_steps) = (spec.run.name.clone(), spec.total_steps().0 as f64);
        // A coordinator that is over is not kept for those who may still look.
        let board: Weak<Board> = Arc::downgrade(board);
        metric.observe(move || match board.upgrade() {
            Some(board) => read(&Glance { run: run.clone(), total_steps, board }),
            None => Vec::new(),
        });
    }
}

/// The sections with their names.
fn by_section(sections: SectionSeconds) -> [(&'static str, f64); 5] {
    [
        ("data_wait", sections.data_wait),
        ("compute", sections.compute),
        ("reduce", sections.reduce),
        ("optimizer", sections.optimizer),
        ("send", sections.send),
    ]
}

impl Instruments {
    /// Gives counters that may stay at nothing for long a series at once: who asks how much one has
    /// grown could not see it begin otherwise.
    fn begin(&self, spec: &Spec) {
        for counter in [
            &self.steps,
            &self.tokens,
            &self.generations,
            &self.workers_joined,
            &self.workers_refused,
            &self.skipped,
            &self.rewinds,
            &self.checkpoint_failures,
            &self.checkpoint_delays,
            &self.gate_collapses,
        ] {
            counter.add(0, &[]);
        }
        for cause in LossCause::ALL {
            self.workers_lost.add(0, &[KeyValue::new("cause", cause.to_string())]);
        }
        for section in Section::ALL {
            self.stragglers.add(0, &[KeyValue::new("section", section.to_string())]);
        }
        let loops = spec.stages.iter().map(|stage| stage.loops).max().unwrap_or(0);
        for at in 1..=loops {
            self.loop_loss_rises.add(0, &[KeyValue::new("loop", at.to_string())]);
        }
    }

    /// Feeds the instruments from what happened.
    pub(crate) fn record(&self, event: &RunEvent) {
        match event {
            RunEvent::Committed(record) => self.record_step(record),
            RunEvent::Formed { .. } => self.generations.add(1, &[]),
            RunEvent::WorkerJoined { .. } => self.workers_joined.add(1, &[]),
            RunEvent::WorkerRefused { .. } => self.workers_refused.add(1, &[]),
            RunEvent::WorkerLost { cause, .. } => {
                self.workers_lost.add(1, &[KeyValue::new("cause", cause.to_string())]);
            }
            RunEvent::Rewound { .. } => self.rewinds.add(1, &[]),
            RunEvent::CheckpointSaved { seconds, stall, .. } => {
                self.checkpoint_stall.record(*stall, &[]);
                self.checkpoint_duration.record(*seconds, &[]);
            }
            RunEvent::CheckpointFailed { .. } => self.checkpoint_failures.add(1, &[]),
            RunEvent::CheckpointDelayed { .. } => self.checkpoint_delays.add(1, &[]),
            RunEvent::GateCollapsed { .. } => self.gate_collapses.add(1, &[]),
            RunEvent::LoopLossRises { at, .. } => {
                self.loop_loss_rises.add(1, &[KeyValue::new("loop", at.to_string())]);
            }
            RunEvent::Straggles { section, .. } => {
                self.stragglers.add(1, &[KeyValue::new("section", section.to_string())]);
            }
            RunEvent::Evaluated(_)
            | RunEvent::Waiting { .. }
            | RunEvent::CaughtUp { .. }
            | RunEvent::GateRecovered { .. }
            | RunEvent::LoopLossFalls { .. }
            | RunEvent::StoreAway { .. }
            | RunEvent::StoreBack { .. }
            | RunEvent::Draining { .. }
            | RunEvent::Pausing { .. }
            | RunEvent::Resumed
            | RunEvent::Stopping { .. }
            | RunEvent::Finished { .. }
            | RunEvent::Failed { .. } => {}
        }
    }

    fn record_step(&self, record: &StepRecord) {
        self.steps.add(1, &[]);
        self.tokens.add(record.step_tokens, &[]);
        self.skipped.add(u64::from(record.skipped.is_some()), &[]);
        self.step_duration.record(record.seconds, &[]);
        for (name, seconds) in by_section(record.sections) {
            self.section_duration.record(seconds, &[KeyValue::new("section", name)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use looptrain_proto::metrics::{CATALOGUE, Reporter};

    use super::*;

    #[test]
    fn all_of_the_coordinators_catalogue_is_reported_once() {
        let listed = CATALOGUE.iter().filter(|metric| metric.reporter == Reporter::Coordinator);
        let listed: BTreeSet<&str> = listed.map(|metric| metric.name).collect();
        let reported = FED.iter().chain(OBSERVED.iter().map(|(metric, _)| metric));
        let reported: Vec<&str> = reported.map(|metric| metric.name).collect();
        assert_eq!(reported.len(), listed.len());
        assert_eq!(reported.into_iter().collect::<BTreeSet<_>>(), listed);
    }
}
