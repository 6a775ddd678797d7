//! `looptrain branch`: the spec of a run that goes on from a checkpoint of another one.

use anyhow::{Context, Result, bail};
use looptrain_proto::{Spec, spec};
use looptrain_storage::{Checkpoints, Store, read_record};

use crate::cli::{Branch, CheckpointUrl};
use crate::progress::print_line;

pub(crate) async fn run(args: Branch) -> Result<()> {
    let CheckpointUrl { store: url, run, step } = &args.from;
    let store = Store::open_existing(url)?;
    let Some(record) = read_record(&store, run).await? else {
        bail!("there is no run `{run}` in {url}");
    };
    let before = Spec::parse("the run record", &record.spec, &[])?;
    let checkpoints = Checkpoints::new(&store, run);
    let step = match step {
        Some(step) => *step,
        None => *checkpoints.list().await?.last().with_context(|| {
            format!("run `{run}` has no checkpoint yet; `looptrain save` has one made")
        })?,
    };
    let manifest = checkpoints.manifest(step).await?;
    let (weights, skip_steps) = (manifest.weights_digest, args.skip_steps);
    let derive = |sequences| {
        before.derive(url, &args.overrides, |spec| {
            spec.run.name.clone_from(&args.name);
            spec.initial = None;
            let (run, step) = (run.clone(), step.0);
            spec.branch = Some(spec::Branch { run, step, weights, sequences, skip_steps });
        })
    };
    let mut spec = derive(None)?;
    // Where the other run had passed over some data, or had another batch.
    let (theirs, ours) = (manifest.cursor, spec.cursor_after(step));
    if theirs.stage == ours.stage && theirs.sequences != ours.sequences {
        spec = derive(Some(theirs.sequences))?;
    }
    outln!("# Goes on from step {step} of run `{run}`.\n\n{}", spec.to_toml().trim_end());
    let others = |it: &String| !it.starts_with("branch.") && !it.starts_with("initial.");
    let mut differences = before.differences(&spec);
    differences.retain(others);
    if skip_steps > 0 {
        differences.push(format!("the data of {skip_steps} steps is passed over"));
    }
    print_line(&match differences.is_empty() {
        true => "as it stands the branch ends with the weights of its run; change something by --set or in \
                 the file"
            .to_owned(),
        false => format!("other than in run `{run}`: {}", differences.join(", ")),
    });
    Ok(())
}
