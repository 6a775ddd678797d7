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

/// Adds up the time of each section over all threads. Parts of several slots may take turns on a
/// thread, so what is timed is never more than a part.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    nanoseconds: [AtomicU64; SECTIONS.len()],
}

impl Clock {
    /// Runs `work`, which must not wait for other threads, and counts its time.
    pub(crate) fn time<R>(&self, section: Section, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        self.count(section, start.elapsed());
        result
    }

    /// Runs `work` on all threads of the current pool, which have nothing else to do, and counts its time
    /// for each of them.
    pub(crate) fn time_pool<R>(&self, section: Section, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        self.count(section, start.elapsed() * rayon::current_num_threads() as u32);
        result
    }

    fn count(&self, section: Section, spent: Duration) {
        let spent = spent.as_nanos() as u64;
        self.nanoseconds[section as usize].fetch_add(spent, Ordering::Relaxed);
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
