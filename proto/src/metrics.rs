//! The catalogue of metrics: the one list of names, kinds, units, labels and who reports them.
//!
//! Instruments are made from its entries and from nothing else, so it is complete; `docs/metrics.md` is
//! written from it, and what dashboards and alert rules ask for is looked up in it. Names follow
//! OpenTelemetry; [`Metric::prometheus`] is what an exporter for Prometheus makes of one.

use std::fmt::Write;

use opentelemetry::KeyValue;
use opentelemetry::global;
use opentelemetry::metrics::{AsyncInstrument, Counter, Gauge, Histogram, Meter};

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

/// Which processes report a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reporter {
    /// The coordinator, for the whole run.
    Coordinator,
    /// Each worker, for itself.
    Worker,
    /// Each worker with a GPU, for that.
    Gpu,
    /// Every process, for itself.
    All,
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// OpenTelemetry name.
    pub name: &'static str,
    /// What it does with values.
    pub kind: Kind,
    /// Unit in UCUM; braces for things that are counted, empty for a number that is none.
    pub unit: &'static str,
    /// Labels of its series.
    pub labels: &'static [&'static str],
    /// Who reports it.
    pub reporter: Reporter,
    /// What it tells, in a sentence.
    pub help: &'static str,
}

macro_rules! catalogue {
    ($($id:ident: $kind:ident $name:literal [$unit:literal] {$($label:literal),*} $reporter:ident $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                unit: $unit,
                labels: &[$($label),*],
                reporter: Reporter::$reporter,
                help: $help,
            };
        )*

        /// Every metric.
        pub const CATALOGUE: &[Metric] = &[$($id),*];
    };
}

