//! `looptrain chaos`: thin around [`crate::chaos`].

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use looptrain_proto::Spec;
use looptrain_proto::spec::Reduction;
use looptrain_storage::Store;

use super::all_threads;
use crate::chaos::{Plan, Report};
use crate::cli::Chaos;
use crate::{datasets, signals};

pub(crate) async fn run(args: Chaos) -> Result<()> {
    let stop = signals::stop_on_signals("ending all processes")?;
    let spec = Spec::load(&args.spec, &args.overrides)?;
    ensure!(
        spec.cluster.reduction == Reduction::Exact,
        "cluster.reduction: a fast reduction gives other weights for other workers, and chaos compares \
         them; add --set cluster.reduction=exact"
    );
    let store = Store::open(&spec.run.store)?;
    store.check_writable().await?;
    tokio::select! {
        made = datasets::ensure(&store, &spec) => made?,
        () = stop.cancelled() => bail!("stopped before training began"),
    };
    let plan = Plan {
        spec: args.spec,
        overrides: args.overrides,
        run: spec.run.name,
        stages: spec.stages.len(),
        store,
        worker_timeout: Duration::from_secs_f64(spec.cluster.worker_timeout),
        seed: args.seed,
        length: Duration::from_secs_f64(args.minutes * 60.0),
        workers: args.workers.unwrap_or(spec.cluster.workers) as usize,
        threads: args.threads.unwrap_or_else(all_threads),
    };
    let report = plan.carry_out(&stop).await?;
    match args.json {
        true => outln!("{}", report.to_json()),
        false => print(&report),
    }
    match report.failure {
        Some(failure) => bail!(failure),
        None => Ok(()),
    }
}

/// For people: one line a kind of event, and the outcome.
fn print(report: &Report) {
    let json = report.to_json();
    let kinds = json["recovery_seconds"].as_object().into_iter().flatten();
    for (kind, times) in kinds {
        let time =
            |key: &str| times[key].as_f64().map_or("-".into(), |time| format!("{time:.3} s"));
        let (count, min, median, max) = (&times["count"], time("min"), time("median"), time("max"));
        outln!("{kind:<26} {count:>3}  min {min}  median {median}  max {max}");
    }
    let outcome = if json["equal"] == true { "equal" } else { "not equal" };
    let weights = report.weights.as_deref().unwrap_or("none");
    outln!("chaos seed={} steps={} weights={weights} {outcome}", report.seed, report.steps);
}
