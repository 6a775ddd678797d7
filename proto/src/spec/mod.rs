//! The run spec: one TOML file that says everything about a run.
//!
//! [`Spec::load`] is the way in: it parses, applies `--set key=value` overrides and validates, so
//! that whoever holds a `Spec` holds a consistent one; options such as `--workers` are overrides,
//! too. Afterwards only `evaluation.sequences` is changed, which is lowered to what the validation
//! text holds. Unknown keys are errors. What decides the weights (model, initial weights, data, stages,
//! optimizer, seed, reduction) enters [`Spec::trajectory_digest`]; the rest (workers, streams, memory,
//! intervals, places) may change between two starts of the same run.

mod cost;
mod load;
#[cfg(test)]
mod reference;
mod schedule;
#[cfg(test)]
mod tests;
mod validate;

#[cfg(test)]
use schemars::JsonSchema;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::json;

pub use cost::operations_per_token;
pub use load::SpecError;
pub use schedule::StagePosition;
pub use validate::is_name;

use crate::Digest;

/// One training job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Name, store and seed.
    pub run: Run,
    /// Who trains, and how gradients are summed.
    #[serde(default)]
    pub cluster: Cluster,
    /// How workers use their memory.
    #[serde(default)]
    pub compute: Compute,
    /// Shape of the LoopLM.
    pub model: Model,
    /// The weights that the first step begins from; random ones without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial: Option<Initial>,
    /// The checkpoint of another run that this one goes on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<Branch>,
    /// AdamW and gradient clipping.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Datasets that stages draw from.
    #[cfg_attr(test, schemars(length(min = 1)))]
    pub datasets: Vec<Dataset>,
    /// Parts of the run, in order.
    #[cfg_attr(test, schemars(length(min = 1)))]
    pub stages: Vec<Stage>,
    /// When state is saved.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// When the validation loss is computed.
    #[serde(default)]
    pub evaluation: Evaluation,
    /// The text generated at the end of `looptrain train`.
    #[serde(default)]
    pub sample: Sample,
    /// What is told of the run, beside what the `OTEL_*` variables say.
    #[serde(default)]
    pub telemetry: Telemetry,
}

/// Identity of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Name of the run, which lies below `runs/NAME` in its store: letters, digits, `.`, `_` and `-`,
    /// not `.` at first.
    #[cfg_attr(test, schemars(regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")))]
    pub name: String,
    /// URL of the object store: `file://PATH` (relative paths count from the working directory
    /// of who loads the spec), `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `az://CONTAINER/PREFIX`.
    /// Endpoint and credentials come from the provider's environment variables, on each machine.
    #[cfg_attr(test, schemars(regex(pattern = "://")))]
    pub store: String,
    /// Seed of the initial weights and of the data order.
    #[serde(default)]
    pub seed: u64,
    /// Every worker writes to the store which sequences it has used for a step before it votes for
    /// it, and the run waits for a store that does not take that; `looptrain audit` reads it.
    #[serde(default)]
    pub audit: bool,
}

/// How the gradients of the ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Reduction {
    /// 64-bit fixed point: the same bits for any number of workers and any topology.
    Exact,
    /// Single precision, in half the bytes: the weights then depend on the number of workers and their
    /// ranks, on who computes which slots and on how many threads, and on when a worker dies. All
    /// workers still hold the same bits, and compare them. Losses and the exit distribution stay exact.
    Fast,
    /// As `fast`, in a quarter of the bytes of exact sums: each worker adds up its slots in single precision
    /// and rounds the sums to bf16, and in bf16 they are added up over workers, rounded after each
    /// addition. What is lost grows with the workers: where all push the same way, a sum of 256 of them grows
    /// no more.
    FastBf16,
}

/// What carries the gradients from rank to rank. It changes no bit of what an exact reduction gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Collective {
    /// NCCL when all members of a generation can, with the same version of it, and TCP otherwise.
    Auto,
    /// A ring of TCP connections, through the memory of the hosts.
    Tcp,
    /// NCCL, from device to device; a worker that cannot is refused.
    Nccl,
}

