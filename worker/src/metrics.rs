//! The metrics of a worker: where the blocks of its datasets come from.
//!
//! [`CATALOGUE`] is the one list of names, units and labels; the instruments are made from it.

use looptrain_storage::{ReadCounts, Reading};
use opentelemetry::{KeyValue, global};

/// One metric, a counter.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// OpenTelemetry name.
    pub name: &'static str,
    /// Unit in UCUM; braces for things that are counted.
    pub unit: &'static str,
    /// Labels of its series.
    pub labels: &'static [&'static str],
    /// What it tells, in a sentence.
    pub help: &'static str,
    /// The series, each with the value of its label.
    series: &'static [Series],
}

/// The value of a label, and the count under it.
type Series = (&'static str, fn(&ReadCounts) -> u64);

/// Every metric of a worker.
pub const CATALOGUE: &[Metric] = &[
    Metric {
        name: "looptrain.feed.blocks",
        unit: "{block}",
        labels: &["source"],
        help: "Blocks of datasets that were wanted and lay in memory or on the local disk, and reads of the store for the others.",
        series: &[
            ("memory", |counts| counts.memory),
            ("disk", |counts| counts.disk),
            ("store", |counts| counts.store),
        ],
    },
    Metric {
        name: "looptrain.feed.store.size",
        unit: "By",
        labels: &[],
        help: "Bytes of datasets that came from the store.",
        series: &[("", |counts| counts.store_bytes)],
    },
    Metric {
        name: "looptrain.feed.hedged",
        unit: "{read}",
        labels: &["winner"],
        help: "Slow reads of the store that got a second one beside them, by which was done first.",
        series: &[
            ("first", |counts| counts.hedged - counts.overtaken),
            ("second", |counts| counts.overtaken),
        ],
    },
    Metric {
        name: "looptrain.feed.damaged",
        unit: "{block}",
        labels: &[],
        help: "Blocks that were not what was written, on the local disk or on their way, and were read again.",
        series: &[("", |counts| counts.damaged)],
    },
];

/// Has the counts of `reading` reported whenever somebody looks at the metrics.
pub(crate) fn observe(reading: &Reading) {
    let meter = global::meter("looptrain");
    for metric in CATALOGUE {
        let reading = reading.clone();
        meter
            .u64_observable_counter(metric.name)
            .with_unit(metric.unit)
            .with_description(metric.help)
            .with_callback(move |observer| {
                let counts = reading.counts();
                for (label, count) in metric.series {
                    let labels = metric.labels.iter().map(|&name| KeyValue::new(name, *label));
                    observer.observe(count(&counts), &labels.collect::<Vec<_>>());
                }
            })
            .build();
    }
}
