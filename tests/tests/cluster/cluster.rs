//! A coordinator and workers as processes of their own, with faults at exact moments.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::ports::free_port;
use crate::support::{End, Running, SOON, Scratch, is_gone, state, wait_until};

/// Over in less than a second when nothing holds it, and no checkpoint to go back to: what is lost
/// must come from other workers.
pub(crate) const RUN: [&str; 4] =
    ["--set", "stages.0.steps=100", "--set", "checkpoint.every_steps=100000"];

/// The last step of [`RUN`].
pub(crate) const LAST: u64 = 106;

/// The step that faults are for.
pub(crate) const STEP: u64 = 17;

/// A run that lasts until it is told to stop: whatever happens to it happens before its end. No
/// checkpoint to go back to, either.
pub(crate) const ENDLESS: [&str; 4] =
    ["--set", "stages.0.steps=1000000", "--set", "checkpoint.every_steps=1000000"];

/// Digest of the weights that [`RUN`] ends with when nothing happens to it.
fn undisturbed() -> &'static str {
    static DIGEST: OnceLock<String> = OnceLock::new();
    DIGEST.get_or_init(|| {
        let calm = [&["--workers", "1", "--threads", "2"], &RUN[..]].concat();
        Scratch::new().train(&calm).done().field("weights").to_owned()
    })
}

/// A running coordinator, and where its workers are started.
pub(crate) struct Cluster {
    pub(crate) scratch: Scratch,
    pub(crate) coordinator: Running,
    pub(crate) url: String,
    arguments: Vec<String>,
    /// In the environment of all its processes.
    variables: Vec<(String, String)>,
    /// All show certificates; see [`certify`].
    secured: bool,
}

/// Makes an authority, and below `tls/` a directory of credentials for each role.
pub(crate) fn certify(scratch: &Scratch) {
    let made = scratch.run(&["certs", "ca", "--to", "ca"]);
    assert_eq!(made.code, Some(0), "{made:?}");
    for role in ["coordinator", "worker", "operator", "viewer"] {
        let (to, host) = (format!("tls/{role}"), ["--host", "localhost", "--host", "127.0.0.1"]);
        let issue = ["certs", "issue", "--ca", "ca", "--role", role, "--name", "test", "--to", &to];
        let made = scratch.run(&[&issue[..], &host].concat());
        assert_eq!(made.code, Some(0), "{made:?}");
    }
}

impl Cluster {
    /// A coordinator of [`RUN`] that waits for so many workers.
    pub(crate) fn start(workers: usize, more: &[&str]) -> Self {
        let workers = format!("cluster.workers={workers}");
        Self::start_with(&[&RUN[..], &["--set", &workers], more].concat())
    }

    /// As [`Cluster::start`], with these variables in the environment of all processes.
    pub(crate) fn start_exporting(
        variables: &[(String, String)],
        workers: usize,
        more: &[&str],
    ) -> Self {
        let workers = format!("cluster.workers={workers}");
        Self::start_in(variables, &[&RUN[..], &["--set", &workers], more].concat())
    }

    /// A coordinator with these arguments.
    pub(crate) fn start_with(given: &[&str]) -> Self {
        Self::start_in(&[], given)
    }

    /// As [`Cluster::start`], where all processes show certificates.
    pub(crate) fn start_secured(workers: usize, more: &[&str]) -> Self {
        let workers = format!("cluster.workers={workers}");
        Self::secure(Scratch::new(), &[&RUN[..], &["--set", &workers], more].concat())
    }

    /// A coordinator with these arguments, where all processes show certificates.
    pub(crate) fn secure(scratch: Scratch, given: &[&str]) -> Self {
        certify(&scratch);
        Self::start_at(scratch, &[], true, &[&["--tls", "tls/coordinator"], given].concat())
    }

    /// A coordinator with these variables and arguments.
    pub(crate) fn start_in(variables: &[(String, String)], given: &[&str]) -> Self {
        Self::start_at(Scratch::new(), variables, false, given)
    }

