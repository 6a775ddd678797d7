//! One file per command.

mod audit;
mod bench;
mod branch;
mod certs;
mod chaos;
mod checkpoint;
mod coordinator;
mod data;
mod doctor;
mod eval;
mod export;
mod gate;
mod generate;
mod import;
mod orders;
pub(crate) mod plot;
mod sequences;
pub(crate) mod status;
mod tokenizer;
mod train;
mod worker;

use anyhow::Result;

use crate::cli::Command;
use crate::telemetry::Telemetry;

pub(crate) async fn run(command: Command, telemetry: &Telemetry) -> Result<()> {
    match command {
        Command::Train(args) => train::run(args, telemetry).await,
        Command::Coordinator(args) => coordinator::run(args, telemetry).await,
        Command::Worker(args) => worker::run(args, telemetry).await,
        Command::Status(args) => status::run(args).await,
        Command::Plot(args) => plot::run(args).await,
        Command::Drain(args) => orders::drain(args).await,
        Command::Pause(args) => orders::pause(args).await,
        Command::Save(args) => orders::save(args).await,
        Command::Resume(args) => orders::resume(args).await,
        Command::Stop(args) => orders::stop(args).await,
        Command::Certs(args) => certs::run(args),
        Command::Audit(args) => audit::run(args).await,
        Command::Sequences(args) => sequences::run(args).await,
        Command::Branch(args) => branch::run(args).await,
        Command::Generate(args) => generate::run(args).await,
        Command::Eval(args) => eval::run(args).await,
        Command::Gate(args) => gate::run(args, telemetry).await,
        Command::Export(args) => export::run(args).await,
        Command::Import(args) => import::run(args).await,
        Command::Upcycle(args) => import::upcycle(args).await,
        Command::Checkpoint(args) => checkpoint::run(args).await,
        Command::Data(data) => data::run(data).await,
        Command::Tokenizer(tokenizer) => tokenizer::run(tokenizer).await,
        Command::Bench(bench) => bench::run(bench, telemetry).await,
        Command::Chaos(args) => chaos::run(args).await,
        Command::Doctor(args) => doctor::run(args).await,
    }
}

/// The machine's threads.
pub(crate) fn all_threads() -> u32 {
    std::thread::available_parallelism()
        .ok()
        .and_then(|threads| u32::try_from(threads.get()).ok())
        .unwrap_or(1)
}
