//! What can be done with datasets.

use clap::{Args, Subcommand, ValueEnum};
use looptrain_proto::spec;

use super::MAX_THREADS;

#[derive(Debug, Subcommand)]
pub(crate) enum Data {
    /// Make a dataset from text files, JSON Lines or Parquet
    #[command(after_help = "Example: looptrain data prepare --input s3://corpus/web --tokenizer \
        tokenizer.json --output s3://bucket/store/datasets/web\n\
        The same command again goes on with the shard at which it was interrupted.")]
    Prepare(Prepare),
    /// Show what a dataset holds: counts, lengths of documents, samples
    #[command(after_help = "Example: looptrain data inspect file://.looptrain/datasets/local-text")]
    Inspect(Inspect),
    /// Read and hash every file of a dataset again; exit status 1 when one is not as it was written
    #[command(after_help = "Example: looptrain data verify file://.looptrain/datasets/local-text")]
    Verify(Verify),
    /// Make the modular-arithmetic task of the LoopLM paper as a dataset, with its own tokenizer
    #[command(after_help = "Example: looptrain data mano --max-operators 10 --exercises 1000000 \
        --output file://.looptrain/datasets/mano-10")]
    Mano(ManoData),
}

/// The texts that a dataset or a tokenizer is made of.
#[derive(Debug, Args)]
pub(crate) struct Texts {
    /// A file, a directory, or a URL of an object or a prefix; may be repeated
    #[arg(long = "input", value_name = "URL", required = true, num_args = 1..)]
    pub(crate) inputs: Vec<String>,
    /// How documents lie in the files; by their names by default
    #[arg(long, value_enum, default_value_t = DataFormat::Auto)]
    pub(crate) format: DataFormat,
    /// The field of a JSON line, or the column of a Parquet file, that holds the text
    #[arg(long, visible_alias = "column", default_value = "text")]
    pub(crate) field: String,
    /// Endings of plain text files, to take from directories
    #[arg(long, value_name = "ENDINGS", value_delimiter = ',', default_value = "txt,md")]
    pub(crate) extensions: Vec<String>,
}

impl Texts {
    /// What the options say, as a spec would.
    pub(crate) fn source(&self) -> spec::Source {
        spec::Source {
            paths: self.inputs.clone(),
            format: self.format.into(),
            extensions: self.extensions.clone(),
            field: self.field.clone(),
            ..spec::Source::default()
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Prepare {
    #[command(flatten)]
    pub(crate) texts: Texts,
    /// The dataset to make, STORE/datasets/NAME
    #[arg(long, value_name = "URL")]
    pub(crate) output: String,
    /// A Hugging Face tokenizer.json, a file or a URL; without it one is trained on the text
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<String>,
    /// The tokenizer's entry that stands after each document, when it has none of the usual names
    #[arg(long, value_name = "TOKEN", requires = "tokenizer")]
    pub(crate) end_of_text: Option<String>,
    /// Entries of the tokenizer that is trained
    #[arg(long, default_value_t = 4096, conflicts_with = "tokenizer")]
    pub(crate) vocabulary: usize,
    /// Share of the documents held out for validation
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    pub(crate) validation: f64,
    /// Share of the records that may be malformed
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    pub(crate) max_malformed: f64,
    #[command(flatten)]
    pub(crate) making: Making,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum DataFormat {
    /// By the files' names: .jsonl, .parquet, or plain text; .gz and .zst are unpacked
    Auto,
    /// Plain text: a file is a document, long ones are cut
    Text,
    /// JSON Lines: a line is a document
    Jsonl,
    /// Parquet: a row is a document
    Parquet,
}

impl From<DataFormat> for spec::Format {
    fn from(format: DataFormat) -> Self {
        match format {
            DataFormat::Auto => Self::Auto,
            DataFormat::Text => Self::Text,
            DataFormat::Jsonl => Self::Jsonl,
            DataFormat::Parquet => Self::Parquet,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The dataset, STORE/datasets/NAME
    #[arg(value_name = "URL")]
    pub(crate) dataset: String,
    /// Documents to show of each split
    #[arg(long, default_value_t = 3)]
    pub(crate) samples: u64,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The dataset, STORE/datasets/NAME
    #[arg(value_name = "URL")]
    pub(crate) dataset: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ManoData {
    /// The dataset to make, STORE/datasets/NAME
    #[arg(long, value_name = "URL")]
    pub(crate) output: String,
    /// Operators of an expression at most; validation has exercises of so many alone
    #[arg(long, value_name = "L", default_value_t = 10)]
    pub(crate) max_operators: u32,
    /// Numbers are counted modulo this
    #[arg(long, value_name = "N", default_value_t = 23)]
    pub(crate) modulus: u32,
    /// Exercises to train on
    #[arg(long, default_value_t = 1_000_000)]
    pub(crate) exercises: u64,
    /// Exercises to validate with
    #[arg(long, default_value_t = 10_000)]
    pub(crate) validation: u64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) making: Making,
}

/// How a dataset is made, whatever of.
#[derive(Debug, Args)]
pub(crate) struct Making {
    /// Tokens per shard
    #[arg(long, default_value_t = 1 << 22)]
    pub(crate) shard_tokens: u64,
    /// Threads that do the work; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
    /// Print what was made as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