    fn start_at(
        scratch: Scratch,
        variables: &[(String, String)],
        secured: bool,
        given: &[&str],
    ) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let arguments = ["coordinator", "spec.toml", "--listen", &address];
        let arguments = [&arguments[..], given].concat();
        let variables = variables.to_vec();
        let mut command = scratch.command(&arguments);
        command.envs(variables.clone());
        let mut coordinator = Running::start(command);
        let url = format!("http{}://{address}", if secured { "s" } else { "" });
        coordinator.wait_for(|line| line == format!("listening for workers on {url}"));
        let arguments = arguments.into_iter().map(str::to_owned).collect();
        Self { scratch, coordinator, url, arguments, variables, secured }
    }

    /// What a process of a role says besides.
    fn shown(&self, role: &'static str) -> Vec<&'static str> {
        match (self.secured, role) {
            (false, _) => Vec::new(),
            (true, "worker") => vec!["--tls", "tls/worker"],
            (true, _) => vec!["--tls", "tls/operator"],
        }
    }

    /// Starts another worker.
    pub(crate) fn worker(&self, more: &[&str]) -> Running {
        let worker = ["worker", "--coordinator", &self.url, "--threads", "1"];
        let shown = self.shown("worker");
        let mut command = self.scratch.command(&[&worker[..], &shown, more].concat());
        command.envs(self.variables.clone());
        Running::start(command)
    }

    /// Starts another worker that has more variables in its environment than the others.
    pub(crate) fn worker_exporting(&self, more: &[(String, String)], given: &[&str]) -> Running {
        let worker = ["worker", "--coordinator", &self.url, "--threads", "1"];
        let mut command = self.scratch.command(&[&worker[..], given].concat());
        command.envs(self.variables.clone()).envs(more.to_vec());
        Running::start(command)
    }

    /// What `looptrain status` says.
    pub(crate) fn status(&self) -> Value {
        let status = ["status", "--coordinator", &self.url, "--json"];
        let end = self.scratch.run(&[&status[..], &self.shown("operator")].concat());
        serde_json::from_str(&end.stdout).unwrap_or_else(|error| panic!("{error}: {end:?}"))
    }

    /// The newest committed step, in the coordinator's words.
    pub(crate) fn step(&self) -> u64 {
        self.status()["step"].as_u64().unwrap()
    }

    /// Waits until the status is as wanted.
    #[track_caller]
    pub(crate) fn wait_for(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(begin.elapsed() < SOON, "it never came to that: {status:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs an operator's command; the one line that it prints.
    #[track_caller]
    pub(crate) fn order(&self, command: &[&str]) -> String {
        let shown = self.shown("operator");
        let end = self.scratch.run(&[command, &["--coordinator", &self.url], &shown].concat());
        assert_eq!(end.code, Some(0), "{end:?}");
        end.last_line().to_owned()
    }

    /// Waits until a worker has frozen itself at a moment, pauses the run, which it holds, and wakes
    /// it up; the step, which is the newest then.
    pub(crate) fn pause_at(&self, worker: &mut Running, moment: &str) -> u64 {
        let step = frozen_at(worker, moment);
        self.pause_behind(worker, step);
        step
    }

    /// Pauses the run that a worker holds, which has frozen itself in the middle of a step, and wakes
    /// it up.
    pub(crate) fn pause_behind(&self, frozen: &Running, step: u64) {
        self.order(&["pause"]);
        frozen.signal("CONT");
        let status = self.wait_for(|status| status["phase"] == "paused");
        assert_eq!(status["step"], step, "{status:#}");
    }

    /// Waits until so many workers are there, each with a place or with the state that one takes.
    pub(crate) fn all_ready(&self, workers: usize) -> Value {
        let ready = |worker: &Value| worker["rank"].is_u64() || worker["warm"] == true;
        self.wait_for(|status| {
            let all = status["workers"].as_array().unwrap();
            all.len() == workers && all.iter().all(ready)
        })
    }

    /// Lets a paused run go on.
    pub(crate) fn resume(&self) {
        self.order(&["resume"]);
    }

    /// Waits for the end of the coordinator, which was told to die, and starts the next one, with
    /// the same arguments but for the fault.
    pub(crate) fn restart(&mut self) {
        wait_until(|| is_gone(self.coordinator.id()));
        let fault = self.arguments.iter().position(|argument| argument == "--fault");
        if let Some(fault) = fault {
            self.arguments.drain(fault..fault + 2);
        }
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let mut command = self.scratch.command(&arguments);
        command.envs(self.variables.clone());
        self.coordinator = Running::start(command);
    }

    /// Waits until a generation has formed; the line that says so.
    pub(crate) fn formed(&mut self, generation: u64) -> String {
        let begin = format!("generation {generation}: ");
        self.coordinator.wait_for(|line| line.starts_with(&begin))
    }

    /// Lets the run come to its end, with the weights of an undisturbed one and every step in the
    /// log once; returns the log.
    #[track_caller]
    pub(crate) fn finish(self) -> Vec<Value> {
        let end = self.coordinator.end().done();
        assert_eq!(end.field("weights"), undisturbed(), "{end:?}");
        assert!(!end.stderr.contains("back to step"), "no committed step is done again: {end:?}");
        let log = self.scratch.metrics();
        let steps: Vec<_> = log.iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=LAST).collect::<Vec<_>>(), "every step is logged once: {end:?}");
        log
    }

    /// Stops a run without end, which was given this; see [`stop`].
    #[track_caller]
    pub(crate) fn stop(self, given: &[&str]) -> (End, Vec<Value>) {
        stop(&self.scratch, self.coordinator, given)
    }
}

