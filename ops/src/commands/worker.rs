//! `looptrain worker`.

use anyhow::Result;
use looptrain_worker::WorkerSettings;

use super::all_threads;
use crate::cli::Worker;
use crate::signals;

pub(crate) async fn run(args: Worker) -> Result<()> {
    let stop = signals::stop_on_signals("leaving the run after the step in flight")?;
    let name = args.name.unwrap_or_else(|| {
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "worker".into());
        format!("{host}-{}", std::process::id())
    });
    let mut settings = WorkerSettings::new(args.coordinator, name);
    settings.threads = args.threads.unwrap_or_else(all_threads) as usize;
    settings.peer_listen = args.peer_listen;
    settings.stop = stop;
    let finished = looptrain_worker::run(settings).await?;
    tracing::info!(reason = finished.reason, "finished");
    Ok(())
}
