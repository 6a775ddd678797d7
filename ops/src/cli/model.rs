//! What can be done with a trained model.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use looptrain_model::CacheSharing;
use looptrain_proto::spec::is_name;
use looptrain_storage::Split;

use super::{CheckpointUrl, FleetArgs, MAX_THREADS};
use crate::folder::Float;

/// Which model.
#[derive(Debug, Args)]
#[group(id = "which", required = true, multiple = false)]
pub(crate) struct WhichModel {
    /// A folder of the Hugging Face kind (config.json; model.safetensors, or several with an index), or
    /// the URL of a checkpoint
    #[arg(long, value_name = "DIR|URL", group = "which")]
    pub(crate) from: Option<ModelSource>,
    /// URL of a checkpoint: STORE/runs/NAME for the newest of a run, with
    /// /checkpoints/step-0000000600 behind it that one
    #[arg(long, value_name = "URL", group = "which")]
    pub(crate) checkpoint: Option<CheckpointUrl>,
    /// URL of the store of a run, whose newest checkpoint is taken
    #[arg(long, value_name = "URL", group = "which", requires = "run")]
    pub(crate) store: Option<String>,
}

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ModelSource {
    Folder(PathBuf),
    Checkpoint(CheckpointUrl),
}

impl FromStr for ModelSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            return text.parse().map(Self::Checkpoint);
        }
        Ok(Self::Folder(text.into()))
    }
}

/// Which model, and how it is run.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    which: WhichModel,
    /// Name of the run in the store
    #[arg(long, requires = "store")]
    run: Option<String>,
    /// Times the stack is applied; as often as in training by default, and more are allowed
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) loops: Option<u32>,
    /// Compute threads; all of the machine's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    pub(crate) threads: Option<u32>,
}

impl ModelArgs {
    /// Where the model is.
    pub(crate) fn source(&self) -> ModelSource {
        let WhichModel { from, checkpoint, store } = &self.which;
        let of_run = || {
            let (store, run) = (store.clone().unwrap_or_default(), self.run.clone());
            CheckpointUrl { store, run: run.unwrap_or_default(), step: None }
        };
        let checkpoint = || checkpoint.clone().unwrap_or_else(of_run);
        from.clone().unwrap_or_else(|| ModelSource::Checkpoint(checkpoint()))
    }
}

#[derive(Debug, Args)]
pub(crate) struct Generate {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to continue
    #[arg(long)]
    pub(crate) prompt: String,
    /// Take the prompt as a user's turn of a conversation in ChatML, and answer it
    #[arg(long)]
    pub(crate) chat: bool,
    /// What stands before the conversation
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 80)]
    pub(crate) tokens: usize,
    /// Softmax temperature; 0 takes the most likely token
    #[arg(long, default_value_t = 0.8, value_parser = not_negative)]
    pub(crate) temperature: f64,
    /// Draw from so many of the most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Draw from the fewest most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    pub(crate) top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// End at this token, beside those that end a text; by name, may be repeated
    #[arg(long = "stop", value_name = "TOKEN")]
    pub(crate) stops: Vec<String>,
    /// Take each token's logits after the first loop at which its exit distribution has summed up to
    /// this; after the last loop by default
    #[arg(long, value_name = "Q", value_parser = share)]
    pub(crate) exit: Option<f64>,
    /// Whose keys and values the loops read once the prompt is through: each its own, or all those of
    /// the last loop or their mean, in a fraction of the memory; then loops after a token's exit are
    /// not computed
    #[arg(long, value_enum, default_value = "full")]
    pub(crate) cache: SharingName,
    /// Tokens of context at most; the longest trained sequence by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) context: Option<u32>,
    /// Print one JSON object at the end instead of the text as it comes
    #[arg(long)]
    pub(crate) json: bool,
}

/// Whose keys and values loops read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SharingName {
    Full,
    Last,
    Averaged,
}

impl From<SharingName> for CacheSharing {
    fn from(name: SharingName) -> Self {
        match name {
            SharingName::Full => Self::Full,
            SharingName::Last => Self::Last,
            SharingName::Averaged => Self::Averaged,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Eval {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// URL of a dataset, STORE/datasets/NAME; by default those of the run's stage
    #[arg(long, value_name = "URL", conflicts_with_all = ["tokens", "targets"])]
    pub(crate) data: Option<DatasetUrl>,
    /// Which part of the dataset
    #[arg(long, value_enum, default_value = "validation")]
    pub(crate) split: SplitName,
    /// Sequences, spread evenly over the split
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sequences: u32,
    /// Tokens per sequence; those of the run's stage, or 4096 at most, by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sequence_length: Option<u32>,
    /// Ids of inputs instead of a dataset: a NumPy file of whole numbers, [sequences, length]
    #[arg(long, value_name = "FILE.npy", requires = "targets")]
    pub(crate) tokens: Option<PathBuf>,
    /// Ids of targets, in the same shape; negative ones, such as -100, do not count
    #[arg(long, value_name = "FILE.npy", requires = "tokens")]
    pub(crate) targets: Option<PathBuf>,
    /// Weight of the entropy in the Stage I loss, beta; that of the run's stage, or 0.05, by default
    #[arg(long, value_name = "BETA", value_parser = not_negative)]
    pub(crate) entropy_weight: Option<f64>,
    /// Also answer so many Mano exercises of each length that training has not seen
    #[arg(long, value_name = "EXERCISES", conflicts_with = "tokens", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) mano: Option<u32>,
    /// Draw loss by loop, and loss and accuracy by mean depth, into this file
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// A part of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SplitName {
    Train,
    Validation,
}

impl From<SplitName> for Split {
    fn from(name: SplitName) -> Self {
        match name {
            SplitName::Train => Self::Train,
            SplitName::Validation => Self::Validation,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// A folder of the Hugging Face kind, or the URL of a checkpoint
    #[arg(long, value_name = "DIR|URL")]
    pub(crate) from: ModelSource,
    /// Where the weights go: STORE/models/NAME, which must not be there yet
    #[arg(long, value_name = "URL")]
    pub(crate) to: ModelUrl,
}

#[derive(Debug, Args)]
pub(crate) struct Upcycle {
    #[command(flatten)]
    pub(crate) import: Import,
    /// Layers of the new model, a multiple of those of the old one
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub(crate) layers: u32,
    /// Whether the stack comes several times (1 2 1 2), or each layer does (1 1 2 2)
    #[arg(long, value_enum)]
    pub(crate) order: LayerOrder,
}

/// In which order layers are repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayerOrder {
    /// The whole stack, again and again: 1 2 1 2
    Block,
    /// Each layer, before the next one: 1 1 2 2
    Interleave,
}

/// Where a model is that runs may begin from: `STORE/models/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModelUrl {
    /// URL of the store.
    pub(crate) store: String,
    /// Its name there.
    pub(crate) name: String,
}

impl FromStr for ModelUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let parts = url.trim_end_matches('/').rsplit_once("/models/");
        let parts = parts.filter(|(store, name)| store.contains("://") && is_name(name));
        let (store, name) = parts.ok_or("write STORE/models/NAME")?;
        Ok(Self { store: store.to_owned(), name: name.to_owned() })
    }
}

/// Where a dataset is: `STORE/datasets/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DatasetUrl {
    /// URL of the store.
    pub(crate) store: String,
    /// Its name there.
    pub(crate) name: String,
}