catalogue! {
    RUN_INFO: Gauge "looptrain.run.info" [""] {"run", "version"} Coordinator "Always 1; its labels name the run and the release that trains it.";
    RUN_PHASE: Gauge "looptrain.run.phase" [""] {"phase"} Coordinator "1 for the phase that the run is in (waiting, forming, training, evaluating, paused, finishing, finished or failed), 0 for the others.";
    RUN_STEPS: Gauge "looptrain.run.steps" ["{step}"] {} Coordinator "Steps of the whole run.";
    STEP: Gauge "looptrain.step" ["{step}"] {} Coordinator "The newest committed step.";
    STEPS: Counter "looptrain.steps" ["{step}"] {} Coordinator "Steps committed by this coordinator.";
    TOKENS: Counter "looptrain.tokens" ["{token}"] {} Coordinator "Tokens of the steps committed by this coordinator.";
    RUN_TOKENS: Gauge "looptrain.run.tokens" ["{token}"] {} Coordinator "Tokens consumed since the run began.";
    COMMIT_AGE: Gauge "looptrain.commit.age" ["s"] {} Coordinator "Time since the newest commit; before the first one of this coordinator, since its start.";
    LOSS: Gauge "looptrain.loss" ["{nat}"] {} Coordinator "Stage I training loss of the newest step, nats per token.";
    LOOP_LOSS: Gauge "looptrain.loop.loss" ["{nat}"] {"loop"} Coordinator "Training cross-entropy after each loop, nats per token.";
    LOOP_LOSS_ABOVE_LOWEST: Gauge "looptrain.loop.loss.above_lowest" ["{nat}"] {"loop"} Coordinator "How far a loop's smoothed cross-entropy is above its lowest of the stage.";
    LOOP_LOSS_RISES: Counter "looptrain.loop.loss.rises" ["{rise}"] {"loop"} Coordinator "Times that a loop's cross-entropy began to rise above its lowest of the stage.";
    GATE_COLLAPSES: Counter "looptrain.gate.collapses" ["{collapse}"] {} Coordinator "Times that nearly all of the exit distribution came to be after one loop.";
    LOOP_HIDDEN_RMS: Gauge "looptrain.loop.hidden.rms" ["1"] {"loop"} Coordinator "Root mean square of a token's residual stream at the end of each loop, the mean over tokens.";
    LOOP_GRADIENT_NORM: Gauge "looptrain.loop.gradient.norm" ["1"] {"loop"} Coordinator "Root mean square over tokens of the norm of the gradient by a token's state after each loop.";
    LOOP_AGREEMENT: Gauge "looptrain.loop.agreement" ["1"] {"loop"} Coordinator "Share of the tokens whose likeliest successor after each loop is that after the last.";
    EXIT_PROBABILITY: Gauge "looptrain.exit.probability" ["1"] {"loop"} Coordinator "Mean exit probability of each loop.";
    EXIT_DEPTH: Gauge "looptrain.exit.depth" ["{loop}"] {} Coordinator "Mean loop of exit, counted from 1.";
    EXIT_ENTROPY: Gauge "looptrain.exit.entropy" ["{nat}"] {} Coordinator "Mean entropy of the exit distribution.";
    GRADIENT_NORM: Gauge "looptrain.gradient.norm" ["1"] {} Coordinator "Euclidean norm of the gradient before clipping.";
    LEARNING_RATE: Gauge "looptrain.learning_rate" ["1"] {} Coordinator "Learning rate of the newest step.";
    STEP_DURATION: Histogram "looptrain.step.duration" ["s"] {} Coordinator "Time from a step's plan to its commit.";
    SECTION_DURATION: Histogram "looptrain.section.duration" ["s"] {"section"} Coordinator "Time of the slowest rank in a section of the step.";
    WORKER_SECTION_DURATION: Gauge "looptrain.worker.section.duration" ["s"] {"worker", "rank", "section"} Coordinator "Time of each member of the generation in a section of its newest step.";
    WORKER_SLOTS: Gauge "looptrain.worker.slots" ["{slot}"] {"worker", "rank"} Coordinator "Slots of each member in the step in flight.";
    WORKER_SLOT_RATE: Gauge "looptrain.worker.slot.rate" ["{slot}/s"] {"worker", "rank"} Coordinator "Slots that each member computes in a second.";
    WORKER_STRAGGLES: Gauge "looptrain.worker.straggles" [""] {"worker", "rank", "section"} Coordinator "1 for each member that takes much longer than the others in a section of its steps (data, compute, reduce or commit); no series for the others.";
    COMPUTE_RATE: Gauge "looptrain.compute.rate" ["{operation}/s"] {} Coordinator "Floating-point operations per second of the newest step as the model needs them, without document masking, all workers together.";
    MFU: Gauge "looptrain.mfu" ["1"] {} Coordinator "Model FLOPs utilization of the newest step: the share of what the workers' devices could do, where the spec says it.";
    GENERATION: Gauge "looptrain.generation" ["{generation}"] {} Coordinator "The current generation.";
    WORLD: Gauge "looptrain.world" ["{worker}"] {} Coordinator "Members of the current generation.";
    GENERATIONS: Counter "looptrain.generations" ["{generation}"] {} Coordinator "Generations formed by this coordinator.";
    WORKERS_JOINED: Counter "looptrain.workers.joined" ["{worker}"] {} Coordinator "Workers welcomed.";
    WORKERS_REFUSED: Counter "looptrain.workers.refused" ["{worker}"] {} Coordinator "Workers turned away.";
    WORKERS_LOST: Counter "looptrain.workers.lost" ["{worker}"] {"cause"} Coordinator "Workers that are gone: died (their connection broke), fell silent, left (told to, or by themselves) or were expelled for a fault of theirs.";
    SKIPPED: Counter "looptrain.steps.skipped" ["{step}"] {} Coordinator "Steps committed without an update: a slot had no usable gradient, or the step was a spike.";
    RETRIED: Counter "looptrain.steps.retried" ["{step}"] {} Coordinator "Steps that were planned again, for the generation ended before their commit.";
    STRAGGLERS: Counter "looptrain.stragglers" ["{worker}"] {"section"} Coordinator "Times that a worker began to take much longer than the others in a section of its steps.";
    REWINDS: Counter "looptrain.rewinds" ["{rewind}"] {} Coordinator "Times that committed steps had to be done again from a checkpoint.";
    DIVERGENCES: Counter "looptrain.divergences" ["{divergence}"] {} Coordinator "Times that workers disagreed on a gradient or on weights.";
    GOODPUT: Gauge "looptrain.goodput" ["1"] {} Coordinator "Share of the time of all workers since the run began that was productive: part of a step that was committed for the first time, or of an evaluation.";
    RUN_TIME: Gauge "looptrain.run.time" ["s"] {"category"} Coordinator "Time of all workers since the run began, added up, by what became of it.";
    GOODPUT_TIME: Counter "looptrain.goodput.time" ["s"] {"category"} Coordinator "Time of all workers under this coordinator, added up, by what became of it.";
    CHECKPOINT_STEP: Gauge "looptrain.checkpoint.step" ["{step}"] {} Coordinator "Step of the newest checkpoint.";
    CHECKPOINT_SIZE: Gauge "looptrain.checkpoint.size" ["By"] {} Coordinator "Size of the newest checkpoint.";
    CHECKPOINT_AGE: Gauge "looptrain.checkpoint.age" ["s"] {} Coordinator "Time since the newest checkpoint was written; before the first one, since this coordinator's start.";
    CHECKPOINT_DURATION: Histogram "looptrain.checkpoint.duration" ["s"] {} Coordinator "Time from the directive to save to the manifest.";
    CHECKPOINT_STALL: Histogram "looptrain.checkpoint.stall" ["s"] {} Coordinator "Longest time that a member stood still to copy its state for a checkpoint.";
    CHECKPOINT_FAILURES: Counter "looptrain.checkpoint.failures" ["{checkpoint}"] {} Coordinator "Checkpoints that were given up.";
    CHECKPOINT_DELAYS: Counter "looptrain.checkpoint.delays" ["{checkpoint}"] {} Coordinator "Checkpoints that were due while another one was being written.";
    VALIDATION_LOSS: Gauge "looptrain.validation.loss" ["{nat}"] {} Coordinator "Stage I loss on the validation split, nats per token.";
    VALIDATION_LOOP_LOSS: Gauge "looptrain.validation.loop.loss" ["{nat}"] {"loop"} Coordinator "Validation cross-entropy after each loop, nats per token.";
    VALIDATION_PERPLEXITY: Gauge "looptrain.validation.perplexity" ["1"] {} Coordinator "Perplexity of the last loop on the validation split.";
    STORE_OPERATIONS: Counter "looptrain.store.operations" ["{operation}"] {"operation", "outcome"} All "Calls to the object store that are over, all attempts of one counted once; `failed` are those that no attempt could do.";
    STORE_RETRIES: Counter "looptrain.store.retries" ["{retry}"] {"operation"} All "Attempts at a call to the object store after one that failed.";
    STORE_OPERATION_DURATION: Histogram "looptrain.store.operation.duration" ["s"] {"operation"} All "Time of a call to the object store, all its attempts and pauses.";
    CONNECTIONS_REFUSED: Counter "looptrain.connections.refused" ["{connection}"] {"port", "reason"} All "Connections to a port of this process (coordinator, peers or page) that were turned away: certificate (none, or one that is not good), role (a good one, of a role that may not do this), token (one that is not known, at the page), stranger (it speaks another language), silent (it said nothing in time) or crowded (it gave way to newer ones while it said nothing).";
    TLS_CERTIFICATE_EXPIRY: Gauge "looptrain.tls.certificate.expiry" ["s"] {} All "When the certificate of this process ends, in seconds since 1970; no series without TLS.";
    TELEMETRY_DROPPED: Counter "looptrain.telemetry.dropped" ["{item}"] {"signal"} All "Spans and log records that found the queue of the exporter full, or that nobody took.";
    GPU_TEMPERATURE: Gauge "looptrain.gpu.temperature" ["Cel"] {"gpu"} Gpu "Temperature of the GPU.";
    GPU_POWER: Gauge "looptrain.gpu.power" ["W"] {"gpu"} Gpu "Power that the GPU takes.";
    GPU_UTILIZATION: Gauge "looptrain.gpu.utilization" ["1"] {"gpu"} Gpu "Share of the last moments in which the GPU computed something.";
    GPU_MEMORY_USED: Gauge "looptrain.gpu.memory.used" ["By"] {"gpu"} Gpu "Memory of the GPU that is taken, by whomever.";
    GPU_MEMORY_SIZE: Gauge "looptrain.gpu.memory.size" ["By"] {"gpu"} Gpu "Memory of the GPU.";
    GPU_ECC_ERRORS: Counter "looptrain.gpu.ecc.errors" ["{error}"] {"gpu", "severity"} Gpu "Errors in the GPU's memory since its driver was loaded, `corrected` or `uncorrected`; of memory that has error correction.";
    GPU_THROTTLED: Gauge "looptrain.gpu.throttled" [""] {"gpu", "reason"} Gpu "1 while a reason (thermal, power or hardware) holds the GPU's clocks down.";
    FEED_BLOCKS: Counter "looptrain.feed.blocks" ["{block}"] {"source"} Worker "Blocks of datasets that were wanted and lay in memory or on the local disk, and reads of the store for the others.";
    FEED_STORE_SIZE: Counter "looptrain.feed.store.size" ["By"] {} Worker "Bytes of datasets that came from the store.";
    FEED_HEDGED: Counter "looptrain.feed.hedged" ["{read}"] {"winner"} Worker "Slow reads of the store that got a second one beside them, by which was done first.";
    FEED_DAMAGED: Counter "looptrain.feed.damaged" ["{block}"] {} Worker "Blocks that were not what was written, on the local disk or on their way, and were read again.";
}

