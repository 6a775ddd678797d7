//! The instruments of the coordinator: fed from what happens, or read from the board when somebody
//! looks.

use std::sync::{Arc, Weak};

use looptrain_proto::Spec;
use looptrain_proto::metrics::{self, Metric, Series};
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Gauge, Histogram};

use crate::board::Board;
use crate::core::Snapshot;
use crate::ledger::Category;
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
    step: Gauge<f64> = STEP.gauge(),
    run_tokens: Gauge<f64> = RUN_TOKENS.gauge(),
    loss: Gauge<f64> = LOSS.gauge(),
    loop_loss: Gauge<f64> = LOOP_LOSS.gauge(),
    loop_loss_above_lowest: Gauge<f64> = LOOP_LOSS_ABOVE_LOWEST.gauge(),
    loop_loss_rises: Counter<u64> = LOOP_LOSS_RISES.counter(),
    gate_collapses: Counter<u64> = GATE_COLLAPSES.counter(),
    loop_hidden_rms: Gauge<f64> = LOOP_HIDDEN_RMS.gauge(),
    loop_gradient_norm: Gauge<f64> = LOOP_GRADIENT_NORM.gauge(),
    loop_agreement: Gauge<f64> = LOOP_AGREEMENT.gauge(),
    exit_probability: Gauge<f64> = EXIT_PROBABILITY.gauge(),
    exit_depth: Gauge<f64> = EXIT_DEPTH.gauge(),
    exit_entropy: Gauge<f64> = EXIT_ENTROPY.gauge(),
    gradient_norm: Gauge<f64> = GRADIENT_NORM.gauge(),
    learning_rate: Gauge<f64> = LEARNING_RATE.gauge(),
    step_duration: Histogram<f64> = STEP_DURATION.histogram(),
    section_duration: Histogram<f64> = SECTION_DURATION.histogram(),
    compute_rate: Gauge<f64> = COMPUTE_RATE.gauge(),
    mfu: Gauge<f64> = MFU.gauge(),
    generation: Gauge<f64> = GENERATION.gauge(),
    world: Gauge<f64> = WORLD.gauge(),
    generations: Counter<u64> = GENERATIONS.counter(),
    workers_joined: Counter<u64> = WORKERS_JOINED.counter(),
    workers_refused: Counter<u64> = WORKERS_REFUSED.counter(),
    workers_lost: Counter<u64> = WORKERS_LOST.counter(),
    skipped: Counter<u64> = SKIPPED.counter(),
    stragglers: Counter<u64> = STRAGGLERS.counter(),
    rewinds: Counter<u64> = REWINDS.counter(),
    checkpoint_step: Gauge<f64> = CHECKPOINT_STEP.gauge(),
    checkpoint_size: Gauge<f64> = CHECKPOINT_SIZE.gauge(),
    checkpoint_duration: Histogram<f64> = CHECKPOINT_DURATION.histogram(),
    checkpoint_stall: Histogram<f64> = CHECKPOINT_STALL.histogram(),
    checkpoint_failures: Counter<u64> = CHECKPOINT_FAILURES.counter(),
    checkpoint_delays: Counter<u64> = CHECKPOINT_DELAYS.counter(),
    validation_loss: Gauge<f64> = VALIDATION_LOSS.gauge(),
    validation_loop_loss: Gauge<f64> = VALIDATION_LOOP_LOSS.gauge(),
    validation_perplexity: Gauge<f64> = VALIDATION_PERPLEXITY.gauge(),
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
    (metrics::RETRIED, |it| it.of_snapshot(|snapshot| snapshot.retried_steps as f64)),
    (metrics::DIVERGENCES, |it| it.of_snapshot(|snapshot| snapshot.divergences as f64)),
    (metrics::GOODPUT, |it| {
        let share = it.board.of_ledger(crate::ledger::Ledger::share).flatten();
        share.map(|share| (vec![], share)).into_iter().collect()
    }),
    (metrics::GOODPUT_TIME, |it| {
        let seconds = it.board.of_ledger(|ledger| {
            Category::ALL
                .map(|category| (vec![category.name().to_owned()], ledger.seconds(category)))
        });
        seconds.into_iter().flatten().collect()
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

    fn of_snapshot(&self, value: impl Fn(&Snapshot) -> f64) -> Vec<Series> {
        self.snapshot().map(|snapshot| (vec![], value(&snapshot))).into_iter().collect()
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

fn per_loop(gauge: &Gauge<f64>, values: &[f64]) {
    for (index, value) in values.iter().enumerate() {
        gauge.record(*value, &[KeyValue::new("loop", (index + 1).to_string())]);
    }
}

impl Instruments {
    /// Gives counters that may stay at nothing for long a series at once: who asks how much one has
    /// grown could not see it begin otherwise.
    fn begin(&self, spec: &Spec) {
        for counter in [
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
            RunEvent::Evaluated(record) => self.record_evaluation(record),
            RunEvent::Formed { generation, world, .. } => {
                self.generations.add(1, &[]);
                self.generation.record(generation.0 as f64, &[]);
                self.world.record(f64::from(*world), &[]);
            }
            RunEvent::WorkerJoined { .. } => self.workers_joined.add(1, &[]),
            RunEvent::WorkerRefused { .. } => self.workers_refused.add(1, &[]),
            RunEvent::WorkerLost { cause, .. } => {
                self.workers_lost.add(1, &[KeyValue::new("cause", cause.to_string())]);
            }
            RunEvent::Rewound { .. } => self.rewinds.add(1, &[]),
            RunEvent::CheckpointSaved { step, seconds, bytes, stall } => {
                self.checkpoint_stall.record(*stall, &[]);
                self.checkpoint_step.record(step.0 as f64, &[]);
                self.checkpoint_size.record(*bytes as f64, &[]);
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
            RunEvent::Waiting { .. }
            | RunEvent::CaughtUp { .. }
            | RunEvent::GateRecovered { .. }
            | RunEvent::LoopLossFalls { .. }
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
        self.step.record(record.step.0 as f64, &[]);
        self.run_tokens.record(record.tokens as f64, &[]);
        self.loss.record(record.loss, &[]);
        per_loop(&self.loop_loss, &record.loss_per_loop);
        per_loop(&self.loop_loss_above_lowest, &record.loss_rise_per_loop);
        per_loop(&self.loop_hidden_rms, &record.hidden_rms_per_loop);
        per_loop(&self.loop_gradient_norm, &record.gradient_norm_per_loop);
        per_loop(&self.loop_agreement, &record.agreement_per_loop);
        per_loop(&self.exit_probability, &record.exit_pdf);
        self.exit_depth.record(record.mean_depth, &[]);
        self.exit_entropy.record(record.entropy, &[]);
        self.gradient_norm.record(record.grad_norm, &[]);
        self.learning_rate.record(record.lr, &[]);
        self.step_duration.record(record.seconds, &[]);
        if record.seconds > 0.0 {
            self.compute_rate.record(record.flops / record.seconds, &[]);
        }
        if let Some(mfu) = record.mfu {
            self.mfu.record(mfu, &[]);
        }
        for (name, seconds) in by_section(record.sections) {
            self.section_duration.record(seconds, &[KeyValue::new("section", name)]);
        }
    }

    fn record_evaluation(&self, record: &EvaluationRecord) {
        self.validation_loss.record(record.loss, &[]);
        per_loop(&self.validation_loop_loss, &record.loss_per_loop);
        self.validation_perplexity.record(record.perplexity, &[]);
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