/// Membership and its time-outs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// Workers to wait for before the first step; `looptrain train` starts this many processes. A run
    /// that has begun goes on with any number, after a wait for those that are missing.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_WORKERS)))]
    pub workers: u32,
    /// Workers that train at a time; others wait as warm spares, which follow the run and take the
    /// place of a lost one at once. 0 for no limit, otherwise not below `workers`.
    #[cfg_attr(test, schemars(range(max = validate::MAX_WORKERS)))]
    pub max_workers: u32,
    /// A worker silent for this many seconds is taken for dead; it speaks four times in that time.
    #[cfg_attr(test, schemars(range(min = 0.1, max = validate::MAX_TIMEOUT)))]
    pub worker_timeout: f64,
    /// A worker is reported as a straggler when a section of its steps (data, compute, reduce,
    /// commit) takes this many times what it takes the others.
    #[cfg_attr(test, schemars(extend("exclusiveMinimum" = 1.0)))]
    pub straggler_factor: f64,
    /// A worker that computes less than this share of what the others do is told to leave;
    /// 0 for none.
    #[cfg_attr(test, schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0)))]
    pub drain_below: f64,
    /// How gradients are summed over ranks.
    pub reduction: Reduction,
    /// Fraction bits of the fixed-point gradient: a slot's gradient is rounded to multiples of
    /// 2^-fraction_bits. A fast reduction has no use for them.
    #[cfg_attr(test, schemars(range(min = 16, max = 52)))]
    pub fraction_bits: u32,
    /// What carries the gradients.
    pub collective: Collective,
    /// TCP connections from each rank to the next, which share out the gradient and change no bit of
    /// it. While one waits the other sends; more help where two do not fill the network, as on long
    /// or busy ways.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_STREAMS)))]
    pub streams: u32,
    /// What the device of one worker could do at most, in TFLOP/s, for model FLOPs utilization in the step
    /// log (989 for dense bf16 on an H100); 0 when it is not known.
    #[cfg_attr(test, schemars(range(min = 0.0)))]
    pub peak_tflops: f64,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            workers: 2,
            max_workers: 0,
            worker_timeout: 3.0,
            straggler_factor: 2.0,
            drain_below: 0.0,
            reduction: Reduction::Exact,
            fraction_bits: 40,
            collective: Collective::Auto,
            streams: 2,
            peak_tflops: 0.0,
        }
    }
}

/// How workers use their memory; nothing here changes a bit of what they compute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Compute {
    /// What the backward pass computes again instead of keeping it.
    pub recompute: Recompute,
    /// Memory that a worker may use, in GiB; 0 for what its machine has to give.
    #[cfg_attr(test, schemars(range(min = 0.0, max = validate::MAX_MEMORY_GIB)))]
    pub memory_gib: f64,
}

impl Default for Compute {
    fn default() -> Self {
        Self { recompute: Recompute::Auto, memory_gib: 0.0 }
    }
}

/// What the backward pass computes again, which takes time, instead of keeping it, which takes memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// As little as the worker's memory allows.
    Auto,
    /// Nothing: the activations of all layers in all loops are kept.
    None,
    /// A loop at a time: the states between loops are kept, and the activations of one loop.
    Loop,
    /// A layer at a time, after its loop has been computed again for the inputs of its layers: the
    /// states between loops are kept, those inputs, and the activations of one layer.
    Layer,
}

