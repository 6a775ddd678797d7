//! What a user can type.

mod bench;
mod checkpoint;
mod data;
mod doctor;
mod model;
mod security;
mod tokenizer;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use looptrain_model::Device;

pub(crate) use bench::{
    Bench, CheckpointBench, CommitBench, DataBench, Kernels, OrchestrationBench, Recomputed,
    ReduceBench, Reduced, StepBench, TokenizeBench, TransferBench,
};
pub(crate) use checkpoint::{
    Branch, Checkpoint, CheckpointList, CheckpointPrune, CheckpointUrl, CheckpointVerify,
    Sequences, StoredRun,
};
pub(crate) use data::{Data, Inspect, Making, ManoData, Prepare, Verify};
pub(crate) use doctor::Doctor;
pub(crate) use model::{
    DatasetUrl, Eval, Export, Gate, Generate, Import, LayerOrder, ModelArgs, ModelSource, ModelUrl,
    Upcycle,
};
pub(crate) use security::{
    Certs, Issue, ListenArgs, NewAuthority, NewToken, ShowCertificate, TlsArgs,
};
pub(crate) use tokenizer::{InspectTokenizer, Tokenizer, TrainTokenizer};

use crate::fault::Fault;
use crate::preemption;

/// More threads than any machine has cores; far fewer than make a system refuse.
const MAX_THREADS: i64 = 1024;

