//! `looptrain worker`.

use std::time::Duration;

use anyhow::Result;
use looptrain_worker::{Moments, WorkerSettings, host_name};

use super::all_threads;
use crate::cli::Worker;
use crate::fault::Faults;
use crate::preemption;
use crate::progress::print_line;
use crate::signals;

pub(crate) async fn run(args: Worker) -> Result<()> {
    let signal = signals::stop_on_signals("leaving the run after the step in flight")?;
    if args.bound {
        signals::end_with_parent();
    }
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
    let told = settings.stop.clone();
    tokio::spawn(async move {
        signal.cancelled().await;
        told.tell("told to stop");
    });
    if let Some(source) = args.preemption_notice {
        preemption::watch(source, args.metadata_service, settings.stop.clone())?;
    }
    if !args.faults.is_empty() {
        let faults = Faults::new(args.faults);
        settings.moments =
            Moments::watched_by(move |moment| faults.at(moment.name(), moment.step()));
    }
    let finished = looptrain_worker::run(settings).await?;
    if !args.quiet {
        print_line(&format!("ended: {}", finished.reason));
    }
    Ok(())
}