/// Shape of the LoopLM; names follow the published Ouro configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Width of the residual stream, d.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_DIMENSION)))]
    pub hidden_size: usize,
    /// Layers of the shared stack, L; each loop applies all of them.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_LAYERS)))]
    pub num_hidden_layers: usize,
    /// Attention heads; the head dimension is `hidden_size / num_attention_heads`, a whole and even
    /// number.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_DIMENSION)))]
    pub num_attention_heads: usize,
    /// Inner width of the SwiGLU.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_DIMENSION)))]
    pub intermediate_size: usize,
    /// Rows of the embedding and of the head, which are not tied; at least the vocabulary of each
    /// dataset's tokenizer.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_DIMENSION)))]
    pub vocab_size: usize,
    /// Added to the mean square in RMSNorm.
    #[serde(default = "default_rms_norm_eps")]
    #[cfg_attr(test, schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0)))]
    pub rms_norm_eps: f64,
    /// Standard deviation of the normal distribution that initial matrices are drawn from.
    #[serde(default = "default_initializer_range")]
    #[cfg_attr(test, schemars(extend("exclusiveMinimum" = 0.0)))]
    pub initializer_range: f64,
}

/// Weights to begin from, as `looptrain import` and `looptrain upcycle` leave them in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Initial {
    /// Its name below `models/` in the store.
    #[cfg_attr(test, schemars(regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")))]
    pub model: String,
    /// Digest of the weights, which the two commands print.
    #[cfg_attr(test, schemars(with = "String", regex(pattern = "^blake3:[0-9a-fA-F]{64}$")))]
    pub weights: Digest,
}

/// A step of another run in the same store, from whose weights and moments this run goes on with the step
/// after it, by its own spec: the stages count from step 1, and those up to the branch are what they would have
/// been. The checkpoint is copied when the run begins, and may go afterwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Branch {
    /// The other run.
    #[cfg_attr(test, schemars(regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")))]
    pub run: String,
    /// A step that it has a checkpoint of, below the last step of this run.
    #[cfg_attr(test, schemars(range(min = 1)))]
    pub step: u64,
    /// Digest of the weights after that step, as `looptrain checkpoint list` shows it.
    #[cfg_attr(test, schemars(with = "String", regex(pattern = "^blake3:[0-9a-fA-F]{64}$")))]
    pub weights: Digest,
    /// Sequences of the step's stage that the other run had read by then, where by this spec they would be
    /// others: it passed over some itself, or had another batch. `looptrain branch` writes it where it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(max = validate::MAX_COUNT)))]
    pub sequences: Option<u64>,
    /// Steps whose data is passed over: the first step after the branch reads what the step so many later
    /// would have read, and the others of that stage follow.
    #[serde(default)]
    #[cfg_attr(test, schemars(range(max = validate::MAX_COUNT)))]
    pub skip_steps: u64,
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

fn default_initializer_range() -> f64 {
    0.02
}

impl Model {
    /// Width of one attention head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Number of parameters: untied embedding and head, per layer four attention and three MLP
    /// matrices and four norms, the final norm, and the exit gate with its bias.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let (d, f) = (self.hidden_size as u64, self.intermediate_size as u64);
        let layer = 4 * d * d + 3 * d * f + 4 * d;
        2 * self.vocab_size as u64 * d + self.num_hidden_layers as u64 * layer + d + d + 1
    }
}

/// AdamW; weight decay applies to the matrices of layers and head alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Decay of the first moment.
    #[cfg_attr(test, schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0)))]
    pub beta1: f64,
    /// Decay of the second moment.
    #[cfg_attr(test, schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0)))]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[cfg_attr(test, schemars(extend("exclusiveMinimum" = 0.0)))]
    pub epsilon: f64,
    /// Decoupled weight decay per unit of learning rate.
    #[cfg_attr(test, schemars(range(min = 0.0)))]
    pub weight_decay: f64,
    /// Upper bound of the gradient's global Euclidean norm.
    #[cfg_attr(test, schemars(extend("exclusiveMinimum" = 0.0)))]
    pub clip_norm: f64,
    /// What happens to a step with a loss or gradient that is not finite or leaves the fixed-point
    /// range.
    pub non_finite: NonFinite,
    /// What happens to a step whose loss or gradient norm is far above that of the steps before; without it
    /// nobody looks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spikes: Option<Spikes>,
}