/// Pretrains looped language models on a changing set of machines.
#[derive(Debug, Parser)]
#[command(name = "looptrain", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train on this machine: a coordinator and its worker processes
    #[command(after_help = "Example: looptrain train examples/quickstart.toml --workers 2\n\
        The same command again goes on from the newest checkpoint.\n\
        What a spec asks for: looptrain train examples/ouro-1.4b.toml --dry-run")]
    Train(Train),
    /// Run the coordinator of a run; workers join it over the network
    #[command(after_help = "Example: looptrain coordinator run.toml --listen 127.0.0.1:7400\n\
        For other machines: looptrain coordinator run.toml --listen 0.0.0.0:7400 --tls tls")]
    Coordinator(Coordinator),
    /// Join a run as a worker
    #[command(after_help = "Example: looptrain worker --coordinator http://127.0.0.1:7400\n\
        From another machine: looptrain worker --coordinator https://HOST:7400 --tls tls \
        --peer-listen 0.0.0.0:0")]
    Worker(Worker),
    /// Show what a run is doing, or what its store says it did
    #[command(
        after_help = "Examples: looptrain status --coordinator http://127.0.0.1:7400\n          \
        looptrain status --coordinator http://127.0.0.1:7400 --watch\n          \
        looptrain status --store file://.looptrain\n          \
        looptrain status --store file://.looptrain --run quickstart --json"
    )]
    Status(Status),
    /// Draw what a run's loops did over its steps: loss, exits, agreement
    #[command(
        after_help = "Example: looptrain plot --store file://.looptrain --run quickstart --output \
        curves.svg"
    )]
    Plot(Plot),
    /// Have a worker leave a run, without anybody waiting for it
    #[command(
        after_help = "Example: looptrain drain node7-4211 --coordinator http://127.0.0.1:7400"
    )]
    Drain(Drain),
    /// Hold a run at the next step; workers keep their state
    #[command(after_help = "Example: looptrain pause --coordinator http://127.0.0.1:7400")]
    Pause(Pause),
    /// Have a paused run go on
    #[command(after_help = "Example: looptrain resume --coordinator http://127.0.0.1:7400")]
    Resume(Resume),
    /// Save a checkpoint of a run at the next step, beside training, and wait until it is there
    #[command(after_help = "Example: looptrain save --coordinator http://127.0.0.1:7400")]
    Save(Save),
    /// Stop a run at the next step, with a checkpoint; the same start command goes on from there
    #[command(after_help = "Example: looptrain stop --coordinator http://127.0.0.1:7400")]
    Stop(Stop),
    /// Make and show the certificates of a cluster, and tokens for its status page
    #[command(subcommand)]
    Certs(Certs),
    /// Compare what every committed step of an audited run was computed from with the data order
    #[command(
        after_help = "Example: looptrain audit --store file://.looptrain --run quickstart --read\n\
        The run must have been started with --audit. Exit status 1 and the first difference if \
        there is one."
    )]
    Audit(Audit),
    /// Show the text that a step of a run is computed from
    #[command(
        after_help = "Example: looptrain sequences --store file://.looptrain --run quickstart \
        --step 24 --slot 1\nWhat an error or a spike names: a step, a slot and its sequences."
    )]
    Sequences(Sequences),
    /// Write the spec of a run that goes on from a checkpoint of another one, by other settings
    #[command(after_help = "Examples:\n  \
        looptrain branch file://.looptrain/runs/quickstart/checkpoints/step-0000000300 --name slower \
        --set stages.0.learning_rate.peak=1e-3 > slower.toml\n  \
        looptrain train slower.toml\n\
        Weights, moments and the place in the data are those of the checkpoint; the run that it is of \
        stays as it is. With --skip-steps 50 the branch passes over the data of the next 50 steps.")]
    Branch(Branch),
    /// Continue a text
    #[command(after_help = "Examples:\n  \
        looptrain generate --checkpoint file://.looptrain/runs/quickstart --prompt 'fn main() {'\n  \
        looptrain generate --from Ouro-1.4B --chat --prompt 'Why is the sky blue?' --exit 0.9 \
        --cache last")]
    Generate(Generate),
    /// Measure a model at each depth: loss, accuracy, and when tokens exit
    #[command(after_help = "Examples:\n  \
        looptrain eval --checkpoint file://.looptrain/runs/quickstart --plot depth.svg\n  \
        looptrain eval --from Ouro-1.4B --data s3://lab/datasets/web --sequences 256 --json\n  \
        looptrain eval --from Ouro-1.4B --tokens ids.npy --targets next.npy --json")]
    Eval(Eval),
    /// Train the exit gate of a trained model, and nothing else of it (the paper's Stage II)
    #[command(
        after_help = "Example: looptrain gate --from file://.looptrain/runs/quickstart --steps 200\n\
        A run of its own, NAME-gate; the same command goes on with it. Ends with the curves of depth \
        and loss before and after."
    )]
    Gate(Gate),
    /// Write a checkpoint as a folder that the published Ouro code loads
    #[command(
        after_help = "Example: looptrain export --checkpoint file://.looptrain/runs/quickstart --to \
        quickstart-model\nThe newest checkpoint of a run, or with /checkpoints/step-0000000600 behind \
        it that one."
    )]
    Export(Export),
    /// Bring the weights of a model into a store, for a run to begin from
    #[command(
        after_help = "Example: looptrain import --from Ouro-1.4B --to s3://lab/models/ouro\n\
        Prints what the spec of the run says then."
    )]
    Import(Import),
    /// Make a deeper model out of a trained one, by repeating its layers, for a run to begin from
    #[command(after_help = "Example: looptrain upcycle --from s3://lab/runs/stage-1 --layers 48 \
        --order block --to s3://lab/models/deeper")]
    Upcycle(Upcycle),
    /// See, check and remove the checkpoints of a run
    #[command(subcommand)]
    Checkpoint(Checkpoint),
    /// Make datasets, look into them, check them
    #[command(subcommand)]
    Data(Data),
    /// Train a tokenizer for several datasets, look into one
    #[command(subcommand)]
    Tokenizer(Tokenizer),
    /// Measure a part of the system on this machine; one JSON line on stdout
    #[command(after_help = "Example: looptrain bench commit --workers 2000")]
    #[command(subcommand)]
    Bench(Bench),
    /// Hurt a local cluster at random and see whether the weights come out the same
    #[command(after_help = "Example: looptrain chaos examples/tiny.toml --seed 7 --minutes 2 \
        --workers 4 --json\nThe same seed is the same schedule. Exit status 1 and a line that \
        names seed and event when the\nweights differ from those of an undisturbed run, or when \
        no step is committed for 30 s.")]
    Chaos(Chaos),
    /// Check a machine and a spec before a run, and say what to mend
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(Doctor),
}

impl Command {
    /// The command's name, as the telemetry's service instance shows it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Train(_) => "train",
            Self::Coordinator(_) => "coordinator",
            Self::Worker(_) => "worker",
            Self::Status(_) => "status",
            Self::Plot(_) => "plot",
            Self::Drain(_) => "drain",
            Self::Pause(_) => "pause",
            Self::Save(_) => "save",
            Self::Resume(_) => "resume",
            Self::Stop(_) => "stop",
            Self::Certs(_) => "certs",
            Self::Audit(_) => "audit",
            Self::Sequences(_) => "sequences",
            Self::Branch(_) => "branch",
            Self::Generate(_) => "generate",
            Self::Eval(_) => "eval",
            Self::Gate(_) => "gate",
            Self::Export(_) => "export",
            Self::Import(_) => "import",
            Self::Upcycle(_) => "upcycle",
            Self::Checkpoint(_) => "checkpoint",
            Self::Data(_) => "data",
            Self::Tokenizer(_) => "tokenizer",
            Self::Bench(_) => "bench",
            Self::Chaos(_) => "chaos",
            Self::Doctor(_) => "doctor",
        }
    }
}

