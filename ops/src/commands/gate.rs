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
    let spec = spec.derive(&args.from.store, &[], |spec| {
        spec.run.name.clone_from(&name);
        // Its data begins anew, and is to be no repetition of what the model has learnt from.
        spec.run.seed = (spec.run.seed + 1) & (u64::MAX >> 1);
        spec.initial = Some(initial);
        spec.branch = None;
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
        outln!("{}", json!({ "before": first, "after": second, "at_equal_depth": compared }));
        return draw();
    }
    outln!("mean depth  loss before   after  difference, standard error");
    for it in compared.as_array().into_iter().flatten() {
        let [depth, before, after] =
            ["mean_depth", "before", "after"].map(|key| it[key].as_f64().unwrap_or(f64::NAN));
        let (difference, error) = (after - before, it["standard_error"].as_f64());
        let error = error.map_or_else(|| "?".to_owned(), |error| format!("{error:.4}"));
        outln!("{depth:10.3}  {before:11.4}  {after:6.4}  {difference:+10.4} ± {error}");
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

/// Losses of both where tokens take the same number of loops on average, and the standard error of what is
/// between them.
fn at_equal_depth(before: &DepthReport, after: &DepthReport) -> Value {
    let loops = before.loss_per_loop.len() as f64;
    let depths = (0..=DEPTHS).map(|at| 1.0 + (loops - 1.0) * at as f64 / DEPTHS as f64);
    let rows = depths.map(|depth| {
        let [was, is] = [before, after].map(|report| loss_at(&curve(report), depth));
        json!({
            "mean_depth": depth,
            "before": was,
            "after": is,
            "standard_error": standard_error(before, after, depth),
        })
    });
    rows.collect()
}

/// Mean depth and loss at each threshold.
fn curve(report: &DepthReport) -> Vec<(f64, f64)> {
    report.quality.iter().map(|it| (it.mean_depth, it.loss)).collect()
}

/// The standard error of the difference at a mean depth, by leaving out one sequence after the other (the
/// jackknife: Efron and Stein, The Jackknife Estimate of Variance, 1981): both gates have met the same
/// sequences, so it is much smaller than that of either loss.
///
/// `None` of one sequence.
fn standard_error(before: &DepthReport, after: &DepthReport, depth: f64) -> Option<f64> {
    let count = before.sequences();
    let without = |sequence: usize| {
        let [was, is] = [before, after].map(|report| report.curve_without(sequence));
        Some(loss_at(&is?, depth) - loss_at(&was?, depth))
    };
    let differences = (0..count).map(without).collect::<Option<Vec<f64>>>()?;
    let mean = differences.iter().sum::<f64>() / count as f64;
    let squares: f64 = differences.iter().map(|it| (it - mean).powi(2)).sum();
    Some(((count - 1) as f64 / count as f64 * squares).sqrt())
}

/// The loss at a mean depth, on a straight line between the two thresholds beside it.
fn loss_at(curve: &[(f64, f64)], depth: f64) -> f64 {
    let next = curve.partition_point(|(at, _)| *at < depth).min(curve.len() - 1);
    let ((left, before), (right, after)) = (curve[next.saturating_sub(1)], curve[next]);
    let width = right - left;
    let share = if width > 0.0 { ((depth - left) / width).clamp(0.0, 1.0) } else { 1.0 };
    before + (after - before) * share
}

fn drawn(before: &DepthReport, after: &DepthReport) -> Chart {
    let line = |name: &str, report: &DepthReport| Line { name: name.into(), points: curve(report) };
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
    use looptrain_model::{DepthSums, StageSettings, TokenMeasures};

    use super::*;

    #[test]
    fn the_loss_at_a_depth_is_between_those_of_the_thresholds_beside_it() {
        let curve = [(1.0, 4.0), (1.0, 4.0), (2.0, 3.0), (3.0, 2.5)];
        let losses = [1.0, 1.5, 2.0, 2.5, 3.0].map(|depth| loss_at(&curve, depth));
        assert_eq!(losses, [4.0, 3.5, 3.0, 2.75, 2.5]);
    }

    /// Sequences of one token each, which lose by loop what is given, and leave as a gate logit says.
    fn report(tokens: &[([f32; 3], f32)]) -> DepthReport {
        let settings = StageSettings {
            loops: 3,
            entropy_weight: 0.0,
            rope_base: 1e4,
            objective: Objective::Language,
        };
        let mut sums = DepthSums::new(&settings, &[0.0, 0.5, 1.0]);
        for (losses, gate) in tokens {
            let gates = vec![*gate; 3];
            let measures = TokenMeasures { losses: losses.to_vec(), gates, hits: vec![false; 3] };
            sums.add(&measures, 1, |_| true);
        }
        sums.report().unwrap()
    }

    #[test]
    fn losses_are_compared_at_equal_depth_with_their_standard_error() {
        // At the threshold of a half all have left after the first loop, or after the second.
        let losses = [[4.0, 3.0, 1.0], [2.0, 1.0, 0.0], [3.0, 3.5, 2.0]];
        let with = |gate| report(&losses.map(|losses| (losses, gate)));
        let (early, later) = (with(9.0), with(-0.5));
        let rows = at_equal_depth(&early, &later);
        let middle = &rows[DEPTHS / 2];
        let value = |row: &Value, key: &str| row[key].as_f64().unwrap();
        assert_eq!(value(middle, "mean_depth"), 2.0);
        // Half of what is between 3 and 1, and the loss after the second loop.
        assert_eq!([value(middle, "before"), value(middle, "after")], [2.0, 2.5]);
        // Of each sequence after less before is 3 - 2.5, 1 - 1, 3.5 - 2.5, whose deviation is a half: the
        // standard error of a mean is that over the root of their number.
        let error = value(middle, "standard_error");
        assert!((error - 0.5 / 3f64.sqrt()).abs() < 1e-12, "{error}");
        for row in [&rows[0], &rows[DEPTHS]] {
            assert_eq!(row["before"], row["after"]);
            assert_eq!(value(row, "standard_error"), 0.0);
        }
        let one = report(&[([4.0, 3.0, 1.0], 9.0)]);
        assert_eq!(at_equal_depth(&one, &one)[0]["standard_error"], Value::Null);
    }
}
