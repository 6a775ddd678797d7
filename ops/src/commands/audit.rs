//! `looptrain audit`: what a run was computed from, and whether that is what its order draws.

use anyhow::{Context, Result};
use looptrain_proto::{Spec, Step};
use looptrain_storage::{
    AuditSummary, Dataset, Reading, Store, check_audit, read_audit, read_record,
};

use crate::cli::Audit;

pub(crate) async fn run(args: Audit) -> Result<()> {
    let store = Store::open_existing(&args.store)?;
    let record = read_record(&store, &args.run).await?;
    let record = record.with_context(|| format!("{} has no run `{}`", args.store, args.run))?;
    let spec = Spec::parse("the run's record", &record.spec, &[])?;
    let (reading, mut datasets) = (Reading::default(), Vec::new());
    for dataset in &spec.datasets {
        let name = &dataset.name;
        let opened = Dataset::open_with(&store, name, &reading).await?;
        datasets.push(opened.with_context(|| format!("{} has no dataset `{name}`", args.store))?);
    }
    // What was before a branch is in the audit of the run that it goes on from.
    let before = spec.branch.as_ref().map_or(0, |branch| branch.step);
    let steps = read_audit(&store, &args.run, Step(before)).await?;
    if args.json {
        for step in &steps {
            outln!("{}", serde_json::to_string(step)?);
        }
    }
    let summary = check_audit(&spec, &datasets, &steps, args.read).await?;
    let AuditSummary { steps, sequences, drawn, read } = summary;
    outln!("audit run={} steps={steps} sequences={sequences} slots_read={read}", args.run);
    for (dataset, sequences) in drawn {
        outln!("drawn dataset={dataset} sequences={sequences}");
    }
    Ok(())
}