/// A spec file and its overrides.
#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    /// The run spec, a TOML file
    pub(crate) spec: PathBuf,
    /// Override a key of the spec, such as `stages.0.steps=20`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Forget what the store holds of this run and begin anew; datasets stay
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Stop after this step, with a checkpoint; the same command without it goes on from there
    #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) until: Option<u64>,
    /// Serve the status page and /metrics on this address, such as 127.0.0.1:8080
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) dashboard: Option<SocketAddr>,
    /// Write the run's numbers for TensorBoard into a folder of the run's name below this one
    #[arg(long, value_name = "DIR")]
    pub(crate) tensorboard: Option<PathBuf>,
    /// Have workers write which sequences each step was computed from, for `looptrain audit`
    #[arg(long)]
    pub(crate) audit: bool,
}

/// What is to be assumed of the machines of a plan.
#[derive(Debug, Args)]
pub(crate) struct DryRun {
    /// Share of a GPU's peak that training reaches, for the plan
    #[arg(long, value_name = "SHARE", requires = "dry_run", default_value_t = 0.4, value_parser = positive)]
    pub(crate) mfu: f64,
    /// A GPU's peak in TFLOP/s, for the plan: dense bf16 of an H100 by default
    #[arg(long, value_name = "TFLOPS", requires = "dry_run", default_value_t = 989.0, value_parser = positive)]
    pub(crate) peak_tflops: f64,
}

#[derive(Debug, Args)]
pub(crate) struct Train {
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
    /// Print what the spec asks for (tokens, steps, operations, memory, GPU-hours, checkpoints), and do
    /// nothing of it
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) plan: DryRun,
    /// Print the plan as one JSON object
    #[arg(long, requires = "dry_run")]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) fleet: FleetArgs,
    /// For the status page; workers are on this machine
    #[command(flatten)]
    pub(crate) listening: ListenArgs,
}

