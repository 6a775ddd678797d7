//! `looptrain status`: from a live coordinator, or from the store when there is none; once, as a table
//! or as JSON, or as a view of the whole terminal.

mod screen;
mod view;

use std::io::IsTerminal;

use anyhow::{Result, bail, ensure};

use self::view::{Source, View, Worker};
use crate::cli::Status;
use crate::progress::time_of_day;

/// Events of the table.
const EVENTS: usize = 8;

pub(crate) async fn run(args: Status) -> Result<()> {
    if let (None, Some(store), None) = (&args.coordinator, &args.store, &args.run) {
        ensure!(!args.watch, "--watch is for one run: say --run NAME, or --coordinator URL");
        let runs = view::all(store).await?;
        match args.json {
            true => outln!("{}", serde_json::to_string_pretty(&runs)?),
            false if runs.is_empty() => outln!("there is no run in {store}"),
            false => columns(&overview(&runs)).iter().for_each(|row| outln!("{row}")),
        }
        return Ok(());
    }
    let mut source = match (&args.coordinator, &args.store, &args.run) {
        (Some(url), _, _) => Source::live(url, &args.tls).await?,
        (None, Some(store), Some(run)) => Source::stored(store, run)?,
        _ => bail!("say --coordinator URL, or --store URL"),
    };
    let view = source.view().await?;
    if args.watch {
        ensure!(
            std::io::stdout().is_terminal(),
            "--watch needs a terminal; without one use --json, again and again"
        );
        return screen::watch(source, view).await;
    }
    if args.json {
        outln!("{}", serde_json::to_string_pretty(&view)?);
    } else {
        out!("{}", table(&view));
    }
    Ok(())
}

/// What is shown of a coordinator's answer, for fuzzing.
#[cfg(feature = "fuzzing")]
pub(crate) fn shown(reply: looptrain_proto::v1::StatusReply) -> String {
    let view = view::told(reply);
    serde_json::to_string(&view).expect("a view has a JSON form") + &table(&view)
}

/// Lines with a name and a value.
fn table(view: &View) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut line = |name: &str, value: String| lines.push(format!("{name:<16}{value}"));
    line("run", view.run.clone());
    line("phase", format!("{} ({})", view.phase, view.reason));
    line(
        "step",
        match view.total_steps {
            Some(total) => format!("{} of {total}", view.step),
            None => view.step.to_string(),
        },
    );
    let rate = view.tokens_per_second.filter(|rate| *rate > 0.0);
    line(
        "tokens",
        match rate {
            Some(rate) => format!("{}, {rate:.0} per second", view.tokens),
            None => view.tokens.to_string(),
        },
    );
    let listed = |values: &[f64]| {
        values.iter().map(|value| format!("{value:.3}")).collect::<Vec<_>>().join(" ")
    };
    if let Some(loss) = view.loss {
        line("loss", format!("{loss:.4} (loops {})", listed(&view.loss_per_loop)));
        line("exits", listed(&view.exit_pdf));
    }
    if let (Some(rate), Some(norm)) = (view.learning_rate, view.grad_norm) {
        line("learning rate", format!("{rate:.3e}, gradient norm {norm:.3}"));
    }
    if let Some(mfu) = view.mfu {
        line("MFU", format!("{:.1} %", 100.0 * mfu));
    }
    let saved = view.checkpoint_step.map_or("none".into(), |step| format!("of step {step}"));
    line(
        "checkpoint",
        match view.saving_step {
            Some(step) => format!("{saved}, that of step {step} is being written"),
            None => saved,
        },
    );
    line(
        "coordinator",
        match view.generation {
            Some(generation) => format!("{}, generation {generation}", view.incarnation),
            None => view.incarnation.to_string(),
        },
    );
    if let Some(share) = view.goodput_share() {
        let mut parts: Vec<(&String, &f64)> =
            view.goodput.iter().filter(|(_, seconds)| **seconds > 0.0).collect();
        parts.sort_by(|left, right| right.1.total_cmp(left.1));
        let total: f64 = view.goodput.values().sum();
        let part =
            |(name, seconds): (&String, &f64)| format!("{name} {:.1} %", 100.0 * seconds / total);
        let parts: Vec<String> = parts.into_iter().map(part).collect();
        line("goodput", format!("{:.1} % ({})", 100.0 * share, parts.join(", ")));
    }
    if !view.workers.is_empty() {
        lines.push(String::new());
        lines.extend(columns(&workers(view)));
    }
    if !view.events.is_empty() {
        lines.push(String::new());
        let events = view.events.iter().take(EVENTS);
        lines.extend(events.map(|event| format!("{}  {}", time_of_day(event.unix_ms), event.text)));
    }
    lines.join("\n") + "\n"
}

