//! A scratch store, a small spec, and the program as a user runs it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// No run of these tests takes nearly this long.
const PATIENCE: Duration = Duration::from_secs(300);

/// Nor does anything that happens by itself, however busy the machine is.
pub(crate) const SOON: Duration = Duration::from_secs(90);

/// The root of the repository.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A directory of its own for each test: the store, and the spec.
pub(crate) struct Scratch {
    directory: TempDir,
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl End {
    /// The last line of stdout.
    pub(crate) fn last_line(&self) -> &str {
        self.stdout.lines().last().unwrap_or_default()
    }

    /// The value of `key=` in the last line.
    #[track_caller]
    pub(crate) fn field(&self, key: &str) -> &str {
        let prefix = format!("{key}=");
        self.last_line()
            .split_whitespace()
            .find_map(|word| word.strip_prefix(&prefix))
            .unwrap_or_else(|| panic!("no {key}= in {self:?}"))
    }

    /// Asserts an orderly end after the last step.
    #[track_caller]
    pub(crate) fn done(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert!(self.last_line().starts_with("done "), "{self:?}");
        self
    }

    /// Asserts an orderly end before the last step.
    #[track_caller]
    pub(crate) fn stopped(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert!(self.last_line().starts_with("stopped "), "{self:?}");
        self
    }

    /// The step at which it ended.
    #[track_caller]
    pub(crate) fn step(&self) -> u64 {
        self.field("step").parse().unwrap()
    }

    /// Asserts a failure whose message is one line with all of `words` in it.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        let errors: Vec<&str> =
            self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "one line that begins with `error: `: {self:?}");
        for word in words {
            assert!(errors[0].contains(word), "`{word}` is missing in: {}", errors[0]);
        }
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().unwrap();
        std::fs::write(directory.path().join("spec.toml"), SPEC.replace("SOURCES", &text()))
            .unwrap();
        Self { directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The lines of the run's log, in order. A writer that is killed may leave the file it was
    /// writing under a name of its own (`...jsonl#1`), which is no object of the store.
    pub(crate) fn metrics(&self) -> Vec<Value> {
        let mut files: Vec<_> = std::fs::read_dir(self.path("store/runs/small/metrics"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
            .collect();
        files.sort();
        let read = |file: &PathBuf| std::fs::read_to_string(file).unwrap();
        let text: String = files.iter().map(read).collect();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The file of a dataset whose name begins so; makers put a tag of their own behind it. `None` while
    /// there is none.
    pub(crate) fn file_of(&self, dataset: &str, begin: &str) -> Option<PathBuf> {
        let begins = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with(begin) && !name.contains('#')
        };
        let entries = std::fs::read_dir(self.path(&format!("store/datasets/{dataset}"))).ok()?;
        let mut files = entries.map(|entry| entry.unwrap().path()).filter(begins);
        let file = files.next();
        assert_eq!(files.next(), None, "more than one file {begin}");
        file
    }

    /// A `looptrain` command in this directory.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.command_by(&[], arguments)
    }

    /// The same, run by another program, such as `ip netns exec NAME`.
    pub(crate) fn command_by(&self, by: &[&str], arguments: &[&str]) -> Command {
        let mut words = by.to_vec();
        words.push(env!("CARGO_BIN_EXE_looptrain-under-test"));
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .args(arguments)
            .current_dir(self.directory.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end.
    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> End {
        Running::start(self.command(arguments)).end()
    }

    /// `looptrain train spec.toml` with more arguments, to its end.
    #[track_caller]
    pub(crate) fn train(&self, arguments: &[&str]) -> End {
        self.run(&[&["train", "spec.toml"], arguments].concat())
    }
}

/// A program that is running.
pub(crate) struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
    stderr: String,
    stdout: Option<std::thread::JoinHandle<String>>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        let mut pipe = child.stdout.take().unwrap();
        let stdout = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = pipe.read_to_string(&mut text);
            text
        });
        Self { child, lines, stderr: String::new(), stdout: Some(stdout) }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line on stderr that `wanted` accepts.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let begin = Instant::now();
        loop {
            match self.lines.recv_timeout(PATIENCE.saturating_sub(begin.elapsed())) {
                Ok(line) => {
                    self.stderr.push_str(&line);
                    self.stderr.push('\n');
                    if wanted(&line) {
                        return line;
                    }
                }
                Err(error) => panic!("the line never came ({error}); stderr: {}", self.stderr),
            }
        }
    }

