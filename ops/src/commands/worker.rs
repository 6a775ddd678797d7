//! `looptrain worker`.

use std::time::Duration;

use anyhow::Result;
use looptrain_worker::{WorkerSettings, host_name};

use super::all_threads;
use crate::cli::Worker;
use crate::progress::print_line;
use crate::signals;

pub(crate) async fn run(args: Worker) -> Result<()> {
    let stop = signals::stop_on_signals("leaving the run after the step in flight")?;
    let name = args.name.unwrap_or_else(|| format!("{}-{}", host_name(), std::process::id()));
    let threads = args.threads.unwrap_or_else(all_threads);
    if !args.quiet {
        print_line(&format!("{name} joins {}; compute threads: {threads}", args.coordinator));
    }
    let mut settings = WorkerSettings::new(args.coordinator, name);
    settings.threads = threads as usize;
    settings.peer_listen = args.peer_listen;
    settings.connect_timeout = Duration::from_secs(args.connect_timeout.into());
    settings.reconnect_timeout = Duration::from_secs(args.reconnect_timeout.into());
    settings.stop = stop;
    let finished = looptrain_worker::run(settings).await?;
    if !args.quiet {
        print_line(&format!("ended: {}", finished.reason));
    }
    Ok(())
}
