//! The catalogue of metrics, and the instruments that feed it.
//!
//! [`CATALOGUE`] is the one list of names, kinds, units and labels; instruments are made from its
//! entries and from nothing else, so it is complete. Names follow OpenTelemetry; a Prometheus
//! exporter writes `looptrain.step.duration` in seconds as `looptrain_step_duration_seconds`.

use opentelemetry::metrics::{Counter, Gauge, Histogram, Meter};
use opentelemetry::{KeyValue, global};

use crate::records::{EvaluationRecord, RunEvent, StepRecord};

/// What an instrument does with values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// The newest value.
    Gauge,
    /// A distribution.
    Histogram,
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// OpenTelemetry name.
    pub name: &'static str,
    /// What it does with values.
    pub kind: Kind,
    /// Unit in UCUM; braces for things that are counted.
    pub unit: &'static str,
    /// Labels of its series.
    pub labels: &'static [&'static str],
    /// What it tells, in a sentence.
    pub help: &'static str,
}

macro_rules! catalogue {
    ($($id:ident: $kind:ident $name:literal [$unit:literal] {$($label:literal),*} $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                unit: $unit,
                labels: &[$($label),*],
                help: $help,
            };
        )*

        /// Every metric of the coordinator.
        pub const CATALOGUE: &[Metric] = &[$($id),*];
    };
}

catalogue! {
    STEPS: Counter "looptrain.steps" ["{step}"] {} "Steps committed by this coordinator.";
    TOKENS: Counter "looptrain.tokens" ["{token}"] {} "Tokens of the steps committed by this coordinator.";
    STEP: Gauge "looptrain.step" ["{step}"] {} "The newest committed step.";
    RUN_TOKENS: Gauge "looptrain.run.tokens" ["{token}"] {} "Tokens consumed since the run began.";
    LOSS: Gauge "looptrain.loss" ["{nat}"] {} "Stage I training loss of the newest step, nats per token.";
    LOOP_LOSS: Gauge "looptrain.loop.loss" ["{nat}"] {"loop"} "Training cross-entropy after each loop, nats per token.";
    LOOP_LOSS_ABOVE_LOWEST: Gauge "looptrain.loop.loss.above_lowest" ["{nat}"] {"loop"} "How far a loop's smoothed cross-entropy is above its lowest of the stage.";
    LOOP_LOSS_RISES: Counter "looptrain.loop.loss.rises" ["{rise}"] {"loop"} "Times that a loop's cross-entropy began to rise above its lowest of the stage.";
    GATE_COLLAPSES: Counter "looptrain.gate.collapses" ["{collapse}"] {} "Times that nearly all of the exit distribution came to be after one loop.";
    LOOP_HIDDEN_RMS: Gauge "looptrain.loop.hidden.rms" ["1"] {"loop"} "Root mean square of a token's residual stream at the end of each loop, the mean over tokens.";
    LOOP_GRADIENT_NORM: Gauge "looptrain.loop.gradient.norm" ["1"] {"loop"} "Root mean square over tokens of the norm of the gradient by a token's state after each loop.";
    LOOP_AGREEMENT: Gauge "looptrain.loop.agreement" ["1"] {"loop"} "Share of the tokens whose likeliest successor after each loop is that after the last.";
    EXIT_PROBABILITY: Gauge "looptrain.exit.probability" ["1"] {"loop"} "Mean exit probability of each loop.";
    EXIT_DEPTH: Gauge "looptrain.exit.depth" ["{loop}"] {} "Mean loop of exit, counted from 1.";
    EXIT_ENTROPY: Gauge "looptrain.exit.entropy" ["{nat}"] {} "Mean entropy of the exit distribution.";
    GRADIENT_NORM: Gauge "looptrain.gradient.norm" ["1"] {} "Euclidean norm of the gradient before clipping.";
    LEARNING_RATE: Gauge "looptrain.learning_rate" ["1"] {} "Learning rate of the newest step.";
    STEP_DURATION: Histogram "looptrain.step.duration" ["s"] {} "Time from a step's plan to its commit.";
    SECTION_DURATION: Histogram "looptrain.section.duration" ["s"] {"section"} "Time of the slowest rank in a section of the step.";
    COMPUTE_RATE: Gauge "looptrain.compute.rate" ["{operation}/s"] {} "Floating-point operations per second of the newest step as the model needs them, without document masking, all workers together.";
    MFU: Gauge "looptrain.mfu" ["1"] {} "Model FLOPs utilization of the newest step: the share of what the workers' devices could do, where the spec says it.";
    GENERATION: Gauge "looptrain.generation" ["{generation}"] {} "The current generation.";
    WORLD: Gauge "looptrain.world" ["{worker}"] {} "Members of the current generation.";
    GENERATIONS: Counter "looptrain.generations" ["{generation}"] {} "Generations formed by this coordinator.";
    WORKERS_JOINED: Counter "looptrain.workers.joined" ["{worker}"] {} "Workers welcomed.";
    WORKERS_REFUSED: Counter "looptrain.workers.refused" ["{worker}"] {} "Workers turned away.";
    WORKERS_LOST: Counter "looptrain.workers.lost" ["{worker}"] {} "Workers that died, left or were sent away.";
    SKIPPED: Counter "looptrain.steps.skipped" ["{step}"] {} "Steps committed without an update, for a slot had no usable gradient.";
    STRAGGLERS: Counter "looptrain.stragglers" ["{worker}"] {"section"} "Times that a worker began to take much longer than the others in a section of its steps.";
    REWINDS: Counter "looptrain.rewinds" ["{rewind}"] {} "Times that committed steps had to be done again from a checkpoint.";
    CHECKPOINT_STEP: Gauge "looptrain.checkpoint.step" ["{step}"] {} "Step of the newest checkpoint.";
    CHECKPOINT_SIZE: Gauge "looptrain.checkpoint.size" ["By"] {} "Size of the newest checkpoint.";
    CHECKPOINT_DURATION: Histogram "looptrain.checkpoint.duration" ["s"] {} "Time from the directive to save to the manifest.";
    CHECKPOINT_FAILURES: Counter "looptrain.checkpoint.failures" ["{checkpoint}"] {} "Checkpoints that were given up.";
    CHECKPOINT_DELAYS: Counter "looptrain.checkpoint.delays" ["{checkpoint}"] {} "Checkpoints that were due while another one was being written.";
    VALIDATION_LOSS: Gauge "looptrain.validation.loss" ["{nat}"] {} "Stage I loss on the validation split, nats per token.";
    VALIDATION_LOOP_LOSS: Gauge "looptrain.validation.loop.loss" ["{nat}"] {"loop"} "Validation cross-entropy after each loop, nats per token.";
    VALIDATION_PERPLEXITY: Gauge "looptrain.validation.perplexity" ["1"] {} "Perplexity of the last loop on the validation split.";
}