/// Stops a run without end that was given this: it has the weights of an undisturbed one that went
/// as far, and every step in the log once. What the coordinator said, and the log.
#[track_caller]
pub(crate) fn stop(scratch: &Scratch, coordinator: Running, given: &[&str]) -> (End, Vec<Value>) {
    coordinator.signal("TERM");
    let end = coordinator.end().stopped();
    let log = scratch.metrics();
    let steps: Vec<_> = log.iter().map(|line| line["step"].as_u64()).collect();
    let every: Vec<_> = (1..=end.step()).map(Some).collect();
    let missing: Vec<_> = every.iter().filter(|step| !steps.contains(step)).collect();
    assert!(steps == every, "every step is logged once, in order; missing are {missing:?}");
    assert_eq!(end.field("weights"), undisturbed_until(end.step(), given), "{end:?}");
    (end, log)
}

/// Digest of the weights after a step of a run that was given this, when nothing happens to it.
pub(crate) fn undisturbed_until(step: u64, given: &[&str]) -> String {
    let until = step.to_string();
    let calm = ["--workers", "1", "--threads", "2", "--until", &until];
    let end = Scratch::new().train(&[given, &calm[..]].concat()).stopped();
    assert_eq!(end.step(), step, "{end:?}");
    end.field("weights").to_owned()
}

/// How many workers committed a step.
pub(crate) fn world(log: &[Value], step: u64) -> u64 {
    log[step as usize - 1]["world"].as_u64().unwrap()
}

/// Waits until a process has frozen itself at a moment; the step.
pub(crate) fn frozen_at(process: &mut Running, moment: &str) -> u64 {
    let line = process.wait_for(|line| line.starts_with(&format!("fault: stop at {moment} of ")));
    wait_until(|| state(process.id()) == Some('T'));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits until a process has killed itself at a moment; the step.
#[track_caller]
pub(crate) fn died_at(process: Running, moment: &str) -> u64 {
    let end = process.end();
    assert_eq!(end.code, None, "it died by a signal: {end:?}");
    let begin = format!("fault: kill at {moment} of step ");
    let line = end.stderr.lines().find_map(|line| line.strip_prefix(&begin));
    line.unwrap_or_else(|| panic!("it did not die at {moment}: {end:?}")).parse().unwrap()
}
