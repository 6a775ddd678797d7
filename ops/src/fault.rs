//! What a process does to itself at an exact moment, so that a test knows that its fault has hit.
//!
//! `kill@reduce:17` is SIGKILL in the middle of the all-reduce of step 17; `stop@reduce:17` is
//! SIGSTOP there, so that somebody else can be hurt meanwhile. Without a step it is the first such
//! moment of all; if step 17 has none, the first one after it. Each fault happens once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use looptrain_proto::Step;
use nix::sys::signal::{Signal, raise};

use crate::progress::print_line;

/// What has been queued for others before the moment is to leave the process, while the task that
/// the moment belongs to waits: for so long at least, and then until all other threads are asleep,
/// which may be much later on a busy machine.
const LEAVING: Duration = Duration::from_millis(30);

/// So many times in a row the others are found asleep, so long one after the other.
const LOOKS: u32 = 3;
const LOOK_EVERY: Duration = Duration::from_millis(3);

/// A process that is never at rest is not waited for longer.
const LONGEST: Duration = Duration::from_secs(10);

/// One fault, as it is written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    action: Action,
    moment: String,
    from: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
}

impl Fault {
    /// Reads `ACTION@MOMENT[:STEP]`, with a moment out of `names`.
    ///
    /// # Errors
    /// What is wrong, and what could be written.
    pub(crate) fn parse(text: &str, names: &[&str]) -> Result<Self, String> {
        let form = || format!("write kill@MOMENT:STEP or stop@MOMENT:STEP, not `{text}`");
        let (action, rest) = text.split_once('@').ok_or_else(form)?;
        let action = match action {
            "kill" => Action::Kill,
            "stop" => Action::Stop,
            _ => return Err(form()),
        };
        let (moment, from) = match rest.split_once(':') {
            Some((moment, step)) => (moment, step.parse().map_err(|_| form())?),
            None => (rest, 0),
        };
        if !names.contains(&moment) {
            return Err(format!("there is no moment `{moment}`, only {}", names.join(", ")));
        }
        Ok(Self { action, moment: moment.to_owned(), from: Step(from) })
    }

    fn is_at(&self, moment: &str, step: Step) -> bool {
        self.moment == moment && step >= self.from
    }
}

/// The faults of this process.
#[derive(Debug)]
pub(crate) struct Faults(Vec<(Fault, AtomicBool)>);

impl Faults {
    pub(crate) fn new(faults: Vec<Fault>) -> Self {
        Self(faults.into_iter().map(|fault| (fault, AtomicBool::new(false))).collect())
    }

    /// The action that is due at this moment, if it has not been taken before.
    fn due(&self, moment: &str, step: Step) -> Option<Action> {
        let due = |(fault, done): &&(Fault, AtomicBool)| {
            fault.is_at(moment, step) && !done.swap(true, Ordering::Relaxed)
        };
        self.0.iter().find(due).map(|(fault, _)| fault.action)
    }

    /// Does what is to be done at this moment.
    pub(crate) fn at(&self, moment: &str, step: Step) {
        let Some(action) = self.due(moment, step) else { return };
        // Others do the runtime's work meanwhile, so that what is queued leaves.
        tokio::task::block_in_place(let_leave);
        let (name, signal) = match action {
            Action::Kill => ("kill", Signal::SIGKILL),
            Action::Stop => ("stop", Signal::SIGSTOP),
        };
        print_line(&format!("fault: {name} at {moment} of step {step}"));
        // To this thread, which goes no further then; a signal to the process may be taken by another
        // thread, and this one would go on until that is scheduled.
        if let Err(error) = raise(signal) {
            print_line(&format!("the fault failed: {error}"));
        }
    }
}

/// See [`LEAVING`].
fn let_leave() {
    let begin = Instant::now();
    std::thread::sleep(LEAVING);
    let mut asleep = 0;
    while asleep < LOOKS && begin.elapsed() < LONGEST {
        asleep = if others_are_asleep() { asleep + 1 } else { 0 };
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Whether no other thread of this process runs or is about to; where the system does not tell, they
/// are taken to have had the time they need.
fn others_are_asleep() -> bool {
    let own = std::fs::read_link("/proc/thread-self").unwrap_or_default();
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return true };
    let mut others = threads.flatten().filter(|it| own.file_name() != Some(&it.file_name()));
    others.all(|thread| {
        let text = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // Behind the name, in parentheses, which may hold anything: `S` when it waits for something.
        text.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('S'))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const NAMES: [&str; 2] = ["compute", "reduce"];

    #[test]
    fn what_is_under_way_is_waited_for() {
        let (begun, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (says, ends) = (Arc::clone(&begun), Arc::clone(&done));
        let busy = std::thread::spawn(move || {
            let begin = Instant::now();
            says.store(true, Ordering::Relaxed);
            while begin.elapsed() < 10 * LEAVING {
                std::hint::spin_loop();
            }
            ends.store(true, Ordering::Relaxed);
        });
        while !begun.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let_leave();
        assert!(done.load(Ordering::Relaxed));
        busy.join().unwrap();
    }

    #[test]
    fn a_fault_is_an_action_at_a_moment_that_there_is() {
        let fault = Fault::parse("stop@reduce:17", &NAMES);
        let expected = Fault { action: Action::Stop, moment: "reduce".into(), from: Step(17) };
        assert_eq!(fault, Ok(expected));
        assert_eq!(Fault::parse("kill@compute", &NAMES).map(|fault| fault.from), Ok(Step(0)));
        for wrong in ["kill", "burn@reduce", "kill@reduce:", "kill@reduce:x"] {
            assert!(Fault::parse(wrong, &NAMES).unwrap_err().contains("kill@MOMENT"), "{wrong}");
        }
        let unknown = Fault::parse("kill@lunch:1", &NAMES).unwrap_err();
        assert!(unknown.contains("`lunch`, only compute, reduce"), "{unknown}");
    }

    #[test]
    fn a_fault_happens_once_at_its_step_or_the_first_after_it() {
        let faults = ["kill@reduce:3", "stop@compute"].map(|text| Fault::parse(text, &NAMES));
        let faults = Faults::new(faults.into_iter().map(Result::unwrap).collect());
        assert_eq!(faults.due("reduce", Step(2)), None);
        assert_eq!(faults.due("compute", Step(2)), Some(Action::Stop));
        assert_eq!(faults.due("compute", Step(3)), None);
        assert_eq!(faults.due("reduce", Step(4)), Some(Action::Kill));
        assert_eq!(faults.due("reduce", Step(4)), None);
    }
}
