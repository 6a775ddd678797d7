//! What a run publishes: one record a committed step, one an evaluation, events for whoever
//! watches, and the outcome. Plain data, shared by the core (which makes it), the journal (which
//! stores it), the dashboard and the command line.

use std::fmt;

use looptrain_proto::{Cursor, Digest, Generation, Step, WorkerId, v1};
use serde::{Deserialize, Serialize};

/// Where the time of a step went, in seconds; each section is that of its slowest rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SectionSeconds {
    /// Waiting for tokens.
    pub data_wait: f64,
    /// Forward and backward of the slots.
    pub compute: f64,
    /// The all-reduce.
    pub reduce: f64,
    /// Applying the previous commit: clip and optimizer update.
    pub optimizer: f64,
    /// The part of `reduce` in which the connection to the next rank took no more.
    #[serde(default)]
    pub send: f64,
}

/// A part of a worker's step in which it can be slower than the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Section {
    /// Waiting for tokens.
    Data,
    /// Forward and backward of a slot.
    Compute,
    /// Its connection to the next rank in the all-reduce.
    Reduce,
    /// Applying a commit.
    Commit,
}

impl Section {
    /// In the order of a step.
    pub(crate) const ALL: [Self; 4] = [Self::Data, Self::Compute, Self::Reduce, Self::Commit];
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Compute => "compute",
            Self::Reduce => "reduce",
            Self::Commit => "commit",
        })
    }
}

impl SectionSeconds {
    /// The larger of each section.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            data_wait: self.data_wait.max(other.data_wait),
            compute: self.compute.max(other.compute),
            reduce: self.reduce.max(other.reduce),
            optimizer: self.optimizer.max(other.optimizer),
            send: self.send.max(other.send),
        }
    }
}

impl From<v1::Sections> for SectionSeconds {
    fn from(sections: v1::Sections) -> Self {
        let v1::Sections { data_wait, compute, reduce, optimizer, send } = sections;
        Self { data_wait, compute, reduce, optimizer, send }
    }
}

impl From<SectionSeconds> for v1::Sections {
    fn from(sections: SectionSeconds) -> Self {
        let SectionSeconds { data_wait, compute, reduce, optimizer, send } = sections;
        Self { data_wait, compute, reduce, optimizer, send }
    }
}

/// One committed step: a JSON line of the run's metrics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step.
    pub step: Step,
    /// The generation that committed it.
    pub generation: Generation,
    /// Workers in that generation.
    pub world: u32,
    /// Stage I loss, nats per token. As all means here: over the slots that have usable gradients.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
    /// Cross-entropy after each loop, nats per token.
    pub loss_per_loop: Vec<f64>,
    /// Mean exit probability of each loop.
    pub exit_pdf: Vec<f64>,
    /// Mean loop of exit, from 1.
    pub mean_depth: f64,
    /// Mean entropy of the exit distribution, nats.
    #[serde(deserialize_with = "number_or_null")]
    pub entropy: f64,
    /// Euclidean norm of the gradient before clipping; 0 when the step was skipped.
    pub grad_norm: f64,
    /// Root mean square of a token's residual stream at the end of each loop, before its norm: the mean
    /// over tokens. Logs of before there was this have none, as of the next two.
    #[serde(default)]
    pub hidden_rms_per_loop: Vec<f64>,
    /// Root mean square over tokens of the norm of the gradient of their summed losses by a token's
    /// state after each loop.
    #[serde(default)]
    pub gradient_norm_per_loop: Vec<f64>,
    /// Share of the tokens whose likeliest successor after each loop is that after the last.
    #[serde(default)]
    pub agreement_per_loop: Vec<f64>,
    /// How far the mean of each loop's cross-entropy over its last steps is above its lowest of the
    /// stage, nats per token, as far as this coordinator has seen it; empty before it can be said.
    #[serde(default)]
    pub loss_rise_per_loop: Vec<f64>,
    /// Learning rate of this step.
    pub lr: f64,
    /// Tokens of the run up to and including this step.
    pub tokens: u64,
    /// Tokens of this step alone.
    pub step_tokens: u64,
    /// Data position after this step.
    pub cursor: Cursor,
    /// From the plan to the commit decision.
    pub seconds: f64,
    /// Floating-point operations of the step as the model needs them, all loops counted.
    #[serde(default)]
    pub flops: f64,
    /// Their share of what the workers' devices could have done meanwhile, where the spec says what that
    /// is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Digest of the reduced gradient, loss and statistics.
    pub digest: Digest,
    /// Slots without a usable gradient; with any, the step changed no weight.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bad_slots: u32,
    /// Why the step changed no weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Where loss and gradient norm have been, with this step, under a spec with a guard against spikes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trend: Option<v1::Trend>,
    /// Sections of the slowest ranks.
    pub sections: SectionSeconds,
}