fn counter(meter: &Meter, metric: Metric) -> Counter<u64> {
    meter.u64_counter(metric.name).with_unit(metric.unit).with_description(metric.help).build()
}

fn gauge(meter: &Meter, metric: Metric) -> Gauge<f64> {
    meter.f64_gauge(metric.name).with_unit(metric.unit).with_description(metric.help).build()
}

/// Upper bounds of the histograms' buckets, in seconds: a step takes milliseconds on a small model
/// and minutes on a large one.
const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

fn histogram(meter: &Meter, metric: Metric) -> Histogram<f64> {
    meter
        .f64_histogram(metric.name)
        .with_unit(metric.unit)
        .with_description(metric.help)
        .with_boundaries(SECONDS.to_vec())
        .build()
}

macro_rules! instruments {
    ($($field:ident: $type:ty = $make:ident($id:ident),)*) => {
        /// One instrument for each entry of the catalogue.
        pub(crate) struct Instruments {
            $($field: $type,)*
        }

        impl Instruments {
            /// Instruments on the process's global meter.
            pub(crate) fn new() -> Self {
                let meter = global::meter("looptrain");
                Self { $($field: $make(&meter, $id),)* }
            }
        }

        #[cfg(test)]
        const USED: &[Metric] = &[$($id),*];
    };
}

