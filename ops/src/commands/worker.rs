//! `looptrain worker`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::routing::get;
use looptrain_coordinator::http;
use looptrain_proto::transport::Role;
use looptrain_worker::{BlockCache, Moments, WorkerSettings, host_name};
use tokio_util::sync::CancellationToken;

use super::all_threads;
use crate::cli::Worker;
use crate::fault::Faults;
use crate::limits::allow_all_descriptors;
use crate::preemption;
use crate::progress::print_line;
use crate::security::{READS, TAKES_PART, observe_expiry};
use crate::signals;
use crate::telemetry::Telemetry;

/// Room for blocks of a remote store, unless told otherwise.
const CACHE_GIB: u32 = 16;

pub(crate) async fn run(args: Worker, telemetry: &Telemetry) -> Result<()> {
    let signal = signals::stop_on_signals("leaving the run after the step in flight")?;
    if args.bound {
        signals::end_with_parent();
    }
    allow_all_descriptors();
    args.listening.check("--peer-listen", args.peer_listen, TAKES_PART)?;
    args.listening.check_tokens(args.metrics.is_some(), "--metrics")?;
    let credentials = args.listening.credentials(Role::Worker)?;
    credentials.iter().for_each(observe_expiry);
    if let Some(address) = args.metrics {
        args.listening.check("--metrics", address, READS)?;
        let access = args.listening.access(credentials.clone())?;
        let bound = http::bind(address).await;
        let (_, listener) = bound.with_context(|| format!("cannot serve /metrics on {address}"))?;
        let render = telemetry.renderer();
        let app = Router::new().route("/metrics", get(move || async move { render() }));
        tokio::spawn(http::serve(listener, app, access, CancellationToken::new()));
    }
    let name = args.name.unwrap_or_else(|| format!("{}-{}", host_name(), std::process::id()));
    let threads = args.threads.unwrap_or_else(all_threads);
    if !args.quiet {
        print_line(&format!(
            "{name} joins {}; device: {}; compute threads: {threads}",
            args.coordinator, args.device
        ));
    }
    let mut settings = WorkerSettings::new(args.coordinator, name);
    settings.device = args.device;
    settings.threads = threads as usize;
    settings.memory = args.memory;
    settings.peer_listen = args.peer_listen;
    settings.credentials = credentials;
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
    settings.cache = cache(args.cache, args.cache_gib)?;
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

/// The cache of blocks: as given, else as the environment says, else for remote stores alone.
pub(super) fn cache(directory: Option<PathBuf>, gib: Option<u32>) -> Result<Option<BlockCache>> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let gib = match (gib, variable("LOOPTRAIN_CACHE_GIB")) {
        (Some(gib), _) => gib,
        (None, Some(text)) => text
            .to_str()
            .and_then(|text| text.parse().ok())
            .context("LOOPTRAIN_CACHE_GIB is no number of GiB; write one such as 16")?,
        (None, None) => CACHE_GIB,
    };
    let always = directory.is_some();
    let usual = || {
        let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
        Some(cache?.join("looptrain"))
    };
    let directory =
        directory.or_else(|| variable("LOOPTRAIN_CACHE").map(PathBuf::from)).or_else(usual);
    let directory = directory.filter(|_| gib > 0);
    Ok(directory.map(|directory| BlockCache { directory, bytes: u64::from(gib) << 30, always }))
}