/// JSON has no NaN, which is the mean over no slots; it is written as null.
fn number_or_null<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// One evaluation on the validation split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// The committed step whose weights were evaluated.
    pub step: Step,
    /// Validation sequences.
    pub sequences: u64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Stage I loss, nats per token.
    pub loss: f64,
    /// Cross-entropy after each loop, nats per token.
    pub loss_per_loop: Vec<f64>,
    /// Mean exit probability of each loop.
    pub exit_pdf: Vec<f64>,
    /// Mean loop of exit, from 1.
    pub mean_depth: f64,
    /// Mean entropy of the exit distribution, nats.
    pub entropy: f64,
    /// exp of the last loop's cross-entropy.
    pub perplexity: f64,
    /// Duration of the evaluation.
    pub seconds: f64,
}

#[cfg(test)]
impl EvaluationRecord {
    /// Like any other.
    pub(crate) fn example(step: u64) -> Self {
        Self {
            step: Step(step),
            sequences: 1,
            tokens: 10,
            loss: 2.0,
            loss_per_loop: vec![2.0],
            exit_pdf: vec![1.0],
            mean_depth: 1.0,
            entropy: 0.0,
            perplexity: 7.4,
            seconds: 0.1,
        }
    }
}

/// Mean loop of exit, counted from 1, of an exit distribution.
pub(crate) fn mean_depth(exit_pdf: &[f64]) -> f64 {
    exit_pdf.iter().enumerate().map(|(at, share)| (at + 1) as f64 * share).sum()
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The last committed step.
    pub step: Step,
    /// Tokens of all committed steps.
    pub tokens: u64,
    /// Training loss of that step; `None` when the run was stopped before any step.
    pub loss: Option<f64>,
    /// Digest of the final weights; `None` when the run was stopped before anyone held weights.
    pub weights_digest: Option<Digest>,
    /// Stopped on request before the last step.
    pub stopped: bool,
    /// The evaluation of `step`, when there was one; the last step always has one.
    pub evaluation: Option<EvaluationRecord>,
}

/// How a worker came to be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LossCause {
    /// Its connection broke: its process, its machine or the network between died.
    Died,
    /// Nothing was heard of it for too long.
    Silent,
    /// It left, told to or by itself.
    Left,
    /// It was sent away for a fault of its own.
    Expelled,
}

impl LossCause {
    pub(crate) const ALL: [Self; 4] = [Self::Died, Self::Silent, Self::Left, Self::Expelled];
}

impl fmt::Display for LossCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Died => "died",
            Self::Silent => "silent",
            Self::Left => "left",
            Self::Expelled => "expelled",
        })
    }
}