instruments! {
    steps: Counter<u64> = counter(STEPS),
    tokens: Counter<u64> = counter(TOKENS),
    step: Gauge<f64> = gauge(STEP),
    run_tokens: Gauge<f64> = gauge(RUN_TOKENS),
    loss: Gauge<f64> = gauge(LOSS),
    loop_loss: Gauge<f64> = gauge(LOOP_LOSS),
    loop_loss_above_lowest: Gauge<f64> = gauge(LOOP_LOSS_ABOVE_LOWEST),
    loop_loss_rises: Counter<u64> = counter(LOOP_LOSS_RISES),
    gate_collapses: Counter<u64> = counter(GATE_COLLAPSES),
    loop_hidden_rms: Gauge<f64> = gauge(LOOP_HIDDEN_RMS),
    loop_gradient_norm: Gauge<f64> = gauge(LOOP_GRADIENT_NORM),
    loop_agreement: Gauge<f64> = gauge(LOOP_AGREEMENT),
    exit_probability: Gauge<f64> = gauge(EXIT_PROBABILITY),
    exit_depth: Gauge<f64> = gauge(EXIT_DEPTH),
    exit_entropy: Gauge<f64> = gauge(EXIT_ENTROPY),
    gradient_norm: Gauge<f64> = gauge(GRADIENT_NORM),
    learning_rate: Gauge<f64> = gauge(LEARNING_RATE),
    step_duration: Histogram<f64> = histogram(STEP_DURATION),
    section_duration: Histogram<f64> = histogram(SECTION_DURATION),
    compute_rate: Gauge<f64> = gauge(COMPUTE_RATE),
    mfu: Gauge<f64> = gauge(MFU),
    generation: Gauge<f64> = gauge(GENERATION),
    world: Gauge<f64> = gauge(WORLD),
    generations: Counter<u64> = counter(GENERATIONS),
    workers_joined: Counter<u64> = counter(WORKERS_JOINED),
    workers_refused: Counter<u64> = counter(WORKERS_REFUSED),
    workers_lost: Counter<u64> = counter(WORKERS_LOST),
    skipped: Counter<u64> = counter(SKIPPED),
    stragglers: Counter<u64> = counter(STRAGGLERS),
    rewinds: Counter<u64> = counter(REWINDS),
    checkpoint_step: Gauge<f64> = gauge(CHECKPOINT_STEP),
    checkpoint_size: Gauge<f64> = gauge(CHECKPOINT_SIZE),
    checkpoint_duration: Histogram<f64> = histogram(CHECKPOINT_DURATION),
    checkpoint_failures: Counter<u64> = counter(CHECKPOINT_FAILURES),
    checkpoint_delays: Counter<u64> = counter(CHECKPOINT_DELAYS),
    validation_loss: Gauge<f64> = gauge(VALIDATION_LOSS),
    validation_loop_loss: Gauge<f64> = gauge(VALIDATION_LOOP_LOSS),
    validation_perplexity: Gauge<f64> = gauge(VALIDATION_PERPLEXITY),
}

fn per_loop(gauge: &Gauge<f64>, values: &[f64]) {
    for (index, value) in values.iter().enumerate() {
        gauge.record(*value, &[KeyValue::new("loop", (index + 1).to_string())]);
    }
}

impl Instruments {
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
            RunEvent::WorkerLost { .. } => self.workers_lost.add(1, &[]),
            RunEvent::Rewound { .. } => self.rewinds.add(1, &[]),
            RunEvent::CheckpointSaved { step, seconds, bytes } => {
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
        let sections = record.sections;
        for (name, seconds) in [
            ("data_wait", sections.data_wait),
            ("compute", sections.compute),
            ("reduce", sections.reduce),
            ("optimizer", sections.optimizer),
            ("send", sections.send),
        ] {
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

    use super::*;

    #[test]
    fn the_catalogue_and_the_instruments_are_the_same_list() {
        let names = |metrics: &[Metric]| -> BTreeSet<&str> {
            metrics.iter().map(|metric| metric.name).collect()
        };
        assert_eq!(names(CATALOGUE), names(USED));
        assert_eq!(CATALOGUE.len(), names(CATALOGUE).len(), "a name is there twice");
        assert!(CATALOGUE.iter().all(|metric| metric.help.ends_with('.')));
    }
}
