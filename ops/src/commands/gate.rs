//! `looptrain gate`: the exit gate of a trained model, by the loss of the paper's Stage II, and what it is
//! worth: loss at equal mean depth, before and after.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use looptrain_model::DepthReport;
use looptrain_proto::Step;
use looptrain_proto::spec::{Decay, Initial, LearningRate, Objective, Stage};
use looptrain_storage::{Checkpoints, Split, Store, model_prefix};
use serde_json::{Value, json};

use super::coordinator::PreparedRun;
use super::eval::{self, quality_json};
use super::train::on_this_machine;
use super::{all_threads, import};
use crate::chart::{self, Chart, Line};
use crate::cli::{CheckpointUrl, Gate, ModelSource};
use crate::progress::print_line;
use crate::security::Doors;
use crate::signals;
use crate::telemetry::Telemetry;
use crate::trained::{Found, Trained};

/// Thresholds of the curves, beside 0.
const THRESHOLDS: u32 = 200;

/// Depths at which the curves are compared, between those of the first loop and the last.
const DEPTHS: usize = 8;

pub(crate) async fn run(args: Gate, telemetry: &Telemetry) -> Result<()> {
    let stop = signals::stop_on_signals(
        "stopping at the next step, with a checkpoint; once more to end at once",
    )?;
    let (found, _) = Found::open(&ModelSource::Checkpoint(args.from.clone())).await?;
    let Found::Checkpoint { spec, manifest, .. } = &found else {
        bail!("a gate is trained on the data of a run, so --from is the URL of a checkpoint");
    };
    let name = args.run.clone().unwrap_or_else(|| format!("{}-gate", spec.run.name));
    let begin = format!("{name}-begin");
    let initial = Initial { model: begin.clone(), weights: manifest.weights_digest };
    let stage = stage(&spec.stages[spec.stage_of(manifest.step)], &args);
    let workers = args.fleet.workers;
    let spec = spec.derive(&args.from.store, |spec| {
        spec.run.name.clone_from(&name);
        // Its data begins anew, and is to be no repetition of what the model has learnt from.
        spec.run.seed = (spec.run.seed + 1) & (u64::MAX >> 1);
        spec.initial = Some(initial);
        spec.stages = vec![stage];
        spec.cluster.workers = workers.unwrap_or(spec.cluster.workers);
    })?;

    let store = Store::open(&spec.run.store)?;
    let found = Arc::new(found);
    if args.fresh {
        store.delete_prefix(&model_prefix(&begin)).await?;
    }
    let models = Checkpoints::of_model(&store, &begin);
    if models.list().await?.is_empty() {
        let layers = (0..spec.model.num_hidden_layers).collect();
        import::write(&store, &begin, &found, layers).await?;
    } else {
        let has = models.manifest(Step(0)).await?.weights_digest;
        ensure!(
            spec.initial.as_ref().is_some_and(|initial| initial.weights == has),
            "run `{name}` was begun from other weights, {has}; begin anew with --fresh, or choose another --run"
        );
    }
    let mut run = tokio::select! {
        run = PreparedRun::of(spec, args.fresh, None) => run?,
        () = stop.cancelled() => bail!("stopped before training began"),
    };
    let found = Arc::into_inner(found).context("the model is still being read")?;
    let before = measured(&run, found, &args).await?;
    let outcome = on_this_machine(&mut run, &args.fleet, Doors::local(), stop, telemetry).await?;
    if outcome.stopped {
        run.print_end(&outcome);
        return Ok(());
    }
    let trained =
        CheckpointUrl { store: args.from.store.clone(), run: name, step: Some(outcome.step) };
    let (found, _) = Found::open(&ModelSource::Checkpoint(trained)).await?;
    let after = measured(&run, found, &args).await?;
    let compared = at_equal_depth(&before, &after);
    let draw = || match &args.plot {
        Some(path) => chart::draw(path, &[drawn(&before, &after)]),
        None => Ok(()),
    };
    if args.json {
        let curves = [&before, &after].map(quality_json);
        let [first, second] = curves;
        println!("{}", json!({ "before": first, "after": second, "at_equal_depth": compared }));
        return draw();
    }
    println!("mean depth  loss before   after");
    for it in compared.as_array().into_iter().flatten() {
        let [depth, before, after] =
            ["mean_depth", "before", "after"].map(|key| it[key].as_f64().unwrap_or(f64::NAN));
        println!("{depth:10.3}  {before:11.4}  {after:6.4}");
    }
    run.print_end(&outcome);
    draw()
}

