//! A run with faults: carries out the schedule, and watches what comes of it.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use looptrain_proto::{Generation, Step};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::cluster::{Cluster, Said, Site};
use super::schedule::{COORDINATOR_AT_MOMENT, Happening, Planned};
use super::watch::{Until, Watch};
use crate::progress::print_line;

/// No step for this long is a failure.
const SILENCE: Duration = Duration::from_secs(30);
/// The first step may take so long, and the last words.
const BEGINNING: Duration = Duration::from_secs(60);
/// A frozen worker sleeps this much longer than the time-out.
const OVERSLEEPS: Duration = Duration::from_secs(2);
/// A process that is to die at a moment is told one that is so far ahead.
const AHEAD: Duration = Duration::from_millis(500);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What there is to be said of a run that has ended as it should.
pub(super) struct Stopped {
    pub(super) step: Step,
    pub(super) weights: String,
}

/// What is known of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// Nothing is done to it.
    Well,
    /// It has been killed, or told to leave or to stop.
    Dismissed,
    /// Under SIGSTOP until then.
    Frozen(Duration),
    /// It will die at a moment of its own.
    Doomed(&'static str, Until),
}

/// A run under way.
pub(super) struct Trial {
    cluster: Cluster,
    said: mpsc::UnboundedReceiver<Said>,
    pub(super) watch: Watch,
    workers: BTreeMap<String, Fate>,
    coordinator: (String, Fate),
    /// When the next coordinator is to be started, and with which fault.
    restart: Option<(Duration, Option<String>)>,
    worker_timeout: Duration,
    /// Since when something has been under way.
    busy: Option<Duration>,
    begun: Instant,
    stopped: Option<Stopped>,
}

impl Trial {
    /// Starts a coordinator with these arguments and its workers.
    pub(super) fn start(
        site: Site,
        workers: usize,
        worker_timeout: Duration,
        arguments: &[&str],
    ) -> Result<Self> {
        let (mut cluster, said) = Cluster::new(site)?;
        let coordinator = (cluster.start_coordinator(arguments)?, Fate::Well);
        let mut trial = Self {
            cluster,
            said,
            watch: Watch::default(),
            workers: BTreeMap::new(),
            coordinator,
            restart: None,
            worker_timeout,
            busy: None,
            begun: Instant::now(),
            stopped: None,
        };
        for _ in 0..workers {
            trial.start_worker(&[], Fate::Well)?;
        }
        Ok(trial)
    }

    /// Carries out the schedule, lets the run go on for `length` after its first step, and stops it.
    ///
    /// # Errors
    /// What went wrong, after which event.
    pub(super) async fn run(&mut self, plan: Vec<Planned>, length: Duration) -> Result<Stopped> {
        let mut plan = VecDeque::from(plan);
        self.begin().await?;
        loop {
            self.listen().await?;
            self.look()?;
            let (now, idle) = (self.now(), self.is_idle());
            if let Some(next) = plan.pop_front_if(|next| idle && next.at <= now) {
                self.make_happen(next)?;
            } else if idle && now >= length {
                return self.stop().await;
            }
        }
    }

    /// Lets the run go on to the end that its coordinator was told.
    ///
    /// # Errors
    /// When it does not get there.
    pub(super) async fn run_to_its_end(&mut self) -> Result<Stopped> {
        self.begin().await?;
        self.dismiss_all();
        while self.stopped.is_none() {
            self.listen().await?;
            self.look()?;
        }
        self.stop().await
    }

    /// Ends all processes.
    pub(super) async fn end(self) {
        self.cluster.end().await;
    }

    /// Since the first step.
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Waits for the first step, from which times are counted.
    async fn begin(&mut self) -> Result<()> {
        let first = async {
            while self.watch.step() == Step(0) {
                self.listen().await?;
            }
            Ok::<_, anyhow::Error>(())
        };
        timeout(BEGINNING, first)
            .await
            .map_err(|_| anyhow::anyhow!("no step was committed in {} s", BEGINNING.as_secs()))??;
        Ok(())
    }

    /// Takes what the processes say within a moment.
    async fn listen(&mut self) -> Result<()> {
        let said = tokio::select! {
            said = self.said.recv() => said,
            () = sleep(LOOK_EVERY) => return Ok(()),
        };
        match said {
            Some(Said::Line { at, text }) => self.on_line(at, &text),
            Some(Said::Ended { at, name, status, tail }) => {
                let at = at.saturating_duration_since(self.begun);
                self.on_end(at, &name, status, &tail)
            }
            None => bail!("nobody watches the processes any more"),
        }
    }

