//! What backward computes again, chosen from the memory that there is.
//!
//! Keeping everything is the fastest, and takes memory for R x L layers of each slot under way; so
//! many slots are under way as there are threads. `auto` takes the first of none, loop and layer
//! whose slots fit beside what a worker holds anyway. The bits are the same for all, so workers of one
//! run may choose differently.

use std::fmt;

use looptrain_model::{Device, DeviceError, Layout, MemoryNeed, Recompute, StageSettings, Trainer};
use looptrain_proto::{Spec, spec};

use super::bench::KEPT_BYTES;
use crate::machine::Gib;

/// From the fastest to the slowest. Each needs no more than the one before it; with one layer, or one
/// loop, two of them need the same, and then the faster is taken.
const MODES: [Recompute; 3] = [Recompute::None, Recompute::Loop, Recompute::Layer];

/// What a worker holds for each parameter: weights and two moments (12), the weights once more in the
/// form in which they are computed with (8), the sums of the slots (8), the reduced gradient (4), and
/// the copy of the state that a save or a joiner takes (12).
const BYTES_PER_PARAMETER: u64 = 44;

/// Memory of the steps of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Need {
    /// What is held whatever is computed again, in bytes.
    held: u64,
    /// Slots under way.
    slots: u64,
    /// Bytes of a slot under way, in the order of [`MODES`].
    slot: [u64; 3],
}

impl Need {
    fn of(spec: &Spec, stage: &spec::Stage, trainer: &Trainer) -> Self {
        let (settings, size) = sizes_of(stage);
        let bytes = |mode| trainer.slot_bytes(&spec.model, &settings, size, mode);
        Self::new(spec, stage, trainer.memory(), MODES.map(bytes))
    }

    /// From what a trainer needs, and the bytes of a slot in the order of [`MODES`].
    fn new(spec: &Spec, stage: &spec::Stage, need: MemoryNeed, slot: [u64; 3]) -> Self {
        let trained = Layout::new(&spec.model).trained(stage.objective).len() as u64;
        // A device's sums, beside the gradient.
        let fixed = match spec.cluster.reduction {
            spec::Reduction::Exact => size_of::<i64>() as u64,
            spec::Reduction::Fast => 0,
            spec::Reduction::FastBf16 => size_of::<u16>() as u64,
        };
        let parameters = spec.model.parameters();
        let gradient = trained * size_of::<f32>() as u64;
        // Whole gradients, as many as there is room for.
        let kept = gradient
            .saturating_mul(u64::from(stage.slots))
            .min(KEPT_BYTES as u64 / gradient * gradient);
        Self {
            held: match need.per_parameter {
                Some(bytes) => parameters * (bytes + fixed),
                None => parameters * BYTES_PER_PARAMETER + kept,
            },
            slots: u64::from(stage.slots).min(need.slots_at_once as u64),
            slot,
        }
    }

    /// Bytes of all that is held in this mode.
    fn total(&self, mode: Recompute) -> u64 {
        self.held.saturating_add(self.slots.saturating_mul(self.slot[mode as usize]))
    }

    /// The mode in which the least is held, of equals the fastest.
    fn smallest(&self) -> Recompute {
        MODES.into_iter().min_by_key(|mode| self.total(*mode)).unwrap_or(Recompute::Layer)
    }
}

/// What decides the bytes of a slot.
fn sizes_of(stage: &spec::Stage) -> (StageSettings, [usize; 2]) {
    (StageSettings::from(stage), [stage.slot_sequences, stage.sequence_length])
}

/// Bytes that a worker takes in a stage on any device of this kind, which need not be there: when
/// nothing is computed again, a loop at a time, and a layer at a time.
///
/// # Errors
/// When there are no kernels for the model.
pub fn worker_bytes(
    spec: &Spec,
    stage: &spec::Stage,
    device: Device,
    threads: usize,
) -> Result<[u64; 3], DeviceError> {
    let (settings, size) = sizes_of(stage);
    let mut slot = [0; 3];
    for (slot, mode) in slot.iter_mut().zip(MODES) {
        *slot = looptrain_model::slot_bytes(device, &spec.model, &settings, size, mode)?;
    }
    let need = Need::new(spec, stage, MemoryNeed::of(device, threads), slot);
    Ok(MODES.map(|mode| need.total(mode)))
}

/// A mode, and whether the memory is enough for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    mode: Recompute,
    fits: bool,
}

/// The mode that the spec asks for; without a wish, the fastest that fits in `memory` bytes, or the
/// smallest when none does. Where nobody knows the memory, it is taken to be enough.
fn choose(wanted: spec::Recompute, need: &Need, memory: Option<u64>) -> Choice {
    let fits = |mode: &Recompute| memory.is_none_or(|memory| need.total(*mode) <= memory);
    let mode = match wanted {
        spec::Recompute::None => Recompute::None,
        spec::Recompute::Loop => Recompute::Loop,
        spec::Recompute::Layer => Recompute::Layer,
        spec::Recompute::Auto => MODES.into_iter().find(fits).unwrap_or_else(|| need.smallest()),
    };
    Choice { mode, fits: fits(&mode) }
}

