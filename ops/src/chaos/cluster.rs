//! The processes of a cluster: a coordinator and workers, each a child of this process.
//!
//! A child belongs to one task, which alone waits for it and sends it signals, so that an id always
//! means the child. [`Cluster::end`] kills them all; should this process be killed itself, they end
//! with it (`--bound`), for which they are to be started from its main thread.

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Lines of a process that are kept for the case that it fails.
const TAIL: usize = 8;

/// How long workers look for a coordinator, in seconds: longer than any run is waited for.
const PATIENCE: &str = "120";

/// Something that a process has said or done.
#[derive(Debug)]
pub(super) enum Said {
    /// A line on the stdout of a coordinator.
    Line { at: Instant, text: String },
    /// The process has ended; its last lines on stderr.
    Ended { at: Instant, name: String, status: ExitStatus, tail: VecDeque<String> },
}

/// Where and with what the processes run.
#[derive(Clone, Debug)]
pub(super) struct Site {
    pub(super) spec: PathBuf,
    pub(super) overrides: Vec<String>,
    /// Compute threads of each worker.
    pub(super) threads: u32,
}

/// The running processes.
pub(super) struct Cluster {
    site: Site,
    program: PathBuf,
    address: SocketAddr,
    /// By name; gone when the process has ended.
    signals: BTreeMap<String, mpsc::UnboundedSender<Signal>>,
    tasks: JoinSet<()>,
    voice: mpsc::UnboundedSender<Said>,
    started: u32,
}

impl Cluster {
    /// A cluster without processes, and where it is heard.
    pub(super) fn new(site: Site) -> Result<(Self, mpsc::UnboundedReceiver<Said>)> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let (voice, said) = mpsc::unbounded_channel();
        let address = free_address()?;
        let (signals, tasks) = (BTreeMap::new(), JoinSet::new());
        Ok((Self { site, program, address, signals, tasks, voice, started: 0 }, said))
    }

    /// Starts a coordinator at the cluster's address; returns its name.
    pub(super) fn start_coordinator(&mut self, more: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.arg("coordinator").arg(&self.site.spec);
        for given in &self.site.overrides {
            command.args(["--set", given]);
        }
        command.args(["--listen", &self.address.to_string(), "--events"]).args(more);
        self.start("coordinator", command)
    }

    /// Starts a worker; returns its name.
    pub(super) fn start_worker(&mut self, more: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        let name = self.next_name("worker");
        command
            .args(["worker", "--coordinator", &format!("http://{}", self.address)])
            .args(["--name", &name, "--threads", &self.site.threads.to_string(), "--quiet"])
            .args(["--connect-timeout", PATIENCE, "--reconnect-timeout", PATIENCE])
            .args(more);
        self.start("worker", command)
    }

    fn next_name(&self, role: &str) -> String {
        format!("{role}-{}", self.started)
    }

    fn start(&mut self, role: &str, mut command: Command) -> Result<String> {
        let name = self.next_name(role);
        self.started += 1;
        let child = command
            .arg("--bound")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for this process alone.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name} ({})", self.program.display()))?;
        let (signals, orders) = mpsc::unbounded_channel();
        self.signals.insert(name.clone(), signals);
        self.tasks.spawn(keep(name.clone(), child, orders, self.voice.clone()));
        Ok(name)
    }

    /// Sends a signal to a process that has not been heard to have ended.
    pub(super) fn signal(&self, name: &str, signal: Signal) {
        if let Some(signals) = self.signals.get(name) {
            // Fails only when the process is gone, which will be heard of.
            let _ = signals.send(signal);
        }
    }

    /// Takes notice that a process has ended.
    pub(super) fn forget(&mut self, name: &str) {
        self.signals.remove(name);
    }

    /// Kills what there is, and waits until it is gone.
    pub(super) async fn end(mut self) {
        for signals in self.signals.values() {
            let _ = signals.send(Signal::SIGKILL);
        }
        while self.tasks.join_next().await.is_some() {}
    }
}

/// The life of one process.
async fn keep(
    name: String,
    mut child: Child,
    mut orders: mpsc::UnboundedReceiver<Signal>,
    voice: mpsc::UnboundedSender<Said>,
) {
    // Kept open: waiting for the child would close it.
    let stdin = child.stdin.take();
    let mut reading = JoinSet::new();
    if let Some(stdout) = child.stdout.take() {
        let voice = voice.clone();
        reading.spawn(each_line(stdout, move |text| {
            // Nobody listens any more: the run is over.
            let _ = voice.send(Said::Line { at: Instant::now(), text });
        }));
    }
    let (lines, mut kept) = mpsc::unbounded_channel();
    if let Some(stderr) = child.stderr.take() {
        reading.spawn(each_line(stderr, move |text| {
            let _ = lines.send(text);
        }));
    }
    let mut tail = VecDeque::new();
    let mut note = |line| {
        tail.push_back(line);
        if tail.len() > TAIL {
            tail.pop_front();
        }
    };
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Some(order) = orders.recv() => {
                if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()) {
                    // Fails only for a process that has just ended.
                    let _ = signal::kill(Pid::from_raw(id), order);
                }
            }
            Some(line) = kept.recv() => note(line),
        }
    };
    let at = Instant::now();
    drop(stdin);
    // Its last words come before the news of its end.
    while reading.join_next().await.is_some() {}
    while let Ok(line) = kept.try_recv() {
        note(line);
    }
    if let Ok(status) = status {
        let _ = voice.send(Said::Ended { at, name, status, tail });
    }
}

async fn each_line(pipe: impl AsyncRead + Unpin, mut take: impl FnMut(String)) {
    let mut lines = BufReader::new(pipe).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        take(line);
    }
}

/// An address that nobody listens on and that no connection gets by chance while the coordinator is
/// away: outside of the ports that the system gives to connections.
fn free_address() -> Result<SocketAddr> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let lowest = range.ok().and_then(|text| text.split_whitespace().next()?.parse().ok());
    let end: u16 = lowest.unwrap_or(32_768).max(2048);
    // Others that look for a port at the same time begin elsewhere.
    let begin = 1024 + (std::process::id() % u32::from(end - 1024)) as u16;
    for port in (begin..end).chain(1024..begin) {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no port of {} is free for the coordinator", Ipv4Addr::LOCALHOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coordinators_port_is_none_that_connections_get() {
        let address = free_address().unwrap();
        assert!(address.ip().is_loopback());
        let connection_port =
            TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(address.port() < connection_port, "{address} {connection_port}");
    }
}
