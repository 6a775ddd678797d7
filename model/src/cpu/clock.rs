//! Where the time of the slots goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A part of the work of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Section {
    /// Weights into panels.
    Pack,
    /// Norms, products and SwiGLU of the layers, final norm and gate, forward.
    Forward,
    /// The same, done again during backward.
    Recompute,
    /// Attention, in all directions.
    Attention,
    /// Head and cross-entropy with their gradients, the loss, and its gradients for the gate.
    Head,
    /// Gradients of the activations, the embedding and the final norm.
    Backward,
    /// Gradients of the layers' weights.
    WeightGradients,
    /// Clipping and AdamW.
    Update,
}

const SECTIONS: [(Section, &str); 8] = [
    (Section::Pack, "pack"),
    (Section::Forward, "forward"),
    (Section::Recompute, "recompute"),
    (Section::Attention, "attention"),
    (Section::Head, "head"),
    (Section::Backward, "backward"),
    (Section::WeightGradients, "weight_gradients"),
    (Section::Update, "update"),
];

/// Adds up the time of each section, over all threads of the pools that it runs in.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    nanoseconds: [AtomicU64; SECTIONS.len()],
}

impl Clock {
    /// Runs `work` and counts its time, once for each thread of the current pool.
    pub(crate) fn time<R>(&self, section: Section, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        let threads = rayon::current_num_threads() as u64;
        let spent = start.elapsed().as_nanos() as u64 * threads;
        self.nanoseconds[section as usize].fetch_add(spent, Ordering::Relaxed);
        result
    }

    /// The sections' names and times since the last call.
    pub(crate) fn take(&self) -> Vec<(&'static str, Duration)> {
        SECTIONS
            .iter()
            .map(|&(section, name)| {
                let spent = self.nanoseconds[section as usize].swap(0, Ordering::Relaxed);
                (name, Duration::from_nanos(spent))
            })
            .collect()
    }
}
