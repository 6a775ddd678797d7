//! `looptrain plot`.

use anyhow::{Result, bail, ensure};
use looptrain_storage::{Store, read_metrics_by_segment, read_record};
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
    let mut curves = Curves::default();
    read_metrics_by_segment(&store, &args.run, |steps| curves.add(&steps)).await?;
    ensure!(curves.steps > 0, "the log of run `{}` has no step yet", args.run);
    let charts = curves.charts(&args.run);
    ensure!(!charts.is_empty(), "the log of run `{}` says nothing of its loops", args.run);
    chart::draw(&args.output, &charts)
}

/// Whether a log is drawn, for fuzzing.
#[cfg(feature = "fuzzing")]
pub(crate) fn drawn(output: &std::path::Path, steps: &[Value]) -> bool {
    let mut curves = Curves::default();
    curves.add(steps);
    let charts = curves.charts("r");
    !charts.is_empty() && chart::draw(output, &charts).is_ok()
}

/// What is drawn of a step: of each of these a value by loop.
const KEYS: [&str; 3] = ["loss_per_loop", "exit_pdf", "agreement_per_loop"];

/// What a run's loops did over its steps, as far as its log says it. Nothing else of the steps is kept: a
/// log is long.
#[derive(Default)]
struct Curves {
    /// Steps that were looked at.
    steps: usize,
    /// For each of the keys, step and value of each loop.
    by_key: [Vec<Vec<(f64, f64)>>; KEYS.len()],
}

impl Curves {
    /// Takes the next steps of the log.
    fn add(&mut self, steps: &[Value]) {
        self.steps += steps.len();
        for step in steps {
            for (key, by_loop) in KEYS.iter().zip(&mut self.by_key) {
                let Some(values) = step[*key].as_array() else { continue };
                if by_loop.len() < values.len() {
                    by_loop.resize_with(values.len(), Vec::new);
                }
                let Some(number) = step["step"].as_f64() else { continue };
                for (points, value) in by_loop.iter_mut().zip(values) {
                    points.extend(value.as_f64().map(|value| (number, value)));
                }
            }
        }
    }

    /// A chart for each of the keys, with a line for each loop.
    fn charts(&self, run: &str) -> Vec<Chart> {
        let [losses, exits, agreement] = self.by_key.each_ref().map(|by_loop| lines(by_loop));
        let chart = |title: String, y, lines| Chart { title, x: "step", y, lines };
        let charts = [
            chart(format!("{run}: loss by loop"), "cross-entropy (nats)", losses),
            chart("exit distribution".into(), "share of the exits", exits),
            chart("agreement with the last loop".into(), "share of tokens", agreement),
        ];
        charts.into_iter().filter(|chart| !chart.lines.is_empty()).collect()
    }
}

fn lines(by_loop: &[Vec<(f64, f64)>]) -> Vec<Line> {
    let line = |(t, points): (usize, &Vec<(f64, f64)>)| Line {
        name: format!("loop {}", t + 1),
        points: thinned(points),
    };
    by_loop.iter().enumerate().map(line).collect()
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
        // In pieces, as the log is read.
        let mut curves = Curves::default();
        steps.chunks(7).for_each(|steps| curves.add(steps));
        let found = curves.charts("r");
        let [loss, exits] = &found[..] else { panic!("no log of agreement, no chart of it") };
        let lasts: Vec<_> = loss.lines.iter().map(|line| line.points.last().copied()).collect();
        assert_eq!(lasts, [Some((600.0, 600.0)), Some((600.0, 600.0)), Some((400.0, 400.0))]);
        assert!(loss.lines.iter().all(|line| line.points.len() <= POINTS));
        assert!(loss.lines[0].points.iter().all(|(x, y)| x == y));
        assert_eq!(exits.lines.len(), 1);

        assert_eq!(curves.steps, 600);
        let kept: Vec<usize> = curves.by_key.iter().flatten().map(Vec::len).collect();
        assert_eq!(kept, [599, 599, 399, 600], "nothing but what is drawn");
    }
}
