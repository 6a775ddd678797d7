//! The operator's side of looptrain: the command line, the local cluster, progress and telemetry.
//!
//! A library with one entrance, so that the program and the tests' copy of it are the same code.
//! Everything else in the project only emits telemetry and obeys cancellation tokens; SDKs, signal
//! handlers and the allocator are installed here.

#[macro_use]
mod output;

mod chaos;
mod chart;
mod cli;
mod commands;
mod datasets;
mod fault;
mod folder;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod launcher;
mod limits;
mod npy;
mod plan;
mod preemption;
mod progress;
mod security;
mod signals;
mod telemetry;
mod tensorboard;
mod trained;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use looptrain_coordinator::CoordinatorError;
use looptrain_proto::SpecError;
use looptrain_storage::Faults;
use looptrain_worker::WorkerError;

use crate::cli::{Cli, Command};

/// Names the faults of every store that this process and its workers open; for tests.
const STORE_FAULTS: &str = "LOOPTRAIN_STORE_FAULTS";

fn install_store_faults() -> Result<(), String> {
    let Some(text) = std::env::var_os(STORE_FAULTS) else { return Ok(()) };
    let faults = text.to_string_lossy().parse::<Faults>();
    faults.map(Faults::install).map_err(|wrong| format!("{STORE_FAULTS}: {wrong}"))
}

/// Whether the program understands these words behind its name; nothing is done. For tests of commands in
/// documents and in what is deployed.
///
/// # Errors
/// What the program would say of them.
pub fn check_command_line(words: &[String]) -> Result<(), String> {
    let words = std::iter::once("looptrain").chain(words.iter().map(String::as_str));
    match Cli::try_parse_from(words) {
        Err(error) if error.use_stderr() => Err(error.to_string()),
        // Also a page of help, or the version.
        _ => Ok(()),
    }
}

/// Runs the command line; the exit status is 0, 1 (failed), 2 (usage or spec) or 3 (another coordinator
/// has taken the run over: whoever starts this one again would take it back).
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(wrong) = install_store_faults() {
        let _ = writeln!(std::io::stderr(), "error: {wrong}");
        return ExitCode::from(2);
    }
    let threads = match &cli.command {
        // Compute threads are the engine's own; these only move bytes.
        Command::Worker(_) => 2,
        _ => std::thread::available_parallelism().map_or(2, usize::from).max(2),
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(async {
                let telemetry = telemetry::Telemetry::install(cli.command.name())?;
                let result = commands::run(cli.command, &telemetry).await;
                if let Err(error) = &result {
                    // On stderr it is the last line.
                    tracing::error!(target: telemetry::TOLD, "{error:#}");
                }
                telemetry.shutdown();
                result
            });
            // An interrupted command may leave a thread at work on a dataset: nothing of it counts
            // before its manifest is written, so nobody waits for it.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(anyhow::Error::new(error).context("cannot start the runtime")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever closed stderr does not want to know.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            let wrong_url = |error: &WorkerError| matches!(error, WorkerError::Url { .. });
            let taken_over =
                |error: &CoordinatorError| matches!(error, CoordinatorError::Fenced { .. });
            ExitCode::from(match &error {
                error if error.is::<SpecError>() || error.is::<security::Usage>() => 2,
                error if error.downcast_ref().is_some_and(wrong_url) => 2,
                error if error.downcast_ref().is_some_and(taken_over) => 3,
                _ => 1,
            })
        }
    }
}
