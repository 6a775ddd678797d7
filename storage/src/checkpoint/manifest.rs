//! The manifest of a checkpoint: where the run stood, and the digest of every part.

use looptrain_proto::v1::Trend;
use looptrain_proto::{Cursor, Digest, Generation, Step};
use serde::{Deserialize, Serialize};

/// `manifest.json` of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointManifest {
    /// Version of this format: [`CheckpointManifest::VERSION`].
    pub version: u32,
    /// The run.
    pub run: String,
    /// The state is that after this step.
    pub step: Step,
    /// Which data comes next.
    pub cursor: Cursor,
    /// What the run was trained by: `Spec::trajectory_digest`.
    pub trajectory: Digest,
    /// The generation that saved it.
    pub generation: Generation,
    /// Digest of all weights; see [`super::weights_digest`].
    pub weights_digest: Digest,
    /// The files, in order.
    pub parts: Vec<PartEntry>,
    /// Where loss and gradient norm have been, under a spec with a guard against spikes: what the next step
    /// is judged by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trend: Option<Trend>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartEntry {
    /// File name beside the manifest.
    pub file: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Digest of the file.
    pub digest: Digest,
    /// Tensors in it.
    pub tensors: u64,
}

impl CheckpointManifest {
    /// The version this program writes and reads.
    pub const VERSION: u32 = 1;

    /// What contradicts itself or what this program cannot read, if anything.
    pub(super) fn complaint(&self, run: &str, step: Step) -> Option<String> {
        if self.version != Self::VERSION {
            return Some(format!(
                "it has format version {}, this program reads {}",
                self.version,
                Self::VERSION
            ));
        }
        if self.run != run || self.step != step {
            return Some(format!("it belongs to step {} of the run `{}`", self.step, self.run));
        }
        // A part's name comes from outside and becomes a key.
        let foreign = self.parts.iter().find(|part| part.file.contains('/'));
        foreign.map(|part| format!("it names the part `{}`, which is elsewhere", part.file))
    }
}
