//! The metrics of a worker: where the blocks of its datasets come from.

use looptrain_proto::metrics::{self, Metric};
use looptrain_storage::{ReadCounts, Reading};

/// A count that is reported under a value of its metric's label.
type Labelled = (&'static str, fn(&ReadCounts) -> u64);

/// What is reported, and from which counts.
const OBSERVED: &[(Metric, &[Labelled])] = &[
    (
        metrics::FEED_BLOCKS,
        &[
            ("memory", |counts| counts.memory),
            ("disk", |counts| counts.disk),
            ("store", |counts| counts.store),
        ],
    ),
    (metrics::FEED_STORE_SIZE, &[("", |counts| counts.store_bytes)]),
    (
        metrics::FEED_HEDGED,
        &[
            ("first", |counts| counts.hedged - counts.overtaken),
            ("second", |counts| counts.overtaken),
        ],
    ),
    (metrics::FEED_DAMAGED, &[("", |counts| counts.damaged)]),
];

/// Has the counts of `reading` reported whenever somebody looks at the metrics.
pub(crate) fn observe(reading: &Reading) {
    for (metric, series) in OBSERVED {
        let reading = reading.clone();
        metric.observe(move || {
            let counts = reading.counts();
            let of = |(label, count): &Labelled| (vec![(*label).to_owned()], count(&counts) as f64);
            series.iter().map(of).collect()
        });
    }
}

#[cfg(test)]
mod tests {
    use looptrain_proto::metrics::{CATALOGUE, Reporter};

    use super::*;

    #[test]
    fn all_of_a_workers_catalogue_is_reported() {
        let listed = CATALOGUE.iter().filter(|metric| metric.reporter == Reporter::Worker);
        let listed: Vec<&str> = listed.map(|metric| metric.name).collect();
        let reported: Vec<&str> = OBSERVED.iter().map(|(metric, _)| metric.name).collect();
        assert_eq!(listed, reported);
    }
}