/// A guard against steps whose loss or gradient norm is a number, but far above those before in its stage:
/// more than `deviations` standard deviations above the running mean. What is above counts as no more than
/// that in mean and deviation, so that one spike does not hide the next, and a level that has changed is
/// followed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Spikes {
    /// What happens to such a step.
    pub action: OnSpike,
    /// Standard deviations above the mean from which on a step is one; each counts as at least a thousandth
    /// of the mean.
    #[cfg_attr(test, schemars(extend("exclusiveMinimum" = 0.0)))]
    pub deviations: f64,
    /// Steps that mean and deviation reach back, with weights that fade. Half as many of the stage have to be
    /// there before any step is judged.
    #[cfg_attr(test, schemars(range(min = 2, max = validate::MAX_WINDOW)))]
    pub window: u64,
}

/// What happens to a step that is a spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum OnSpike {
    /// The step is committed without an update: its data is consumed, weights and moments stay; the
    /// step log says so. Ten steps in a row without an update end the run.
    Skip,
    /// The run ends before the step, with a checkpoint and a message that names the slots at fault. Under the
    /// same spec it would end there again: a branch goes on in another way.
    Stop,
}

impl Default for Spikes {
    fn default() -> Self {
        Self { action: OnSpike::Skip, deviations: 6.0, window: 128 }
    }
}

/// What happens to a step whose loss or gradient is no usable number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// The run ends with a message that names slot, sequences and tensor or loop.
    Stop,
    /// The step is committed without an update: its data is consumed, weights and moments stay; the
    /// step log says so. Ten such steps in a row end the run.
    Skip,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            non_finite: NonFinite::Stop,
            spikes: None,
        }
    }
}

/// A dataset in the store, and how to make it when it is not there yet. Each has a name of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Dataset {
    /// Its name below `datasets/` in the store, of the same characters as that of a run.
    #[cfg_attr(test, schemars(regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")))]
    pub name: String,
    /// Where the text comes from when the dataset has to be made; without it the dataset must be
    /// in the store.
    #[serde(default)]
    pub source: Option<Source>,
}

/// Text for a new dataset, and its tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Source {
    /// Files, directories and prefixes of object stores (`s3://BUCKET/PREFIX`); `cargo-registry`
    /// stands for the sources of the crates in the local cargo home.
    #[cfg_attr(test, schemars(length(min = 1)))]
    pub paths: Vec<String>,
    /// How documents lie in the files.
    pub format: Format,
    /// File name extensions of plain text, to take from directories.
    pub extensions: Vec<String>,
    /// The field of a JSON line, or the column of a Parquet file, that holds the text.
    #[cfg_attr(test, schemars(length(min = 1)))]
    pub field: String,
    /// A sample stops collecting after this many bytes of text; other formats take everything and
    /// have no use for it.
    #[cfg_attr(test, schemars(range(min = 1)))]
    pub max_bytes: u64,
    /// A Hugging Face `tokenizer.json`, a file or a URL; without it one is trained on the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// The entry of that tokenizer that stands after each document; without it the first one of the
    /// usual names. A tokenizer that is trained has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_of_text: Option<String>,
    /// Entries of the byte-level BPE tokenizer that is trained on the text; at most
    /// `model.vocab_size`.
    #[cfg_attr(test, schemars(range(min = 260)))]
    pub tokenizer_vocabulary: usize,
    /// Bytes of text the tokenizer is trained on, spread over all of it.
    #[cfg_attr(test, schemars(range(min = 1)))]
    pub tokenizer_bytes: u64,
    /// Share of the records that may be malformed; past it the dataset is not made.
    #[cfg_attr(test, schemars(range(min = 0.0, max = 1.0)))]
    pub max_malformed: f64,
    /// Share of the documents held out for validation, which the hash of their text decides.
    #[cfg_attr(test, schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1.0)))]
    pub validation_fraction: f64,
    /// Tokens per shard.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_SHARD_TOKENS)))]
    pub shard_tokens: u64,
}