/// The stage of the gate's run: batches as in the stage that the model comes from.
fn stage(of: &Stage, args: &Gate) -> Stage {
    let peak = args.learning_rate;
    let warmup_steps = args.steps / 10;
    Stage {
        name: "exit gate".into(),
        steps: args.steps,
        tokens: 0,
        ramp: None,
        objective: Objective::ExitGate,
        learning_rate: LearningRate {
            peak,
            warmup_steps,
            decay_steps: args.steps - warmup_steps,
            last: peak / 10.0,
            decay: Decay::Cosine,
        },
        ..of.clone()
    }
}

/// Depth and quality on the run's validation data.
async fn measured(run: &PreparedRun, found: Found, args: &Gate) -> Result<DepthReport> {
    let mixture = run.spec.mixture(0);
    let datasets: Vec<_> =
        mixture.into_iter().map(|(index, _)| run.datasets[index].clone()).collect();
    let threads = args.fleet.threads.unwrap_or_else(all_threads);
    let tokenizer = datasets[0].tokenizer().await?;
    let model = Trained::new(found, Some(tokenizer), threads).await?;
    let (count, length) = (u64::from(args.sequences), model.context);
    let sequences = eval::spread(&model, &datasets, Split::Validation, count, length).await?;
    print_line(&format!("measuring {} at every depth", model.name));
    // So many that the depths between two of them are near to each other, where a gate is sure of most
    // tokens too.
    let thresholds: Vec<f64> =
        (0..=THRESHOLDS).map(|at| f64::from(at) / f64::from(THRESHOLDS)).collect();
    let measure = move || eval::measured(&model, &sequences, &thresholds);
    tokio::task::spawn_blocking(measure).await.context("the evaluation failed")?
}

/// Losses of both where tokens take the same number of loops on average.
fn at_equal_depth(before: &DepthReport, after: &DepthReport) -> Value {
    let loops = before.loss_per_loop.len() as f64;
    let depths = (0..=DEPTHS).map(|at| 1.0 + (loops - 1.0) * at as f64 / DEPTHS as f64);
    let rows = depths.map(|depth| {
        let [before, after] = [before, after].map(|report| loss_at(report, depth));
        json!({ "mean_depth": depth, "before": before, "after": after })
    });
    rows.collect()
}

/// The loss at a mean depth, on a straight line between the two thresholds beside it.
fn loss_at(report: &DepthReport, depth: f64) -> f64 {
    let curve = &report.quality;
    let next = curve.partition_point(|it| it.mean_depth < depth).min(curve.len() - 1);
    let (left, right) = (&curve[next.saturating_sub(1)], &curve[next]);
    let width = right.mean_depth - left.mean_depth;
    let share = if width > 0.0 { ((depth - left.mean_depth) / width).clamp(0.0, 1.0) } else { 1.0 };
    left.loss + (right.loss - left.loss) * share
}

fn drawn(before: &DepthReport, after: &DepthReport) -> Chart {
    let line = |name: &str, report: &DepthReport| Line {
        name: name.into(),
        points: report.quality.iter().map(|it| (it.mean_depth, it.loss)).collect(),
    };
    let fixed = (1..).map(f64::from).zip(after.loss_per_loop.iter().copied());
    Chart {
        title: "loss by compute, before and after Stage II".into(),
        x: "mean depth (loops)",
        y: "cross-entropy (nats)",
        lines: vec![
            line("before", before),
            line("after", after),
            Line { name: "fixed depth".into(), points: fixed.collect() },
        ],
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_model::Quality;

    use super::*;

    #[test]
    fn losses_are_compared_at_equal_depth() {
        let report = |points: &[(f64, f64)]| DepthReport {
            tokens: 1,
            loss: 0.0,
            loss_per_loop: vec![0.0; 3],
            accuracy_per_loop: vec![0.0; 3],
            exit_pdf: vec![0.0; 3],
            entropy: 0.0,
            mean_depth: 0.0,
            quality: (points.iter())
                .map(|&(mean_depth, loss)| Quality {
                    threshold: 0.0,
                    mean_depth,
                    loss,
                    accuracy: 0.0,
                })
                .collect(),
        };
        let curve = report(&[(1.0, 4.0), (1.0, 4.0), (2.0, 3.0), (3.0, 2.5)]);
        let losses = [1.0, 1.5, 2.0, 2.5, 3.0].map(|depth| loss_at(&curve, depth));
        assert_eq!(losses, [4.0, 3.5, 3.0, 2.75, 2.5]);
        let steep = report(&[(1.0, 4.0), (3.0, 2.5)]);
        let rows = at_equal_depth(&curve, &steep);
        let middle = &rows[DEPTHS / 2];
        assert_eq!(*middle, json!({ "mean_depth": 2.0, "before": 3.0, "after": 3.25 }));
    }
}
