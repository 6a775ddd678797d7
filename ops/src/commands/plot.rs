//! `looptrain plot`.

use anyhow::{Result, bail, ensure};
use looptrain_storage::{Store, read_metrics, read_record};
use serde_json::Value;

use crate::chart::{self, Chart, Line};
use crate::cli::Plot;

/// Points of a line at most.
const POINTS: usize = 300;

pub(crate) async fn run(args: Plot) -> Result<()> {
    let store = Store::open_existing(&args.store)?;
    if read_record(&store, &args.run).await?.is_none() {
        bail!("there is no run `{}` in {}", args.run, args.store);
    }
    let steps = read_metrics(&store, &args.run).await?;
    ensure!(!steps.is_empty(), "the log of run `{}` has no step yet", args.run);
    let charts = charts(&args.run, &steps);
    ensure!(!charts.is_empty(), "the log of run `{}` says nothing of its loops", args.run);
    chart::draw(&args.output, &charts)
}

/// Whether a log is drawn, for fuzzing.
#[cfg(feature = "fuzzing")]
pub(crate) fn drawn(output: &std::path::Path, steps: &[Value]) -> bool {
    let charts = charts("r", steps);
    !charts.is_empty() && chart::draw(output, &charts).is_ok()
}

/// What a run's loops did over its steps, as far as its log says it.
fn charts(run: &str, steps: &[Value]) -> Vec<Chart> {
    let chart = |title: String, y, key| Chart { title, x: "step", y, lines: by_loop(steps, key) };
    let charts = [
        chart(format!("{run}: loss by loop"), "cross-entropy (nats)", "loss_per_loop"),
        chart("exit distribution".into(), "share of the exits", "exit_pdf"),
        chart("agreement with the last loop".into(), "share of tokens", "agreement_per_loop"),
    ];
    charts.into_iter().filter(|chart| !chart.lines.is_empty()).collect()
}

/// A line for each loop of a value of the steps.
fn by_loop(steps: &[Value], key: &str) -> Vec<Line> {
    let values = |step: &Value| step[key].as_array().map_or(0, Vec::len);
    let loops = steps.iter().map(values).max().unwrap_or(0);
    let point = |step: &Value, t: usize| Some((step["step"].as_f64()?, step[key][t].as_f64()?));
    let line = |t: usize| {
        let all: Vec<_> = steps.iter().filter_map(|step| point(step, t)).collect();
        Line { name: format!("loop {}", t + 1), points: thinned(&all) }
    };
    (0..loops).map(line).collect()
}

/// As many points at most, each the mean of its neighbours.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |part: &[(f64, f64)]| {
        let count = part.len() as f64;
        let sum = part.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    points.chunks(points.len().div_ceil(POINTS).max(1)).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_loop_has_a_line_for_as_long_as_there_is_such_a_loop() {
        let step = |step: u64| {
            let loops = if step <= 400 { 3 } else { 2 };
            json!({"step": step, "loss_per_loop": vec![step as f64; loops], "exit_pdf": [1.0]})
        };
        let mut steps: Vec<Value> = (1..=600).map(step).collect();
        // A step that was skipped has no numbers.
        steps[5]["loss_per_loop"] = json!([]);
        let found = charts("r", &steps);
        let [loss, exits] = &found[..] else { panic!("no log of agreement, no chart of it") };
        let lasts: Vec<_> = loss.lines.iter().map(|line| line.points.last().copied()).collect();
        assert_eq!(lasts, [Some((600.0, 600.0)), Some((600.0, 600.0)), Some((400.0, 400.0))]);
        assert!(loss.lines.iter().all(|line| line.points.len() <= POINTS));
        assert!(loss.lines[0].points.iter().all(|(x, y)| x == y));
        assert_eq!(exits.lines.len(), 1);
    }
}