/// Upper bounds of the histograms' buckets, in seconds: a step takes milliseconds on a small model
/// and minutes on a large one.
const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// A series of an observed metric: values of its labels, in their order, and its value.
pub type Series = (Vec<String>, f64);

impl Metric {
    /// An instrument for a counter, on the process's global meter.
    #[must_use]
    pub fn counter(self) -> Counter<u64> {
        meter().u64_counter(self.name).with_unit(self.unit).with_description(self.help).build()
    }

    /// An instrument for a gauge, on the process's global meter.
    #[must_use]
    pub fn gauge(self) -> Gauge<f64> {
        meter().f64_gauge(self.name).with_unit(self.unit).with_description(self.help).build()
    }

    /// An instrument for a distribution of seconds, on the process's global meter.
    #[must_use]
    pub fn histogram(self) -> Histogram<f64> {
        meter()
            .f64_histogram(self.name)
            .with_unit(self.unit)
            .with_description(self.help)
            .with_boundaries(SECONDS.to_vec())
            .build()
    }

    /// Has a gauge or a counter read whenever somebody looks at the metrics.
    pub fn observe(self, read: impl Fn() -> Vec<Series> + Send + Sync + 'static) {
        let labels = self.labels;
        let named = move |values: Vec<String>| -> Vec<KeyValue> {
            labels.iter().zip(values).map(|(name, value)| KeyValue::new(*name, value)).collect()
        };
        let tell = move |observer: &dyn AsyncInstrument<f64>| {
            for (labels, value) in read() {
                observer.observe(value, &named(labels));
            }
        };
        match self.kind {
            Kind::Counter => drop(
                meter()
                    .f64_observable_counter(self.name)
                    .with_unit(self.unit)
                    .with_description(self.help)
                    .with_callback(tell)
                    .build(),
            ),
            Kind::Gauge => drop(
                meter()
                    .f64_observable_gauge(self.name)
                    .with_unit(self.unit)
                    .with_description(self.help)
                    .with_callback(tell)
                    .build(),
            ),
            // A distribution has no newest value.
            Kind::Histogram => {}
        }
    }