/// What happens in a run, for progress display, logs and the dashboard.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RunEvent {
    /// A worker has been welcomed.
    WorkerJoined {
        /// Its session.
        worker: WorkerId,
        /// Its name.
        name: String,
        /// Where it runs.
        host: String,
        /// Whether it has to wait for a place because a generation is at work.
        spare: bool,
    },
    /// A worker has been turned away.
    WorkerRefused {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A worker has died, left or been dropped.
    WorkerLost {
        /// Its session.
        worker: WorkerId,
        /// Its name.
        name: String,
        /// In a word.
        cause: LossCause,
        /// Why.
        reason: String,
    },
    /// There are too few workers to begin or to go on with; said when their number changes, and
    /// again while the wait lasts.
    Waiting {
        /// Workers that are here.
        here: u32,
        /// Workers of the spec.
        wanted: u32,
    },
    /// All members of a new generation hold the same state.
    Formed {
        /// The generation.
        generation: Generation,
        /// Its members.
        world: u32,
        /// The committed step they hold.
        step: Step,
        /// Why it was formed.
        reason: String,
    },
    /// A step has been committed.
    Committed(Box<StepRecord>),
    /// An evaluation is complete.
    Evaluated(EvaluationRecord),
    /// A checkpoint exists: its manifest is in the store.
    CheckpointSaved {
        /// Its step.
        step: Step,
        /// From the directive to the manifest.
        seconds: f64,
        /// Size of all parts.
        bytes: u64,
        /// The longest that a member stood still to copy its state.
        stall: f64,
    },
    /// A checkpoint is due while another one is still being written: it is made of the state that is
    /// committed when that is done.
    CheckpointDelayed {
        /// The step at which it was due.
        step: Step,
        /// The step of the one that is being written.
        saving: Step,
        /// For how long that has been so.
        seconds: f64,
    },
    /// A checkpoint could not be written; it will be tried again.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// Nobody holds the committed state any more; the run goes back to a checkpoint.
    Rewound {
        /// The step it goes on from.
        to: Step,
        /// Why.
        reason: String,
    },
    /// A member takes much longer than the others for a section of its steps.
    Straggles {
        /// Its session.
        worker: WorkerId,
        /// Its name.
        name: String,
        /// Where it is slow.
        section: Section,
        /// What that costs a step.
        seconds: f64,
    },
    /// A member that straggled does so no longer.
    CaughtUp {
        /// Its session.
        worker: WorkerId,
        /// Its name.
        name: String,
        /// Where it was slow.
        section: Section,
    },
    /// Nearly all of the exit distribution is after one loop.
    GateCollapsed {
        /// The newest step.
        step: Step,
        /// The loop, counted from 1.
        at: usize,
        /// Loops of the stage.
        loops: usize,
        /// Its share, a mean over some steps.
        share: f64,
    },
    /// The exit distribution is spread over several loops again.
    GateRecovered {
        /// The newest step.
        step: Step,
    },
    /// A loop's loss is above where it has been in this stage.
    LoopLossRises {
        /// The newest step.
        step: Step,
        /// The loop, counted from 1.
        at: usize,
        /// Its cross-entropy, a mean over some steps, nats per token.
        loss: f64,
        /// The lowest that this mean has been.
        lowest: f64,
    },
    /// A loop's loss that rose is back.
    LoopLossFalls {
        /// The newest step.
        step: Step,
        /// The loop, counted from 1.
        at: usize,
        /// Its cross-entropy.
        loss: f64,
    },
    /// Workers wait for the object store, and nobody is to blame: the run waits with them.
    StoreAway {
        /// Who waits.
        names: String,
        /// For what, and what the store says.
        detail: String,
    },
    /// Nobody waits for the object store any more.
    StoreBack {
        /// For how long the run has waited.
        seconds: f64,
    },
    /// A worker has been told to leave.
    Draining {
        /// Its name.
        name: String,
        /// Who asked, or why.
        reason: String,
    },
    /// The run will hold at the next step boundary.
    Pausing {
        /// Who asked, or why.
        reason: String,
    },
    /// The run goes on after a pause.
    Resumed,
    /// The run will stop at the next step boundary.
    Stopping {
        /// Who asked, or why.
        reason: String,
    },
    /// The run has ended as it should.
    Finished {
        /// In a sentence.
        reason: String,
    },
    /// The run has ended with an error.
    Failed {
        /// What went wrong.
        reason: String,
    },
}

