//! The worker processes of `looptrain train`.
//!
//! Workers stand in process groups of their own, so that Ctrl-C reaches the parent alone and the
//! coordinator can end the run in order. None of them outlives the parent for long: one that does
//! not end with the run is killed; when the parent itself is killed, they end at once (a worker under
//! SIGSTOP: once it is continued). A worker that crashes (dies by a signal) is started again; one that
//! ends with an error is not, for it would end the same way. One that was taken for dead, since the
//! machine was too busy or stood still, comes back by itself.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use looptrain_model::Device;
use looptrain_proto::Spec;
use looptrain_worker::available_memory;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::progress::print_line;

/// Pause before a crashed worker is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(500);
/// Seconds that a worker tries to reach the coordinator, which listens before it is started.
const CONNECT_TIMEOUT: u32 = 10;
/// Seconds that a worker without a session tries to get another one, for the coordinator may have taken
/// it for dead.
const RECONNECT_TIMEOUT: u32 = 10;
/// Crashes after which a worker is given up.
const RESTARTS: u32 = 5;

/// What to start.
#[derive(Clone, Debug)]
pub(crate) struct Fleet {
    /// The coordinator's address.
    pub(crate) coordinator: SocketAddr,
    /// Where the first worker computes; the others on the devices after it.
    pub(crate) device: Device,
    /// Compute threads of each worker; one worker per entry.
    pub(crate) threads: Vec<u32>,
    /// Bytes of memory that each of them may use; the spec says it otherwise.
    pub(crate) memory: Option<u64>,
}

impl Fleet {
    /// The workers of the spec, which share `threads` threads as evenly as possible, at least one
    /// each, and `memory` bytes of memory; when it is not given and the spec does not say what each
    /// of them may use, what this machine has.
    pub(crate) fn new(
        coordinator: SocketAddr,
        spec: &Spec,
        threads: u32,
        memory: Option<u64>,
    ) -> Self {
        let workers = spec.cluster.workers;
        let share = |worker| threads / workers + u32::from(worker < threads % workers);
        let unsaid = spec.compute.memory_gib == 0.0;
        let memory = memory.or_else(|| unsaid.then(available_memory).flatten());
        Self {
            coordinator,
            device: Device::Cpu,
            threads: (0..workers).map(|worker| share(worker).max(1)).collect(),
            memory: memory.map(|memory| memory / u64::from(workers)),
        }
    }

    /// Starts all workers and waits until the last one has ended for good; returns how each ended.
    /// Those that are left when `kill` is cancelled are killed.
    ///
    /// # Errors
    /// When a process cannot be started.
    pub(crate) async fn run(self, kill: CancellationToken) -> Result<Vec<String>> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut workers = JoinSet::new();
        for (index, &threads) in self.threads.iter().enumerate() {
            let (program, kill) = (program.clone(), kill.clone());
            workers.spawn(keep_alive(
                program,
                self.coordinator,
                index,
                Share { device: self.device.after(index), threads, memory: self.memory },
                kill,
            ));
        }
        let mut ends = Vec::new();
        while let Some(end) = workers.join_next().await {
            ends.push(end.context("a task that watches a worker failed")??);
        }
        Ok(ends)
    }
}

/// What one worker may use.
#[derive(Clone, Copy, Debug)]
struct Share {
    device: Device,
    threads: u32,
    memory: Option<u64>,
}

/// Runs one worker, starting it again after crashes; returns how it ended.
async fn keep_alive(
    program: PathBuf,
    coordinator: SocketAddr,
    index: usize,
    share: Share,
    kill: CancellationToken,
) -> Result<String> {
    for start in 0.. {
        let name =
            if start == 0 { format!("worker-{index}") } else { format!("worker-{index}.{start}") };
        let mut child = spawn(&program, coordinator, &name, share)?;
        relay(&mut child, name.clone());
        // Waiting would close it, and the worker takes that for this process's end.
        let _stdin = child.stdin.take();
        let status = tokio::select! {
            status = child.wait() => status.with_context(|| format!("cannot wait for {name}"))?,
            () = kill.cancelled() => {
                child.kill().await.with_context(|| format!("cannot kill {name}"))?;
                return Ok(format!("{name} was killed"));
            }
        };
        let crashed = status.code().is_none();
        if !crashed || start >= RESTARTS {
            return Ok(format!("{name} {}", describe(status)));
        }
        print_line(&format!("{name} {}; starting another", describe(status)));
        tokio::time::sleep(RESTART_PAUSE).await;
    }
    unreachable!("the loop ends by returning")
}

fn describe(status: ExitStatus) -> String {
    match status.code() {
        Some(0) => "ended".into(),
        Some(code) => format!("ended with status {code}"),
        None => format!("crashed ({status})"),
    }
}

fn spawn(
    program: &PathBuf,
    coordinator: SocketAddr,
    name: &str,
    Share { device, threads, memory }: Share,
) -> Result<Child> {
    let gibibytes = |memory| format!("--memory={}", memory as f64 / (1u64 << 30) as f64);
    Command::new(program)
        .arg("worker")
        .args(["--coordinator", &format!("http://{coordinator}")])
        .args(["--name", name])
        .args(["--device", &device.to_string()])
        .args(["--threads", &threads.to_string()])
        .args(memory.map(gibibytes))
        .arg("--quiet")
        .args(["--connect-timeout", &CONNECT_TIMEOUT.to_string()])
        .args(["--reconnect-timeout", &RECONNECT_TIMEOUT.to_string()])
        .arg("--bound")
        // It ends with this process, and the worker with it.
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {name} ({})", program.display()))
}

/// Passes a worker's stderr on, line by line, under its name.
fn relay(child: &mut Child, name: String) {
    let Some(stderr) = child.stderr.take() else { return };
    tokio::spawn(async move {
        let mut lines = BufReader::new(stderr).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            print_line(&format!("{name}: {line}"));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(overrides: &[&str], threads: u32, memory: Option<u64>) -> Fleet {
        let text = include_str!("../../examples/tiny.toml");
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let spec = Spec::parse("tiny.toml", text, &overrides).unwrap();
        Fleet::new("127.0.0.1:1".parse().unwrap(), &spec, threads, memory)
    }

    #[test]
    fn threads_are_shared_evenly_and_nobody_has_none() {
        assert_eq!(fleet(&["cluster.workers=3"], 8, None).threads, [3, 3, 2]);
        assert_eq!(fleet(&["cluster.workers=3"], 2, None).threads, [1, 1, 1]);
    }

    #[test]
    fn memory_is_shared_unless_the_spec_says_what_each_worker_may_use() {
        let own = ["cluster.workers=3", "compute.memory_gib=2"];
        assert_eq!(fleet(&own, 2, None).memory, None);
        assert_eq!(fleet(&own, 2, Some(900)).memory, Some(300));
        assert_eq!(fleet(&own[..1], 2, Some(900)).memory, Some(300));
        let machine = available_memory().unwrap();
        let share = fleet(&own[..1], 2, None).memory.unwrap();
        assert!((machine / 6..machine).contains(&share), "{share} of {machine}");
    }
}