    fn on_line(&mut self, at: Instant, line: &str) -> Result<()> {
        let Ok(event) = serde_json::from_str::<Value>(line) else {
            self.stopped = last_words(line).or(self.stopped.take());
            return Ok(());
        };
        if event["kind"] == "committed" {
            let number = |key: &str| {
                event[key].as_u64().with_context(|| format!("there is no {key} in {line}"))
            };
            let (step, generation) = (Step(number("step")?), Generation(number("generation")?));
            if self.watch.step() == Step(0) {
                self.begun = at;
            }
            let before = self.watch.is_calm();
            self.watch.commit(at.saturating_duration_since(self.begun), step, generation);
            if !before && self.watch.is_calm() {
                self.say_recovered();
            }
        }
        Ok(())
    }

    fn say_recovered(&self) {
        if let Some(event) = self.watch.events.last() {
            let recovery = event.recovery.unwrap_or_default().as_secs_f64();
            print_line(&format!(
                "         goes on at step {} after {recovery:.3} s",
                self.watch.step()
            ));
        }
    }

    fn on_end(
        &mut self,
        at: Duration,
        name: &str,
        status: ExitStatus,
        tail: &VecDeque<String>,
    ) -> Result<()> {
        self.cluster.forget(name);
        let is_coordinator = self.coordinator.0 == name;
        let fate = match is_coordinator {
            true => std::mem::replace(&mut self.coordinator.1, Fate::Dismissed),
            // One that was replaced has been dismissed before.
            false => self.workers.remove(name).unwrap_or(Fate::Dismissed),
        };
        let last = tail.back().map_or("", String::as_str);
        match fate {
            Fate::Doomed(kind, until) if status.signal() == Some(Signal::SIGKILL as i32) => {
                self.event(at, kind, format!("{name}: {last}"), until);
                if is_coordinator {
                    self.restart = Some((at, None));
                }
            }
            Fate::Dismissed if status.success() || status.signal().is_some() => {}
            _ => {
                let text = tail.iter().map(String::as_str).collect::<Vec<_>>().join(" | ");
                bail!("{name} ended though nothing had been done to it ({status}): {text}");
            }
        }
        Ok(())
    }

    /// Does what is due, and finds out what is overdue.
    fn look(&mut self) -> Result<()> {
        let now = self.now();
        if let Some((_, fault)) = self.restart.take_if(|(due, _)| *due <= now) {
            let arguments: Vec<&str> =
                fault.as_deref().map_or(Vec::new(), |fault| vec!["--fault", fault]);
            let name = self.cluster.start_coordinator(&arguments)?;
            let fate = match fault {
                Some(_) => Fate::Doomed(COORDINATOR_AT_MOMENT, Until::NewGeneration),
                None => Fate::Well,
            };
            self.coordinator = (name, fate);
            self.watch.measure_from(self.now());
        }
        // Not before the others have gone on: a coordinator that had no turns itself meanwhile takes
        // longer to find out.
        let noticed = self.watch.is_calm();
        let thawed: Vec<String> = (self.workers.iter())
            .filter(|(_, fate)| matches!(fate, Fate::Frozen(until) if noticed && *until <= now))
            .map(|(name, _)| name.clone())
            .collect();
        for name in thawed {
            self.cluster.signal(&name, Signal::SIGCONT);
            self.workers.insert(name.clone(), Fate::Well);
            self.event(now, "thaw-worker", name, Until::NewGeneration);
        }
        let silence = self.watch.silence(now);
        if silence > SILENCE {
            bail!("no step was committed for {} s", SILENCE.as_secs());
        }
        // A moment that does not come and a change that nobody notices are failures, too.
        let busy = match self.is_idle() {
            true => self.busy.take().unwrap_or(now),
            false => *self.busy.get_or_insert(now),
        };
        if now.saturating_sub(busy) > self.worker_timeout + OVERSLEEPS + SILENCE {
            bail!("steps are committed, but what was to happen has not happened");
        }
        Ok(())
    }

    /// Nothing is under way.
    fn is_idle(&self) -> bool {
        let undone = |fate: &Fate| matches!(fate, Fate::Frozen(_) | Fate::Doomed(..));
        self.watch.is_calm()
            && self.restart.is_none()
            && !undone(&self.coordinator.1)
            && !self.workers.values().any(undone)
    }

    fn event(&mut self, at: Duration, kind: &'static str, detail: String, until: Until) {
        let (seconds, step) = (at.as_secs_f64(), self.watch.step());
        print_line(&format!("{seconds:6.1} s {kind} {detail} (step {step})"));
        self.watch.event(at, kind, detail, until);
    }

    fn start_worker(&mut self, arguments: &[&str], fate: Fate) -> Result<String> {
        let name = self.cluster.start_worker(arguments)?;
        self.workers.insert(name.clone(), fate);
        Ok(name)
    }