/// Workers on this machine.
#[derive(Debug, Args)]
pub(crate) struct FleetArgs {
    /// Worker processes to start; overrides cluster.workers
    #[arg(long)]
    pub(crate) workers: Option<u32>,
    /// Where the workers compute; with a GPU, the first of them on that one and the others on the next
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// CPU threads that the workers share; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
    /// Memory that the workers share; without it, compute.memory_gib for each, or what the machine has
    #[arg(long, value_name = "GIB", value_parser = gibibytes)]
    pub(crate) memory: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Coordinator {
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
    /// Address for workers
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400", value_parser = address)]
    pub(crate) listen: SocketAddr,
    #[command(flatten)]
    pub(crate) listening: ListenArgs,
    /// Print every event of the run as one JSON line on stdout
    #[arg(long)]
    pub(crate) events: bool,
    /// What this process does to itself at an exact moment, such as kill@decided:17; for tests
    #[arg(long = "fault", value_name = "ACTION@MOMENT[:STEP]", hide = true, value_parser = coordinator_fault)]
    pub(crate) faults: Vec<Fault>,
    /// End with the process that started this one, or when stdin does
    #[arg(long, hide = true)]
    pub(crate) bound: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Worker {
    /// The coordinator's address
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) listening: ListenArgs,
    /// Name of this worker, unique in the run; host name and process id by default
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Where to compute: on this machine's CPU or on a GPU, by the number that the driver gives it
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// Compute threads; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
    /// Memory that this worker may use, which decides what backward computes again unless the spec
    /// does; without it, compute.memory_gib, or what the machine has
    #[arg(long, value_name = "GIB", value_parser = gibibytes)]
    pub(crate) memory: Option<u64>,
    /// Give up when the coordinator has not let this worker in after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) connect_timeout: u32,
    /// When the coordinator is lost, keep the state and look for another one at the same address
    /// for this many seconds; with 0, end at once
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) reconnect_timeout: u32,
    /// Address for other workers: gradients from the ring neighbour, joiners that fetch the state;
    /// with an unspecified host (0.0.0.0) the address that faces the coordinator is told to the
    /// others
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0", value_parser = address)]
    pub(crate) peer_listen: SocketAddr,
    /// Leave when this machine is about to be taken away, as the cloud's metadata service says (aws,
    /// gcp, azure) or a file that appears (file:PATH)
    #[arg(long, value_name = "SOURCE")]
    pub(crate) preemption_notice: Option<preemption::Source>,
    /// Where the metadata service is instead of at its usual address; for tests
    #[arg(long, value_name = "URL", hide = true, requires = "preemption_notice")]
    pub(crate) metadata_service: Option<String>,
    /// Keep blocks of datasets in this directory, which workers of a machine share; without it, those
    /// of a remote store are kept in $LOOPTRAIN_CACHE, or below the user's cache directory
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// How large that directory may be; 0 for no cache; by default $LOOPTRAIN_CACHE_GIB, or 16
    #[arg(long, value_name = "GIB")]
    pub(crate) cache_gib: Option<u32>,
    /// Serve /metrics of this worker on this address, such as 127.0.0.1:9100
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) metrics: Option<SocketAddr>,
    /// Print warnings and errors alone
    #[arg(long)]
    pub(crate) quiet: bool,
    /// What this process does to itself at an exact moment, such as kill@reduce:17; for tests
    #[arg(long = "fault", value_name = "ACTION@MOMENT[:STEP]", hide = true, value_parser = worker_fault)]
    pub(crate) faults: Vec<Fault>,
    /// End with the process that started this one, or when stdin does
    #[arg(long, hide = true)]
    pub(crate) bound: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Ask this coordinator
    #[arg(long, value_name = "URL", conflicts_with_all = ["store", "run"], required_unless_present = "store")]
    pub(crate) coordinator: Option<String>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Read this store, when no coordinator is running
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// Name of the run in the store; without it, all that there are
    #[arg(long, requires = "store")]
    pub(crate) run: Option<String>,
    /// Print JSON
    #[arg(long, conflicts_with = "watch")]
    pub(crate) json: bool,
    /// Fill the terminal with it, once a second, until q is pressed
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Plot {
    /// The store of the run
    #[arg(long, value_name = "URL")]
    pub(crate) store: String,
    /// Name of the run in the store
    #[arg(long)]
    pub(crate) run: String,
    /// The SVG file to write
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// The worker's name, as `looptrain status` shows it
    pub(crate) worker: String,
    /// The coordinator's address
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// For the run's log
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct Pause {
    /// The coordinator's address
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// For the run's log
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct Resume {
    /// The coordinator's address
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Save {
    /// The coordinator's address
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// The coordinator's address
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// For the run's log
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// URL of the store
    #[arg(long, value_name = "URL")]
    pub(crate) store: String,
    /// Name of the run in the store
    #[arg(long)]
    pub(crate) run: String,
    /// Also read all sequences again, and compare their tokens with those that were used
    #[arg(long)]
    pub(crate) read: bool,
    /// Print what every step used, one JSON line a step, before the result
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Chaos {
    /// The run spec, a TOML file; the runs are others of its store, begun anew and removed
    pub(crate) spec: PathBuf,
    /// Override a key of the spec; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Decides what happens, and when
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// For how long things happen; about one every five seconds
    #[arg(long, default_value_t = 1.0, value_parser = minutes)]
    pub(crate) minutes: f64,
    /// Workers in the beginning; the spec's cluster.workers by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: Option<u32>,
    /// CPU threads that the workers share; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
    /// Print the report as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

fn minutes(text: &str) -> Result<f64, String> {
    let given = text.parse().ok().filter(|given: &f64| (0.05..=1e5).contains(given));
    given.ok_or_else(|| "it must be a number of minutes, 0.05 or more".to_owned())
}

fn positive(text: &str) -> Result<f64, String> {
    let given = text.parse().ok().filter(|given: &f64| given.is_finite() && *given > 0.0);
    given.ok_or_else(|| "it must be a number above 0".to_owned())
}

/// In bytes.
fn gibibytes(text: &str) -> Result<u64, String> {
    let given = text.parse().ok().filter(|given: &f64| *given > 0.0 && *given <= 1e6);
    let bytes = given.map(|given| (given * (1u64 << 30) as f64) as u64);
    bytes.ok_or_else(|| "it must be a number of GiB above 0, such as 1.5".to_owned())
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "write IP:PORT, such as 127.0.0.1:7400".to_owned())
}

fn worker_fault(text: &str) -> Result<Fault, String> {
    Fault::parse(text, &looptrain_worker::Moment::NAMES)
}

fn coordinator_fault(text: &str) -> Result<Fault, String> {
    Fault::parse(text, &looptrain_coordinator::Moment::NAMES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_address_has_numbers_and_a_port() {
        assert_eq!(address("[::1]:80").unwrap().port(), 80);
        for wrong in ["localhost:80", "127.0.0.1", "http://127.0.0.1:80", ""] {
            assert!(address(wrong).unwrap_err().contains("IP:PORT"), "{wrong}");
        }
    }

    #[test]
    fn memory_is_counted_in_gibibytes() {
        assert_eq!(gibibytes("1.5"), Ok(3 << 29));
        for wrong in ["0", "-1", "1e9", "nan", "8G", ""] {
            assert!(gibibytes(wrong).is_err(), "{wrong}");
        }
    }
}
