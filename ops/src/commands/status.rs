//! `looptrain status`: from a live coordinator, or from the store when there is none.

use anyhow::{Context, Result, bail};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{StatusReply, StatusRequest};
use looptrain_storage::{Checkpoints, Store, read_metrics, read_record};
use serde_json::{Value, json};

use crate::cli::Status;

pub(crate) async fn run(args: Status) -> Result<()> {
    let status = match (&args.coordinator, &args.store, &args.run) {
        (Some(url), _, _) => live(url).await?,
        (None, Some(store), Some(run)) => stored(store, run).await?,
        _ => bail!("say --coordinator URL, or --store URL and --run NAME"),
    };
    if args.json {
        println!("{status:#}");
    } else {
        print_table(&status);
    }
    Ok(())
}

async fn live(url: &str) -> Result<Value> {
    let mut client = CoordinatorClient::connect(url.to_owned())
        .await
        .with_context(|| format!("cannot reach a coordinator at {url}"))?;
    let reply = client.status(StatusRequest {}).await?.into_inner();
    Ok(to_json(&reply))
}

fn to_json(reply: &StatusReply) -> Value {
    let workers: Vec<Value> = reply
        .workers
        .iter()
        .map(|worker| {
            json!({
                "id": worker.worker_id,
                "name": worker.name,
                "host": worker.host,
                "rank": worker.rank,
                "warm": worker.warm,
                "slots": worker.slots,
                "slots_per_second": worker.slots_per_second,
                "straggles_in": worker.straggles_in,
                "seconds_since_heard": worker.seconds_since_heard,
            })
        })
        .collect();
    json!({
        "run": reply.run,
        "phase": reply.phase,
        "reason": reply.reason,
        "incarnation": reply.incarnation,
        "generation": reply.generation,
        "step": reply.step,
        "total_steps": reply.total_steps,
        "checkpoint_step": reply.checkpoint_step,
        "tokens": reply.tokens,
        "tokens_per_second": reply.tokens_per_second,
        "loss": reply.statistics.as_ref().map(|statistics| statistics.loss),
        "loss_per_loop": reply.statistics.as_ref().map(|statistics| &statistics.loss_per_loop),
        "workers": workers,
    })
}

async fn stored(url: &str, run: &str) -> Result<Value> {
    let store = Store::open_existing(url)?;
    let Some(record) = read_record(&store, run).await? else {
        bail!("there is no run `{run}` in {url}");
    };
    let last = read_metrics(&store, run).await?.pop().unwrap_or(Value::Null);
    let checkpoints = Checkpoints::new(&store, run).list().await?;
    let finished = record.finished.is_some();
    Ok(json!({
        "run": run,
        "phase": if finished { "finished" } else { "unknown" },
        "reason": if finished {
            "the record says so"
        } else {
            "the store does not say whether a coordinator is running; ask it with --coordinator"
        },
        "incarnation": record.incarnation,
        "step": last["step"],
        "tokens": last["tokens"],
        "loss": last["loss"],
        "loss_per_loop": last["loss_per_loop"],
        "checkpoint_step": checkpoints.last(),
        "checkpoints": checkpoints,
    }))
}

fn print_table(status: &Value) {
    for (key, value) in status.as_object().into_iter().flatten() {
        match value {
            Value::Array(items) if items.iter().all(Value::is_object) && !items.is_empty() => {
                println!("{key}:");
                for item in items {
                    let fields: Vec<String> = item
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(key, value)| format!("{key}={}", plain(value)))
                        .collect();
                    println!("  {}", fields.join("  "));
                }
            }
            _ => println!("{key:<18} {}", plain(value)),
        }
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use looptrain_proto::v1::StepStatistics;

    use super::*;

    #[test]
    fn the_status_shows_the_tokens_of_the_whole_run() {
        let statistics = Some(StepStatistics { tokens: 160, ..StepStatistics::default() });
        let reply = StatusReply { tokens: 1280, statistics, ..StatusReply::default() };
        assert_eq!(to_json(&reply)["tokens"], 1280);
    }
}
