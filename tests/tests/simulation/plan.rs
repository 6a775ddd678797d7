//! What happens to whom and when, drawn from a seed: all of it is known before the simulation starts.

use std::fmt;
use std::time::Duration;

use crate::dice::Dice;

pub(crate) const COORDINATORS: [&str; 2] = ["c0", "c1"];
pub(crate) const WORKERS: [&str; 4] = ["w0", "w1", "w2", "w3"];

/// How a link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Nothing arrives until the cut is over; then all of it does. So TCP rides out a short
    /// partition, and so does a machine that is frozen.
    Hold,
    /// What is sent is lost for good, and connections that were open stay mute for ever.
    Drop,
    /// The same in one direction alone: from the first host to the second.
    DropOneWay,
}

/// A way in which things go wrong.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The process dies and its machine says so; it is started again when the fault is over.
    Crash(&'static str),
    /// The machine is gone without a word, and comes back when the fault is over.
    PowerCut(&'static str),
    /// Two hosts cannot talk.
    Cut(&'static str, &'static str, Cut),
    /// A host can talk to nobody.
    Isolation(&'static str, Cut),
    /// Another coordinator is started while the last one may be alive. These workers find it at
    /// once, the others when the fault is over.
    Failover(Vec<&'static str>),
    /// The store fails this many calls of a thousand, and takes up to so many milliseconds.
    Storm { errors: u64, slow: u64 },
    /// A host's clock leaps.
    Leap(&'static str, Duration),
    /// A worker is told to stop; it is started again a little later.
    Leave(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Timed {
    pub(crate) at: Duration,
    pub(crate) until: Duration,
    pub(crate) fault: Fault,
}

/// A clock that runs fast: every so often it is ahead by so much more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Skew {
    pub(crate) every: Duration,
    pub(crate) by: Duration,
}

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Of messages, in milliseconds.
    pub(crate) latency: u64,
    /// Of a slot, in milliseconds.
    pub(crate) slot: u64,
    pub(crate) skews: Vec<(&'static str, Skew)>,
    /// When the worker that is not waited for is started.
    pub(crate) spare_at: Duration,
    pub(crate) faults: Vec<Timed>,
    /// Nothing goes wrong from here on.
    pub(crate) calm: Duration,
}

impl Plan {
    /// A run to which nothing happens.
    pub(crate) fn calm(seed: u64) -> Self {
        Self {
            seed,
            latency: 20,
            slot: 30,
            skews: Vec::new(),
            spare_at: Duration::from_secs(2),
            faults: Vec::new(),
            calm: Duration::ZERO,
        }
    }

    pub(crate) fn draw(seed: u64) -> Self {
        let mut dice = Dice::new(seed, "plan");
        let hosts: Vec<&'static str> = COORDINATORS.into_iter().chain(WORKERS).collect();
        let mut skews = Vec::new();
        for host in &hosts {
            if dice.chance(250) {
                let skew = Skew { every: dice.millis(300, 1000), by: dice.millis(20, 200) };
                skews.push((*host, skew));
            }
        }
        let (latency, slot) = (dice.pick(&[10, 20, 50, 150]), dice.pick(&[10, 30, 60]));
        let span = dice.millis(3_000, 30_000);
        let count = 1 + dice.below(16);
        let mut faults: Vec<Timed> = (0..count).map(|_| fault(&mut dice, span)).collect();
        faults.sort_by_key(|timed| timed.at);
        let calm = faults.iter().map(|timed| timed.until).max().unwrap_or_default();
        let spare_at = dice.millis(500, 6_000);
        Self { seed, latency, slot, skews, spare_at, faults, calm: calm.max(spare_at) }
    }
}

fn fault(dice: &mut Dice, span: Duration) -> Timed {
    let at = dice.millis(200, span.as_millis() as u64);
    let lasts = dice.pick(&[100, 400, 1_000, 2_500, 6_000]);
    let until = at + dice.millis(lasts / 2, lasts);
    let (worker, coordinator) = (dice.pick(&WORKERS), dice.pick(&COORDINATORS));
    let cut = dice.pick(&[Cut::Hold, Cut::Hold, Cut::Drop, Cut::DropOneWay]);
    let fault = match dice.below(16) {
        0..=2 => Fault::Crash(worker),
        3 => Fault::PowerCut(worker),
        4 | 5 => Fault::Crash(COORDINATORS[0]),
        6 => Fault::PowerCut(COORDINATORS[0]),
        7 => Fault::Cut(worker, coordinator, cut),
        8 => Fault::Cut(coordinator, worker, cut),
        9 => {
            let others: Vec<&'static str> =
                WORKERS.into_iter().filter(|other| *other != worker).collect();
            Fault::Cut(worker, dice.pick(&others), Cut::Hold)
        }
        10 => Fault::Isolation(worker, Cut::Hold),
        11 => Fault::Isolation(coordinator, cut),
        12 => {
            let share = dice.pick(&[0, 500, 1000]);
            let first = WORKERS.into_iter().filter(|_| dice.chance(share)).collect();
            Fault::Failover(first)
        }
        13 => Fault::Storm {
            errors: dice.pick(&[0, 50, 200, 600, 1000]),
            slow: dice.pick(&[20, 100, 500]),
        },
        14 => Fault::Leap(dice.pick(&[worker, coordinator]), dice.millis(200, 5_000)),
        _ => Fault::Leave(worker),
    };
    Timed { at, until, fault }
}