impl fmt::Display for RunEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WorkerJoined { name, host, spare: false, .. } => {
                write!(f, "worker {name} joined from {host}")
            }
            Self::WorkerJoined { name, host, spare: true, .. } => {
                write!(f, "worker {name} joined from {host} and waits for a place")
            }
            Self::WorkerRefused { name, reason } => write!(f, "worker {name} refused: {reason}"),
            Self::WorkerLost { name, reason, .. } => write!(f, "worker {name} lost: {reason}"),
            Self::Waiting { here, wanted } => {
                write!(f, "waiting for workers: {here} of {wanted} are here")
            }
            Self::Formed { generation, world, step, reason } => {
                let s = if *world == 1 { "" } else { "s" };
                write!(f, "generation {generation}: {world} worker{s} from step {step}; {reason}")
            }
            Self::Committed(record) => match &record.skipped {
                Some(why) => {
                    write!(f, "step {} committed without an update: {why}", record.step)
                }
                None => write!(f, "step {} committed", record.step),
            },
            Self::Evaluated(record) => {
                write!(f, "step {} evaluated: validation loss {:.4}", record.step, record.loss)
            }
            Self::CheckpointSaved { step, seconds, bytes, .. } => {
                let size = *bytes as f64 / 1e6;
                write!(f, "checkpoint of step {step} saved ({size:.1} MB in {seconds:.2} s)")
            }
            Self::CheckpointDelayed { step, saving, seconds } => write!(
                f,
                "checkpoint of step {step} delayed: that of step {saving} is still being written, \
                 for {seconds:.1} s; checkpoint.every_steps is shorter than a save"
            ),
            Self::CheckpointFailed { step, reason } => {
                write!(f, "checkpoint of step {step} failed: {reason}")
            }
            Self::Rewound { to, reason } => write!(f, "back to step {to}: {reason}"),
            Self::Straggles { name, section, seconds, .. } => write!(
                f,
                "worker {name} straggles in {section}: {seconds:.3} s a step more than the others"
            ),
            Self::CaughtUp { name, section, .. } => {
                write!(f, "worker {name} straggles in {section} no longer")
            }
            Self::GateCollapsed { step, at, loops, share } => write!(
                f,
                "step {step}: the exit gate has collapsed: {:.1} % of the exits are after loop {at} of {loops}; \
                 a larger entropy_weight keeps the others in use",
                100.0 * share
            ),
            Self::GateRecovered { step } => {
                write!(f, "step {step}: the exit gate is collapsed no longer")
            }
            Self::LoopLossRises { step, at, loss, lowest } => write!(
                f,
                "step {step}: the loss of loop {at} rises: {loss:.4}, where it was {lowest:.4} before"
            ),
            Self::LoopLossFalls { step, at, loss } => {
                write!(f, "step {step}: the loss of loop {at} rises no longer: {loss:.4}")
            }
            Self::StoreAway { names, detail } => {
                write!(f, "the store is away, and the run waits for it: {names}, for {detail}")
            }
            Self::StoreBack { seconds } => {
                write!(f, "the store is back, after the run has waited for {seconds:.0} s")
            }
            Self::Draining { name, reason } => write!(f, "worker {name} is to leave: {reason}"),
            Self::Pausing { reason } => write!(f, "pausing: {reason}"),
            Self::Resumed => write!(f, "going on after the pause"),
            Self::Stopping { reason } => write!(f, "stopping: {reason}"),
            Self::Finished { reason } => write!(f, "finished: {reason}"),
            Self::Failed { reason } => write!(f, "failed: {reason}"),
        }
    }
}

impl RunEvent {
    /// What kind of event it is, in snake case, as in its JSON.
    #[must_use]
    pub fn kind(&self) -> String {
        let json = serde_json::to_value(self).unwrap_or_default();
        json["kind"].as_str().unwrap_or("event").to_owned()
    }
}

/// The record of a step like any other.
#[cfg(test)]
pub(crate) fn example(step: u64, loss: f64) -> StepRecord {
    StepRecord {
        step: Step(step),
        generation: Generation(1),
        world: 1,
        loss,
        loss_per_loop: vec![loss],
        exit_pdf: vec![1.0],
        mean_depth: 1.0,
        entropy: 0.0,
        grad_norm: 1.0,
        hidden_rms_per_loop: vec![1.0],
        gradient_norm_per_loop: vec![1.0],
        agreement_per_loop: vec![1.0],
        loss_rise_per_loop: vec![0.0],
        lr: 1e-3,
        tokens: 10 * step,
        step_tokens: 10,
        cursor: Cursor::default(),
        seconds: 0.1,
        flops: 1e9,
        mfu: None,
        digest: Digest([0; 32]),
        bad_slots: 0,
        skipped: None,
        trend: None,
        sections: SectionSeconds::default(),
    }
}