    /// Takes no more notice of the lines that are there already.
    pub(crate) fn skip(&mut self) {
        while let Ok(line) = self.lines.try_recv() {
            self.stderr.push_str(&line);
            self.stderr.push('\n');
        }
    }

    /// Sends a signal, such as `INT`.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.id(), name);
    }

    /// Waits for the end.
    #[track_caller]
    pub(crate) fn end(mut self) -> End {
        let begin = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if begin.elapsed() > PATIENCE => panic!("it never ended: {}", self.stderr),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let stdout = self.stdout.take().unwrap().join().unwrap();
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(20)) {
            self.stderr.push_str(&line);
            self.stderr.push('\n');
        }
        End { code: status.code(), stdout, stderr: std::mem::take(&mut self.stderr) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal to a process.
#[track_caller]
pub(crate) fn signal(process: u32, name: &str) {
    assert!(signal_if_there(process, name), "cannot send {name} to {process}");
}

/// Sends a signal to a process, which may be gone; whether it was there.
pub(crate) fn signal_if_there(process: u32, name: &str) -> bool {
    let kill = format!("kill -{name} {process} 2>/dev/null");
    Command::new("sh").args(["-c", &kill]).status().unwrap().success()
}

/// Process ids of the children of `parent`.
pub(crate) fn workers_of(parent: u32) -> Vec<u32> {
    std::fs::read_dir(format!("/proc/{parent}/task"))
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<u32>>()
        })
        .collect()
}

/// What the system says a process is doing: `R`unning, `S`leeping, s`T`opped, `Z`ombie, ...;
/// `None` when there is no such process.
pub(crate) fn state(process: u32) -> Option<char> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before it, in parentheses, may hold anything.
    text.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Whether a process has ended, reaped or not, and so have all its threads: until then its ports are
/// taken, also when the first of them is gone.
pub(crate) fn is_gone(process: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task"));
    let others = threads.map_or(0, |all| all.flatten().count().saturating_sub(1));
    others == 0 && matches!(state(process), None | Some('Z' | 'X'))
}

/// Waits for what is to happen soon; how soon depends on what else the machine has to do.
#[track_caller]
pub(crate) fn wait_until(happened: impl Fn() -> bool) {
    let begin = Instant::now();
    while !happened() {
        assert!(begin.elapsed() < SOON, "it has not happened");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The text of the tests: the project's own sources, as a TOML list.
pub(crate) fn text() -> String {
    let folders = ["proto", "storage", "model", "coordinator", "worker", "ops"];
    let paths: Vec<String> =
        folders.iter().map(|name| format!("{:?}", repository().join(name).join("src"))).collect();
    format!("[{}]", paths.join(", "))
}

/// A run of a few seconds, in which nobody is dead for being silent: a busy machine is no fault.
const SPEC: &str = r#"
[run]
name = "small"
store = "file://store"
seed = 3

[cluster]
worker_timeout = 60.0

[model]
hidden_size = 24
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 64
vocab_size = 300

[[datasets]]
name = "sources"

[datasets.source]
paths = SOURCES
extensions = ["rs"]
max_bytes = 400_000
tokenizer_vocabulary = 300
tokenizer_bytes = 100_000
validation_fraction = 0.05

[[stages]]
name = "first"
steps = 8
sequence_length = 24
slots = 6
slot_sequences = 1
loops = 3
entropy_weight = 0.1
learning_rate = { peak = 5e-3, warmup_steps = 2 }

[[stages]]
name = "second"
steps = 6
sequence_length = 40
slots = 5
slot_sequences = 2
loops = 2
entropy_weight = 0.05
rope_base = 40_000.0
learning_rate = { peak = 5e-3, decay_steps = 4, last = 5e-4 }

[checkpoint]
every_steps = 5
keep = 2

[evaluation]
every_steps = 7
sequences = 10

[sample]
tokens = 8
"#;