    /// Its name for Prometheus; a histogram has `_bucket`, `_sum` and `_count` behind it.
    #[must_use]
    pub fn prometheus(self) -> String {
        let unit = match (self.unit, self.kind) {
            ("s", _) => "_seconds",
            ("By", _) => "_bytes",
            ("Cel", _) => "_celsius",
            ("W", _) => "_watts",
            ("1", Kind::Gauge) => "_ratio",
            (unit, _) if unit.ends_with("/s") => "_per_second",
            _ => "",
        };
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{total}", self.name.replace('.', "_"))
    }
}

fn meter() -> Meter {
    global::meter("looptrain")
}

/// The catalogue as a page for people, in Markdown.
#[must_use]
pub fn reference() -> String {
    let mut page = String::from(INTRODUCTION);
    for (reporter, title, words) in [
        (Reporter::Coordinator, "The coordinator", "One series each for the whole run."),
        (Reporter::Worker, "Workers", "Each worker for itself."),
        (
            Reporter::Gpu,
            "GPUs",
            "Each worker with an NVIDIA GPU for that, by its UUID, as the driver's management library tells it.",
        ),
        (Reporter::All, "Every process", "Coordinator and workers, each for itself."),
    ] {
        let _ = write!(page, "\n## {title}\n\n{words}\n\n");
        page.push_str("| OpenTelemetry | Prometheus | kind | unit | labels | what it tells |\n");
        page.push_str("|---|---|---|---|---|---|\n");
        for metric in CATALOGUE.iter().filter(|metric| metric.reporter == reporter) {
            let kind = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            let labels: Vec<String> =
                metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let _ = writeln!(
                page,
                "| `{}` | `{}` | {kind} | {} | {} | {} |",
                metric.name,
                metric.prometheus(),
                metric.unit,
                labels.join(", "),
                metric.help
            );
        }
    }
    page
}