impl Default for Source {
    fn default() -> Self {
        Self {
            paths: vec!["cargo-registry".into()],
            format: Format::Sample,
            extensions: vec!["rs".into(), "md".into(), "txt".into()],
            field: "text".into(),
            max_bytes: 64 << 20,
            tokenizer: None,
            end_of_text: None,
            tokenizer_vocabulary: 4096,
            tokenizer_bytes: 8 << 20,
            max_malformed: 0.01,
            validation_fraction: 0.01,
            shard_tokens: 1 << 22,
        }
    }
}

/// How documents lie in files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Plain text of which an even sample is taken, each text once, in the order of a hash.
    #[default]
    Sample,
    /// Everything in its order, each file as its name says: `.jsonl`, `.parquet`, or plain text.
    Auto,
    /// Plain text: a file is a document, long ones are cut.
    Text,
    /// JSON Lines: a line is a document.
    Jsonl,
    /// Parquet: a row is a document.
    Parquet,
}

/// A part of a run with its own data, shape of a step, loss and learning rate; the next one goes on
/// with its weights and moments. A step has `slots` x `slot_sequences` sequences, whatever the number
/// of workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[cfg_attr(
    test,
    schemars(extend("oneOf" = [{ "required": ["steps"] }, { "required": ["tokens"] }]))
)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// For logs and the status page.
    pub name: String,
    /// Optimizer updates in this stage. One of `steps` and `tokens` says how long it is.
    #[serde(default)]
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_COUNT), transform = reference::no_default))]
    pub steps: u64,
    /// Tokens to consume, in as few updates as that takes: loading a spec turns them into `steps`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tokens: u64,
    /// Tokens per sequence, targets not counted.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_COUNT)))]
    pub sequence_length: usize,
    /// Slots per step: fixed micro-batches, shared out over the workers. There is no work for more
    /// workers than slots.
    #[cfg_attr(test, schemars(range(min = 1, max = crate::MAX_SLOTS)))]
    pub slots: u32,
    /// The first updates have fewer slots; without it all have as many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramp: Option<Ramp>,
    /// Sequences per slot, which a worker computes at once: what it needs of memory grows with them.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_COUNT)))]
    pub slot_sequences: usize,
    /// Times the stack is applied, R. An exit gate to train needs two or more.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_LOOPS)))]
    pub loops: usize,
    /// Weight of the exit distribution's entropy in the loss, beta.
    #[cfg_attr(test, schemars(range(min = 0.0)))]
    pub entropy_weight: f64,
    /// What is trained, and by which loss.
    #[serde(default, skip_serializing_if = "Objective::is_language")]
    #[cfg_attr(test, schemars(extend("default" = "language")))]
    pub objective: Objective,
    /// Base of the rotary position embedding, theta.
    #[serde(default = "default_rope_base")]
    #[cfg_attr(test, schemars(extend("exclusiveMinimum" = 1.0)))]
    pub rope_base: f64,
    /// The learning rate over the stage.
    pub learning_rate: LearningRate,
    /// Datasets and their shares; an empty list takes the only dataset of the spec. The weights add up
    /// to 2^20 at most.
    #[serde(default)]
    pub mixture: Vec<MixturePart>,
    /// Whether tokens see nothing of other documents in their sequence.
    #[serde(default, skip_serializing_if = "is_false")]
    #[cfg_attr(test, schemars(extend("default" = false)))]
    pub document_masking: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(value: &bool) -> bool {
    !value
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

fn default_rope_base() -> f64 {
    10_000.0
}

/// What a stage trains, and by which loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Everything, by the Stage I loss: cross-entropies weighted by the exit distribution, less its
    /// entropy.
    #[default]
    Language,
    /// The exit gate alone, by the Stage II loss: whether another loop still helps. All else stays as
    /// it is.
    ExitGate,
}