impl FromStr for DatasetUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let parts = url.trim_end_matches('/').rsplit_once("/datasets/");
        let parts = parts.filter(|(store, name)| store.contains("://") && !name.contains('/'));
        let (store, name) = parts.ok_or("write STORE/datasets/NAME")?;
        Ok(Self { store: store.to_owned(), name: name.to_owned() })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Gate {
    /// URL of the checkpoint of the trained model
    #[arg(long, value_name = "URL")]
    pub(crate) from: CheckpointUrl,
    /// Name of the run; that of the model's with `-gate` behind it by default
    #[arg(long)]
    pub(crate) run: Option<String>,
    /// Optimizer updates, of batches as in the stage of the checkpoint
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) steps: u64,
    /// Highest learning rate; it warms up over a tenth of the steps and decays along a cosine to a tenth
    #[arg(long, default_value_t = 1e-2, value_parser = not_negative)]
    pub(crate) learning_rate: f64,
    /// Sequences of the evaluations before and after
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sequences: u32,
    /// Forget what the store holds of this run and begin anew
    #[arg(long)]
    pub(crate) fresh: bool,
    #[command(flatten)]
    pub(crate) fleet: FleetArgs,
    /// Draw both curves into this file
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Print both curves as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// URL of the checkpoint: STORE/runs/NAME for the newest of a run
    #[arg(long, value_name = "URL")]
    pub(crate) checkpoint: CheckpointUrl,
    /// The folder, which must not be there yet
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// How the numbers are stored
    #[arg(long, value_enum, default_value = "bf16")]
    pub(crate) dtype: Float,
}

fn not_negative(text: &str) -> Result<f64, String> {
    let given = text.parse().ok().filter(|given: &f64| given.is_finite() && *given >= 0.0);
    given.ok_or_else(|| "it must be a number, 0 or more".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let given = text.parse().ok().filter(|given: &f64| (0.0..=1.0).contains(given));
    given.ok_or_else(|| "it must be a number from 0 to 1".to_owned())
}

fn probability(text: &str) -> Result<f64, String> {
    let given = share(text).ok().filter(|given| *given > 0.0);
    given.ok_or_else(|| "it must be a number above 0, and 1 at most".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_their_bounds() {
        assert_eq!(not_negative("0"), Ok(0.0));
        assert_eq!(not_negative("1.5"), Ok(1.5));
        for wrong in ["-1", "nan", "inf", "warm", ""] {
            assert!(not_negative(wrong).is_err(), "{wrong}");
        }
        assert_eq!((share("0"), share("1")), (Ok(0.0), Ok(1.0)));
        assert!(share("1.1").is_err() && share("nan").is_err() && probability("0").is_err());
    }

    #[test]
    fn a_model_is_a_folder_or_has_a_url() {
        let source = |text: &str| text.parse::<ModelSource>();
        assert_eq!(source("a/runs/b"), Ok(ModelSource::Folder("a/runs/b".into())));
        let url = CheckpointUrl { store: "s3://lab".into(), run: "b".into(), step: None };
        assert_eq!(source("s3://lab/runs/b"), Ok(ModelSource::Checkpoint(url)));
        assert!(source("s3://lab/b").is_err());
        let to = ModelUrl { store: "file://x".into(), name: "m".into() };
        assert_eq!("file://x/models/m".parse(), Ok(to));
        assert!("file://x/models/a/b".parse::<ModelUrl>().is_err());
    }

    #[test]
    fn a_dataset_is_named_by_its_url() {
        let url = |text: &str| text.parse::<DatasetUrl>();
        let meant = DatasetUrl { store: "s3://lab/x".into(), name: "web".into() };
        assert_eq!(url("s3://lab/x/datasets/web/"), Ok(meant));
        for wrong in ["web", "datasets/web", "s3://lab/web", "s3://lab/datasets/a/b"] {
            assert!(url(wrong).is_err_and(|said| said.contains("/datasets/NAME")), "{wrong}");
        }
    }
}