const INTRODUCTION: &str = "\
# Metrics

This page is written from the catalogue in `proto/src/metrics.rs`; a test compares the two.

The coordinator serves its metrics for Prometheus at `/metrics` beside the status page
(`--dashboard ADDR`), a worker where its `--metrics ADDR` says. With `OTEL_EXPORTER_OTLP_ENDPOINT` (or
`OTEL_EXPORTER_OTLP_METRICS_ENDPOINT`) set they leave over OTLP as well, every
`OTEL_METRIC_EXPORT_INTERVAL` milliseconds. Names at `/metrics` are those of the second column; a histogram
has `_bucket`, `_sum` and `_count` behind it. Dashboards are in `ops/grafana/`, alert rules in
`ops/prometheus/`, what to do about an alert in [runbooks.md](runbooks.md).

Categories of `looptrain.run.time` and `looptrain.goodput.time`: see [operations.md](operations.md#goodput).
";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_there_once_and_help_is_a_sentence() {
        let names: BTreeSet<String> = CATALOGUE.iter().map(|metric| metric.prometheus()).collect();
        assert_eq!(names.len(), CATALOGUE.len(), "a name is there twice");
        assert!(CATALOGUE.iter().all(|metric| metric.help.ends_with('.')));
        let seconds = |metric: &&Metric| metric.kind == Kind::Histogram;
        assert!(CATALOGUE.iter().filter(seconds).all(|metric| metric.unit == "s"));
    }

    #[test]
    fn the_reference_page_is_that_of_the_catalogue() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        if std::env::var_os("LOOPTRAIN_WRITE_REFERENCE").is_some() {
            std::fs::write(path, reference()).unwrap_or_else(|error| panic!("{path}: {error}"));
        }
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            page == reference(),
            "docs/metrics.md is not what the catalogue says; run this test with \
             LOOPTRAIN_WRITE_REFERENCE=1 to write it"
        );
    }
}