impl Objective {
    fn is_language(&self) -> bool {
        *self == Self::Language
    }
}

/// A batch that grows: the number of slots rises evenly from `slots` to that of the stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    /// Slots of the stage's first update, at most those of the stage.
    #[cfg_attr(test, schemars(range(min = 1, max = crate::MAX_SLOTS)))]
    pub slots: u32,
    /// The update after so many of them is the first with all slots.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_RAMP)))]
    pub steps: u64,
}

/// How the learning rate goes down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// In a straight line.
    #[default]
    Linear,
    /// In half a period of the cosine.
    Cosine,
}

impl Decay {
    fn is_linear(&self) -> bool {
        *self == Self::Linear
    }
}

/// Warm-up, then constant, then decay: with all three, the schedule that is known as WSD. Warm-up and
/// decay together have at most the steps of the stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LearningRate {
    /// The constant value between warm-up and decay.
    #[cfg_attr(test, schemars(range(min = 0.0)))]
    pub peak: f64,
    /// Steps from (almost) zero to the peak.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Steps at the end of the stage that lead from the peak to `last`.
    #[serde(default)]
    pub decay_steps: u64,
    /// The value of the stage's last step when it decays.
    #[serde(default)]
    #[cfg_attr(test, schemars(range(min = 0.0)))]
    pub last: f64,
    /// How it decays.
    #[serde(default, skip_serializing_if = "Decay::is_linear")]
    #[cfg_attr(test, schemars(extend("default" = "linear")))]
    pub decay: Decay,
}

/// One dataset's share of a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MixturePart {
    /// Name of a dataset of the spec.
    pub dataset: String,
    /// Share of the sequences, relative to the weights of the other parts.
    #[cfg_attr(test, schemars(range(min = 1, max = validate::MAX_WEIGHTS)))]
    pub weight: u32,
}

/// When state is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// A checkpoint after every this many steps, and always after the last.
    #[cfg_attr(test, schemars(range(min = 1)))]
    pub every_steps: u64,
    /// A checkpoint also when the last one was begun so many seconds ago, whatever became of the run's
    /// speed; 0 for never.
    pub every_seconds: u64,
    /// Checkpoints to keep: the newest so many.
    #[cfg_attr(test, schemars(range(min = 1)))]
    pub keep: usize,
    /// Checkpoints of steps that are multiples of this are kept as well; 0 for none.
    pub keep_every_steps: u64,
    /// Files of saves that came to nothing are removed when they are so many seconds old.
    pub orphan_seconds: u64,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            every_steps: 100,
            every_seconds: 0,
            keep: 3,
            keep_every_steps: 0,
            orphan_seconds: 3600,
        }
    }
}

/// When the validation loss is computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Evaluation {
    /// An evaluation after every this many steps, and always after the last; 0 for the last alone.
    pub every_steps: u64,
    /// Validation sequences per evaluation, spread evenly over the validation split.
    #[cfg_attr(test, schemars(range(min = 1)))]
    pub sequences: u64,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self { every_steps: 0, sequences: 64 }
    }
}

/// The text generated at the end of `looptrain train`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Sample {
    /// The text to continue.
    pub prompt: String,
    /// Tokens to generate; 0 for no sample.
    pub tokens: usize,
    /// Softmax temperature; 0 takes the most likely token.
    #[cfg_attr(test, schemars(range(min = 0.0)))]
    pub temperature: f64,
}

impl Default for Sample {
    fn default() -> Self {
        Self { prompt: "pub fn ".into(), tokens: 80, temperature: 0.8 }
    }
}

/// What is told of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// Steps whose number is a multiple of this get a trace; 0 for none. Recoveries, checkpoints and
    /// evaluations always do.
    pub trace_every_steps: u64,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self { trace_every_steps: 10 }
    }
}

