//! What can be done with tokenizers.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::MAX_THREADS;
use super::data::Texts;

#[derive(Debug, Subcommand)]
pub(crate) enum Tokenizer {
    /// Train a byte-level BPE tokenizer on several inputs, for all datasets of a run to share
    #[command(after_help = "Examples:\n  \
        looptrain tokenizer train --input web.jsonl.gz --input code --vocabulary 32768 --output \
        tokenizer.json\n  \
        looptrain data prepare --input code --tokenizer tokenizer.json --output \
        file://.looptrain/datasets/code\n\
        Each input gives about the same share of --bytes; what a small one has not, larger ones give.")]
    Train(TrainTokenizer),
    /// Show what a tokenizer is, and what it makes of a text
    #[command(
        after_help = "Example: looptrain tokenizer inspect tokenizer.json --text 'fn main() {'"
    )]
    Inspect(InspectTokenizer),
}

#[derive(Debug, Args)]
pub(crate) struct TrainTokenizer {
    #[command(flatten)]
    pub(crate) texts: Texts,
    /// The tokenizer.json to write, a file or a URL
    #[arg(long, value_name = "FILE")]
    pub(crate) output: String,
    /// Entries of the tokenizer: the special tokens, 256 bytes, and merges; fewer when the text gives
    /// no more
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(260..=1 << 24))]
    pub(crate) vocabulary: u32,
    /// Bytes of text that it is trained on, spread over all inputs
    #[arg(long, value_name = "N", default_value_t = 8 << 20, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) bytes: u64,
    /// Share of the documents that the datasets hold out for validation; none of these is seen
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    pub(crate) validation: f64,
    /// Threads that do the work; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
    /// Print what was made as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectTokenizer {
    /// A Hugging Face tokenizer.json, a file or a URL
    #[arg(value_name = "FILE")]
    pub(crate) tokenizer: String,
    /// The entry that stands after each document, when it has none of the usual names
    #[arg(long, value_name = "TOKEN")]
    pub(crate) end_of_text: Option<String>,
    /// Show the tokens of this text
    #[arg(long, conflicts_with = "file")]
    pub(crate) text: Option<String>,
    /// Show the tokens of the text in this file
    #[arg(long, value_name = "PATH")]
    pub(crate) file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
