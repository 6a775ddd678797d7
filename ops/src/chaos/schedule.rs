//! What is to happen to the cluster, drawn from a seed beforehand: how fast the machine is changes
//! nothing of it.

use std::time::Duration;

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};

/// Mean time between two happenings, and how much earlier or later one may come.
const EVERY: Duration = Duration::from_secs(5);
const JITTER: Duration = Duration::from_millis(1500);

/// The longest that nobody is there in a coordinator's stead.
const LONGEST_OUTAGE: Duration = Duration::from_millis(3000);

/// Moments at which a worker of at least two dies; see `looptrain_worker::Moment`.
const WORKER_MOMENTS: [&str; 4] = ["compute", "reduce", "prepared", "commit"];

/// The kind of a [`Happening::KillCoordinatorAt`].
pub(crate) const COORDINATOR_AT_MOMENT: &str = "kill-coordinator-at-moment";

/// Something that is done to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Happening {
    /// SIGKILL to a worker.
    KillWorker,
    /// A worker joins, and dies at a moment of a step that it takes part in.
    KillWorkerAt(&'static str),
    /// A worker joins, and dies as it has fetched the state.
    KillJoiner,
    /// SIGSTOP to a worker for longer than the time-out, then SIGCONT.
    FreezeWorker,
    /// SIGKILL to the coordinator; another is started after this time.
    KillCoordinator(Duration),
    /// The same, and the next coordinator dies at a moment of a step.
    KillCoordinatorAt(&'static str),
    /// SIGKILL to the coordinator and a worker at once.
    KillBoth,
    /// Another worker.
    Join,
    /// SIGTERM to a worker.
    Leave,
}

impl Happening {
    /// How the report calls it.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::KillWorker => "kill-worker",
            Self::KillWorkerAt(_) => "kill-worker-at-moment",
            Self::KillJoiner => "kill-joiner",
            Self::FreezeWorker => "freeze-worker",
            Self::KillCoordinator(_) => "kill-coordinator",
            Self::KillCoordinatorAt(_) => COORDINATOR_AT_MOMENT,
            Self::KillBoth => "kill-both",
            Self::Join => "join",
            Self::Leave => "leave",
        }
    }

    /// Workers that there are afterwards, of `workers` before.
    fn leaves(self, workers: usize) -> usize {
        match self {
            Self::KillWorker | Self::KillBoth | Self::Leave => workers - 1,
            Self::Join => workers + 1,
            _ => workers,
        }
    }
}

/// One happening of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    /// Since the first step.
    pub(crate) at: Duration,
    pub(crate) happening: Happening,
    /// Which of the workers it happens to: this, modulo their number.
    pub(crate) victim: usize,
}

/// Draws what happens in `length` to a cluster that begins with `workers` workers. One worker at
/// least is left at any time, and never more than one beyond the first number.
pub(crate) fn draw(seed: u64, length: Duration, workers: usize) -> Vec<Planned> {
    let mut dice = Dice(ChaCha8Rng::seed_from_u64(seed));
    let (mut at, mut there) = (Duration::ZERO, workers);
    let mut planned = Vec::new();
    loop {
        at += EVERY - JITTER + dice.time(2 * JITTER);
        if at >= length {
            return planned;
        }
        let happening = dice.happening(there, workers + 1);
        there = happening.leaves(there);
        planned.push(Planned { at, happening, victim: dice.below(1 << 16) });
    }
}

struct Dice(ChaCha8Rng);

impl Dice {
    /// A number below `end`, which is small beside 2^64.
    fn below(&mut self, end: usize) -> usize {
        (self.0.next_u64() % end as u64) as usize
    }

    fn time(&mut self, longest: Duration) -> Duration {
        Duration::from_millis(self.below(longest.as_millis() as usize + 1) as u64)
    }

    fn happening(&mut self, there: usize, most: usize) -> Happening {
        loop {
            let drawn = match self.below(12) {
                0 | 1 => Happening::KillWorker,
                2 => Happening::KillWorkerAt(WORKER_MOMENTS[self.below(WORKER_MOMENTS.len())]),
                3 => Happening::KillJoiner,
                4 => Happening::FreezeWorker,
                5 | 6 => Happening::KillCoordinator(self.time(LONGEST_OUTAGE)),
                7 => {
                    let names = looptrain_coordinator::Moment::NAMES;
                    Happening::KillCoordinatorAt(names[self.below(names.len())])
                }
                8 => Happening::KillBoth,
                9 | 10 => Happening::Join,
                _ => Happening::Leave,
            };
            let after = drawn.leaves(there);
            // Nobody freezes or dies alone: others are to go on meanwhile.
            let alone =
                there < 2 && !matches!(drawn, Happening::Join | Happening::KillCoordinator(_));
            if !alone && after >= 1 && after <= most {
                return drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_seed_is_a_schedule_and_another_seed_another() {
        assert_eq!(draw(7, HOUR, 3), draw(7, HOUR, 3));
        assert_ne!(draw(7, HOUR, 3), draw(8, HOUR, 3));
        let half = draw(7, HOUR / 2, 3);
        assert_eq!(draw(7, HOUR, 3)[..half.len()], half, "a longer run begins in the same way");
    }

    #[test]
    fn something_happens_about_every_five_seconds() {
        let times: Vec<Duration> = draw(1, HOUR, 3).iter().map(|planned| planned.at).collect();
        assert!((680..=760).contains(&times.len()), "{}", times.len());
        let mut pauses = times.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(pauses.all(|pause| pause >= EVERY - JITTER && pause <= EVERY + JITTER));
    }

    #[test]
    fn there_is_always_a_worker_and_everything_happens_some_time() {
        for workers in 1..=4 {
            let mut there = workers;
            let mut kinds = std::collections::BTreeSet::new();
            for planned in draw(3, HOUR, workers) {
                there = planned.happening.leaves(there);
                assert!((1..=workers + 1).contains(&there));
                kinds.insert(planned.happening.kind());
            }
            assert_eq!(kinds.len(), 9, "{workers} workers: {kinds:?}");
        }
    }
}