impl Spec {
    /// The spec as TOML, as it travels to workers.
    ///
    /// # Panics
    /// Never: every field has a TOML form.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("all fields of a spec have a TOML form")
    }

    /// Digest of all that decides the weights: two specs with the same digest train the same model.
    #[must_use]
    pub fn trajectory_digest(&self) -> Digest {
        let decides = (
            self.run.seed,
            &self.model,
            &self.optimizer,
            &self.datasets.iter().map(|dataset| &dataset.name).collect::<Vec<_>>(),
            &self.stages,
            (self.cluster.reduction, self.cluster.fraction_bits),
        );
        let mut text =
            serde_json::to_string(&decides).expect("all fields of a spec have a JSON form");
        if let Some(initial) = &self.initial {
            text.push_str(&initial.weights.to_string());
        }
        if let Some(Branch { step, weights, sequences, skip_steps, .. }) = &self.branch {
            text.push_str(&format!("{step} {weights} {sequences:?} {skip_steps}"));
        }
        Digest::of(text.as_bytes())
    }

    /// What decides the weights and is not the same in `now`, each as `key was this and is that`.
    ///
    /// # Panics
    /// Never: every field has a JSON form.
    #[must_use]
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let (before, after) = (self.deciding(), now.deciding());
        let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        let differing = keys.into_iter().filter(|key| before.get(*key) != after.get(*key));
        let shown = |value: Option<&serde_json::Value>| {
            value.map_or_else(|| "not there".to_owned(), ToString::to_string)
        };
        let told = differing.map(|key| {
            format!("{key} was {} and is {}", shown(before.get(key)), shown(after.get(key)))
        });
        told.collect()
    }

    /// The values that decide the weights, by their dotted keys.
    fn deciding(&self) -> BTreeMap<String, serde_json::Value> {
        fn flatten(
            key: String,
            value: serde_json::Value,
            flat: &mut BTreeMap<String, serde_json::Value>,
        ) {
            use serde_json::Value;
            let below = |name: &str| match key.is_empty() {
                true => name.to_owned(),
                false => format!("{key}.{name}"),
            };
            match value {
                Value::Object(table) => {
                    for (name, value) in table {
                        flatten(below(&name), value, flat);
                    }
                }
                Value::Array(items) => {
                    for (index, value) in items.into_iter().enumerate() {
                        flatten(below(&index.to_string()), value, flat);
                    }
                }
                Value::Null => {}
                value => drop(flat.insert(key, value)),
            }
        }
        let names: Vec<_> = self.datasets.iter().map(|it| json!({ "name": it.name })).collect();
        let branch = self.branch.as_ref();
        let all = json!({
            "run": { "seed": self.run.seed },
            "model": self.model,
            "initial": self.initial.as_ref().map(|initial| json!({ "weights": initial.weights })),
            "branch": branch.map(|Branch { step, weights, sequences, skip_steps, .. }| {
                json!({
                    "step": step,
                    "weights": weights,
                    "sequences": sequences,
                    "skip_steps": skip_steps,
                })
            }),
            "optimizer": self.optimizer,
            "datasets": names,
            "stages": self.stages,
            "cluster": {
                "reduction": self.cluster.reduction,
                "fraction_bits": self.cluster.fraction_bits,
            },
        });
        let mut flat = BTreeMap::new();
        flatten(String::new(), all, &mut flat);
        flat
    }

    /// The mixture of a stage with the default filled in: (index into `datasets`, weight).
    #[must_use]
    pub fn mixture(&self, stage: usize) -> Vec<(usize, u32)> {
        let parts = &self.stages[stage].mixture;
        if parts.is_empty() {
            return vec![(0, 1)];
        }
        let index = |name: &str| self.datasets.iter().position(|dataset| dataset.name == name);
        parts.iter().filter_map(|part| Some((index(&part.dataset)?, part.weight))).collect()
    }
}
