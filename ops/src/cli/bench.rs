//! What can be measured.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use looptrain_model::Device;
use looptrain_proto::spec::{Cluster, Reduction};

use super::MAX_THREADS;

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// From the last vote on a step to the last commit: a coordinator and its sessions over gRPC on
    /// the loopback, with workers that compute nothing
    #[command(after_help = "Example: looptrain bench commit --workers 2000 --steps 300")]
    Commit(CommitBench),
    /// The feed by itself: samples a second over one data epoch, and the time to the first batch at
    /// the beginning of a run and far into it
    #[command(
        after_help = "Example: looptrain bench data --million-tokens 64 --sequence-length 2048\n\
        The dataset is made of tokens that look random; with --store it stays, for another time."
    )]
    Data(DataBench),
    /// Training state from peer to peer over the loopback: served, fetched, hashed, verified
    #[command(after_help = "Example: looptrain bench transfer --mib 1024 --sources 2")]
    Transfer(TransferBench),
    /// The ring all-reduce of a gradient over the loopback, exact and fast, and the gradient's way
    /// into the sums and back
    #[command(after_help = "Example: looptrain bench reduce --workers 2 --bytes 268435456")]
    Reduce(ReduceBench),
    /// What a save takes of a step, and how fast it is uploaded beside what the store's client reaches
    /// alone
    #[command(after_help = "Example: looptrain bench checkpoint --store s3://bucket --mib 512\n\
        What it writes below the store's prefix is removed again.")]
    Checkpoint(CheckpointBench),
    /// A training step on one fixed batch: forward, backward, clipping and AdamW, as a worker takes it
    #[command(
        after_help = "Example: looptrain bench step --batch 2 --sequence 1024 --recompute loop\n\
        The default shape is a model of 5.5 million parameters and a batch of 2,048 tokens."
    )]
    Step(StepBench),
    /// Text into token shards in a store, end to end: what `data prepare` does
    #[command(after_help = "Example: looptrain bench tokenize --input corpus.jsonl --tokenizer \
        tokenizer.json\nThe dataset that it makes below the store's prefix is removed again.")]
    Tokenize(TokenizeBench),
    /// What the control plane costs: the same steps bare in one process, and as a local run
    #[command(after_help = "Example: looptrain bench orchestration examples/quickstart.toml\n\
        The run of the spec is left alone: one of another name is begun anew, in the same store.")]
    Orchestration(OrchestrationBench),
}

#[derive(Debug, Args)]
pub(crate) struct CommitBench {
    /// Sessions
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) workers: u32,
    /// Steps that are measured
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
}

#[derive(Debug, Args)]
pub(crate) struct DataBench {
    /// Size of the dataset, in millions of tokens of 16 bits
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub(crate) million_tokens: u64,
    /// Tokens of a sequence, which is a sample
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) sequence_length: u64,
    /// Where the dataset is made, unless it is there; a directory that is removed by default
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// Keep its blocks in this directory, as workers do with those of a remote store
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// Times that the feed begins at each place; the figures are of the medians
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
}

#[derive(Debug, Args)]
pub(crate) struct TransferBench {
    /// Size of the state: weights and both moments
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) mib: u32,
    /// Peers that offer it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) sources: u32,
    /// Times that it is fetched; the figures are of the median
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
}

#[derive(Debug, Args)]
pub(crate) struct ReduceBench {
    /// Ranks in the ring
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=64))]
    pub(crate) workers: u32,
    /// Bytes of the gradient, 4 a parameter; exact sums of it take twice as many
    #[arg(long, default_value_t = 256 << 20, value_parser = clap::value_parser!(u64).range(4..=1 << 36))]
    pub(crate) bytes: u64,
    /// How it is summed; each way in turns by default
    #[arg(long, value_enum)]
    pub(crate) reduction: Option<ReductionName>,
    /// Connections from each rank to the next
    #[arg(long, default_value_t = Cluster::default().streams, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) streams: u32,
    /// Within TLS, with certificates made for it
    #[arg(long)]
    pub(crate) secured: bool,
    /// Times that they are reduced; the figures are of the median
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
}