    /// The worker that the number points at, now dismissed.
    fn dismiss(&mut self, victim: usize, signal: Signal) -> Result<String> {
        let well = self.workers.iter().filter(|(_, fate)| **fate == Fate::Well);
        let names: Vec<&String> = well.map(|(name, _)| name).collect();
        if names.is_empty() {
            bail!("no worker is left");
        }
        let name = names[victim % names.len()].clone();
        self.cluster.signal(&name, signal);
        self.workers.insert(name.clone(), Fate::Dismissed);
        Ok(name)
    }

    fn kill_coordinator(&mut self, restart: Duration, fault: Option<String>) -> String {
        self.cluster.signal(&self.coordinator.0, Signal::SIGKILL);
        self.coordinator.1 = Fate::Dismissed;
        self.restart = Some((restart, fault));
        self.coordinator.0.clone()
    }

    /// A fault at a moment a little ahead.
    fn fault(&self, moment: &str) -> String {
        let steps = AHEAD.as_secs_f64() / self.watch.step_time().as_secs_f64().max(1e-4);
        format!("kill@{moment}:{}", self.watch.step().0 + steps as u64 + 1)
    }

    fn make_happen(&mut self, planned: Planned) -> Result<()> {
        let Planned { happening, victim, .. } = planned;
        let (now, kind, until) = (self.now(), happening.kind(), Until::NewGeneration);
        let detail = match happening {
            Happening::KillWorker => self.dismiss(victim, Signal::SIGKILL)?,
            Happening::Leave => self.dismiss(victim, Signal::SIGTERM)?,
            Happening::Join => self.start_worker(&[], Fate::Well)?,
            Happening::FreezeWorker => {
                let name = self.dismiss(victim, Signal::SIGSTOP)?;
                let until = now + self.worker_timeout + OVERSLEEPS;
                self.workers.insert(name.clone(), Fate::Frozen(until));
                name
            }
            Happening::KillCoordinator(outage) => {
                let name = self.kill_coordinator(now + outage, None);
                format!("{name}, for {} ms", outage.as_millis())
            }
            Happening::KillBoth => {
                let worker = self.dismiss(victim, Signal::SIGKILL)?;
                format!("{} and {worker}", self.kill_coordinator(now, None))
            }
            // These are told of when they die.
            Happening::KillWorkerAt(moment) => {
                let fault = self.fault(moment);
                self.start_worker(&["--fault", &fault], Fate::Doomed(kind, until))?;
                return Ok(());
            }
            Happening::KillJoiner => {
                let doomed = Fate::Doomed(kind, Until::AnyCommit);
                // Where there is a checkpoint of the newest step it has nothing to fetch, and dies as
                // a member.
                let faults = ["--fault", "kill@fetched", "--fault", "kill@compute"];
                self.start_worker(&faults, doomed)?;
                return Ok(());
            }
            Happening::KillCoordinatorAt(moment) => {
                let fault = self.fault(moment);
                let name = self.kill_coordinator(now, Some(fault));
                let kind = Happening::KillCoordinator(Duration::ZERO).kind();
                self.event(now, kind, name, until);
                return Ok(());
            }
        };
        self.event(now, kind, detail, until);
        Ok(())
    }

    /// From now on they may end.
    fn dismiss_all(&mut self) {
        let fates = self.workers.values_mut().chain([&mut self.coordinator.1]);
        fates.for_each(|fate| *fate = Fate::Dismissed);
    }

    /// Stops the run at the next boundary, with a checkpoint, unless it has ended.
    async fn stop(&mut self) -> Result<Stopped> {
        self.cluster.signal(&self.coordinator.0, Signal::SIGTERM);
        self.dismiss_all();
        let ended = async {
            while self.stopped.is_none() || !self.workers.is_empty() {
                self.listen().await?;
            }
            Ok::<_, anyhow::Error>(())
        };
        timeout(BEGINNING, ended).await.map_err(|_| {
            anyhow::anyhow!("the run did not end {} s after it was told to", BEGINNING.as_secs())
        })??;
        self.stopped.take().context("the coordinator said nothing at its end")
    }
}

/// The last line of a coordinator: `stopped run=... step=... weights=...`.
fn last_words(line: &str) -> Option<Stopped> {
    let field = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key));
    if !line.starts_with("stopped ") && !line.starts_with("done ") {
        return None;
    }
    let (step, weights) = (field("step=")?.parse().ok()?, field("weights=")?.to_owned());
    Some(Stopped { step: Step(step), weights })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_a_coordinator_are_understood() {
        let stopped =
            last_words("stopped run=a step=12 tokens=7 loss=1.5 weights=blake3:ab").unwrap();
        assert_eq!((stopped.step, stopped.weights.as_str()), (Step(12), "blake3:ab"));
        assert!(last_words("validation at step 3: loss 1").is_none());
        assert!(last_words("stopped run=a step=12").is_none());
    }
}