/// The runs of a store, a row each, below the heads.
fn overview(runs: &[View]) -> Vec<[String; 6]> {
    let mut rows =
        vec![["run", "phase", "step", "loss", "checkpoint", "reason"].map(str::to_owned)];
    rows.extend(runs.iter().map(|run| {
        let total = run.total_steps.map_or(String::new(), |total| format!(" of {total}"));
        [
            run.run.clone(),
            run.phase.clone(),
            format!("{}{total}", run.step),
            run.loss.map_or("-".into(), |loss| format!("{loss:.4}")),
            run.checkpoint_step.map_or("none".into(), |step| step.to_string()),
            run.reason.clone(),
        ]
    }));
    rows
}

/// The heads of the workers' columns.
const HEADS: [&str; 9] =
    ["worker", "host", "rank", "slots", "compute", "reduce", "data", "optimizer", "heard"];

/// Those that hold the others up first, then by rank, and at the end those without a place.
fn ordered(view: &View) -> Vec<&Worker> {
    let mut workers: Vec<&Worker> = view.workers.iter().collect();
    workers.sort_by_key(|it| (it.straggles_in.is_empty(), it.rank.is_none(), it.rank, it.id));
    workers
}

/// The workers, a row each, below the heads.
fn workers(view: &View) -> Vec<[String; 9]> {
    let mut rows = vec![HEADS.map(str::to_owned)];
    rows.extend(ordered(view).into_iter().map(|it| {
        let rank = match it.rank {
            Some(rank) => rank.to_string(),
            None if it.warm => "spare".into(),
            None => "waits".into(),
        };
        let name = match it.straggles_in.as_str() {
            "" => it.name.clone(),
            section => format!("{} (slow: {section})", it.name),
        };
        let time = |seconds: f64| format!("{:.0} ms", 1000.0 * seconds);
        [
            name,
            it.host.clone(),
            rank,
            it.slots.to_string(),
            time(it.compute),
            time(it.reduce),
            time(it.data_wait),
            time(it.optimizer),
            format!("{:.1} s ago", it.seconds_since_heard),
        ]
    }));
    rows
}

/// Rows with their cells below one another.
fn columns<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use looptrain_proto::v1::{
        CategorySeconds, StatusEvent, StatusReply, StepStatistics, WorkerStatus,
    };

    use super::*;

    pub(super) fn example() -> View {
        let statistics = StepStatistics {
            loss: 2.5,
            loss_per_loop: vec![2.75, 2.25],
            exit_pdf: vec![0.25, 0.75],
            tokens: 160,
            ..StepStatistics::default()
        };
        let worker = |rank: Option<u32>, name: &str| WorkerStatus {
            name: name.into(),
            host: "here".into(),
            rank,
            ..WorkerStatus::default()
        };
        let seconds =
            |category: &str, seconds: f64| CategorySeconds { category: category.into(), seconds };
        let event = StatusEvent {
            unix_ms: 1_000,
            kind: "worker_lost".into(),
            text: "worker w1 lost: its connection broke".into(),
            tone: "bad".into(),
        };
        view::told(StatusReply {
            run: "shown".into(),
            phase: "training".into(),
            reason: "generation 3: 1 worker".into(),
            step: 40,
            total_steps: 100,
            tokens: 1280,
            statistics: Some(statistics),
            workers: vec![worker(Some(0), "w0"), worker(None, "a-much-longer-name")],
            goodput: vec![seconds("productive", 75.0), seconds("recovering", 25.0)],
            events: vec![event],
            losses: vec![3.0, 2.75, 2.5],
            checkpoint_step: 30,
            ..StatusReply::default()
        })
    }

    #[test]
    fn the_status_shows_the_tokens_of_the_whole_run() {
        assert_eq!(serde_json::to_value(example()).unwrap_or_default()["tokens"], 1280);
    }

    #[test]
    fn the_table_says_what_is_known_in_columns() {
        let table = table(&example());
        for words in [
            "step            40 of 100",
            "goodput         75.0 % (productive 75.0 %, recovering 25.0 %)",
            "loss            2.5000 (loops 2.750 2.250)",
            "checkpoint      of step 30",
            "worker w1 lost",
        ] {
            assert!(table.contains(words), "`{words}` is not in\n{table}");
        }
        let at = |word: &str| {
            let line = table.lines().find(|line| line.contains(word)).unwrap_or_default();
            line.find(if word == "worker " { "host" } else { "here" })
        };
        assert_eq!(at("w0 "), at("a-much-longer-name"));
    }
}