/// As in a spec.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ReductionName {
    /// 64-bit fixed point
    Exact,
    /// Single precision
    Fast,
    /// Single precision, rounded to bf16 to travel
    FastBf16,
}

impl From<ReductionName> for Reduction {
    fn from(name: ReductionName) -> Self {
        match name {
            ReductionName::Exact => Self::Exact,
            ReductionName::Fast => Self::Fast,
            ReductionName::FastBf16 => Self::FastBf16,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointBench {
    /// URL of the store
    #[arg(long, value_name = "URL")]
    pub(crate) store: String,
    /// Size of the state: weights and both moments; about, for layers are whole
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) mib: u32,
    /// Ranks that save a part each, side by side
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) ranks: u32,
    /// Saves; the figures are of the median
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
}

#[derive(Debug, Args)]
pub(crate) struct StepBench {
    /// Width of the residual stream
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub(crate) hidden: u32,
    /// Layers of the stack
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) layers: u32,
    /// Times that the stack is applied
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) loops: u32,
    /// Attention heads
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) heads: u32,
    /// Inner width of the SwiGLU
    #[arg(long, default_value_t = 768, value_parser = clap::value_parser!(u32).range(1..=1 << 18))]
    pub(crate) ffn: u32,
    /// Entries of the vocabulary
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) vocab: u32,
    /// Sequences of a step
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub(crate) batch: u32,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) sequence: u32,
    /// Slots that the batch is cut into; as many as threads where that divides it, else one
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub(crate) slots: Option<u32>,
    /// Threads that compute; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
    /// Steps that are measured, after two that are not
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) steps: u32,
    /// What backward computes again instead of keeping it
    #[arg(long, value_enum, default_value = "none")]
    pub(crate) recompute: Recomputed,
    /// The worker's own kernels, or the same model in plain Burn operations, slot for slot
    #[arg(long, value_enum, default_value = "fused")]
    pub(crate) kernels: Kernels,
    /// How slots are added: as workers do, or in plain floating point; without fixed point by default
    /// with composite kernels, which know no other way
    #[arg(long, value_enum)]
    pub(crate) reduction: Option<Reduced>,
    /// Where it is computed
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
}

/// What backward computes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Recomputed {
    /// Nothing
    None,
    /// A loop at a time
    Loop,
    /// A layer at a time
    Layer,
}

/// Whose arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernels {
    /// The worker's
    Fused,
    /// Burn's
    Composite,
}

/// How the slots of a step become one gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Reduced {
    /// In fixed point, with the digest that a vote carries
    Exact,
    /// In floating point, and nothing else
    None,
}

#[derive(Debug, Args)]
pub(crate) struct TokenizeBench {
    /// A file, a directory, or a URL of an object or a prefix; may be repeated
    #[arg(long = "input", value_name = "URL", required = true, num_args = 1..)]
    pub(crate) inputs: Vec<String>,
    /// A Hugging Face tokenizer.json, a file or a URL
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: String,
    /// The field of a JSON line, or the column of a Parquet file, that holds the text
    #[arg(long, default_value = "text")]
    pub(crate) field: String,
    /// URL of the store that the shards are written to
    #[arg(long, value_name = "URL", default_value = "file://.looptrain")]
    pub(crate) store: String,
    /// Threads that tokenize; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
    /// Times that it is done; the figures are of the median
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
}

#[derive(Debug, Args)]
pub(crate) struct OrchestrationBench {
    /// The run spec, a TOML file
    pub(crate) spec: PathBuf,
    /// Override a key of the spec; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// Steps that are measured, of each of the four runs
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    /// Worker processes of the local run
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) workers: u32,
    /// CPU threads, of the bare steps and of all workers together; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
}