/// The mode of each stage of the spec for a trainer on a machine of so many bytes of memory, or on a
/// device, which has its own; each is logged with its figures, as a warning when they say that the
/// memory is not enough.
pub(super) fn of_stages(spec: &Spec, trainer: &Trainer, memory: Option<u64>) -> Vec<Recompute> {
    let memory = match trainer.memory().per_parameter {
        Some(_) => trainer.memory().available,
        None => memory,
    };
    let of_stage = |stage: &spec::Stage| {
        let need = Need::of(spec, stage, trainer);
        let Choice { mode, fits } = choose(spec.compute.recompute, &need, memory);
        let told = Told { stage: &stage.name, mode, need, memory };
        if fits {
            tracing::info!("{told}");
        } else {
            let remedy = match mode == need.smallest() {
                true => "",
                false => ", or set compute.recompute to auto",
            };
            tracing::warn!(
                "{told}: that is more than there is, and the system may end this worker; give it more \
                 memory (--memory, compute.memory_gib) or fewer threads (--threads), make slots \
                 smaller (stages.N.slot_sequences){remedy}"
            );
        }
        mode
    };
    spec.stages.iter().map(of_stage).collect()
}

/// A choice in words.
struct Told<'a> {
    stage: &'a str,
    mode: Recompute,
    need: Need,
    memory: Option<u64>,
}

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Need { held, slots, slot } = self.need;
        let what = match self.mode {
            Recompute::None => "keeps everything",
            Recompute::Loop => "computes a loop at a time again",
            Recompute::Layer => "computes a layer at a time again",
        };
        write!(
            f,
            "backward of stage `{}` {what}: {slots} x {} of slots beside {}",
            self.stage,
            Gib(slot[self.mode as usize]),
            Gib(held)
        )?;
        match self.memory {
            Some(memory) => {
                write!(f, ", {} in all, of {}", Gib(self.need.total(self.mode)), Gib(memory))
            }
            None => write!(f, ", of memory whose size the system does not tell"),
        }
    }
}

#[cfg(test)]
mod tests {
    use looptrain_model::Device;

    use super::*;
    use crate::testing::tiny_spec;

    fn trainer(spec: &Spec, threads: usize) -> Trainer {
        Trainer::new(Device::Cpu, &spec.model, threads).expect("the CPU is always there")
    }

    const NEED: Need = Need { held: 100, slots: 2, slot: [50, 20, 5] };

    #[test]
    fn auto_takes_the_fastest_mode_whose_slots_fit_beside_what_is_held() {
        for (memory, mode, fits) in [
            (None, Recompute::None, true),
            (Some(u64::MAX), Recompute::None, true),
            (Some(200), Recompute::None, true),
            (Some(199), Recompute::Loop, true),
            (Some(140), Recompute::Loop, true),
            (Some(139), Recompute::Layer, true),
            (Some(110), Recompute::Layer, true),
            (Some(109), Recompute::Layer, false),
        ] {
            let choice = choose(spec::Recompute::Auto, &NEED, memory);
            assert_eq!(choice, Choice { mode, fits }, "{memory:?}");
        }
    }

    #[test]
    fn where_nothing_fits_auto_takes_what_needs_the_least() {
        let one_layer = Need { slot: [50, 20, 20], ..NEED };
        for memory in [0, 139] {
            let choice = choose(spec::Recompute::Auto, &one_layer, Some(memory));
            assert_eq!(choice, Choice { mode: Recompute::Loop, fits: false });
        }
    }

    #[test]
    fn a_wish_is_followed_even_when_it_does_not_fit() {
        let choice = choose(spec::Recompute::None, &NEED, Some(150));
        assert_eq!(choice, Choice { mode: Recompute::None, fits: false });
        let choice = choose(spec::Recompute::Layer, &NEED, Some(1 << 40));
        assert_eq!(choice, Choice { mode: Recompute::Layer, fits: true });
    }

    #[test]
    fn no_more_slots_are_under_way_than_there_are_threads_or_slots() {
        let spec = tiny_spec("memory://");
        let stage = &spec.stages[0];
        assert_eq!(stage.slots, 4);
        let slots = |threads| Need::of(&spec, stage, &trainer(&spec, threads)).slots;
        assert_eq!([0, 1, 3, 4, 64].map(slots), [1, 1, 3, 4, 4]);
    }

    #[test]
    fn each_stage_has_the_mode_that_its_own_slots_need() {
        let mut spec = tiny_spec("memory://");
        let mut longer = spec.stages[0].clone();
        (longer.name, longer.sequence_length, longer.loops) = ("long".into(), 512, 8);
        spec.stages.push(longer);
        // More layers than one, so that keeping one of them is less than keeping a loop.
        spec.model.num_hidden_layers = 8;
        let trainer = trainer(&spec, 2);
        let [short, long] = [0, 1].map(|stage| Need::of(&spec, &spec.stages[stage], &trainer));
        assert!(long.slot.is_sorted_by(|more, less| more > less), "{long:?}");
        let memory = long.total(Recompute::Loop);
        assert!(short.total(Recompute::None) < memory);
        let modes = of_stages(&spec, &trainer, Some(memory));
        assert_eq!(modes, [Recompute::None, Recompute::Loop]);
    }

    #[test]
    fn the_choice_is_told_with_its_figures() {
        let need = Need { held: 1 << 30, slots: 2, slot: [3 << 29, 1 << 29, 1 << 28] };
        let told = Told { stage: "long", mode: Recompute::Loop, need, memory: Some(3 << 30) };
        assert_eq!(
            told.to_string(),
            "backward of stage `long` computes a loop at a time again: 2 x 0.50 GiB of slots beside \
             1.00 GiB, 2.00 GiB in all, of 3.00 GiB"
        );
    }
}
