//! The tutorial, as somebody types it who trusts it: all of its commands in one shell, in an empty folder.

use std::fmt::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::pages::{self, Block};
use crate::support::repository;

/// Far more than it takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(900);

/// A tutorial of fewer blocks is not the one that is meant.
const BLOCKS: usize = 15;

/// The name of the file that a block of TOML is to be saved as.
fn file(block: &Block) -> Option<&str> {
    let first = block.text.lines().next()?;
    first.strip_prefix("# FILE: ").filter(|_| block.tag == "toml").map(str::trim)
}

/// One script of all blocks. Before each it notes the block's number, so that the one that fails can be
/// named.
fn script(blocks: &[Block], note: &Path) -> String {
    let mut script = String::from("set -euo pipefail\n");
    for (number, block) in blocks.iter().enumerate() {
        let _ = writeln!(script, "echo {number} > '{}'", note.display());
        match file(block) {
            Some(name) => {
                let end = "END_OF_THE_FILE";
                let _ = writeln!(script, "cat > '{name}' <<'{end}'\n{}{end}", block.text);
            }
            None if block.tag == "sh" => script.push_str(&block.text),
            None => {}
        }
    }
    script
}

/// Processes that work in this folder, with their command lines.
fn processes_in(folder: &Path) -> Vec<(u32, String)> {
    let folder = folder.canonicalize().unwrap();
    let process = |entry: std::fs::DirEntry| {
        let id = entry.file_name().to_str()?.parse::<u32>().ok()?;
        let place = std::fs::read_link(entry.path().join("cwd")).ok()?;
        let words = std::fs::read(entry.path().join("cmdline")).ok()?;
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        place.starts_with(&folder).then_some((id, words))
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(process).collect()
}

/// How a script ended: nothing to complain of, or what.
fn run(blocks: &[Block], limit: Duration) -> Result<(), String> {
    let scratch = tempfile::tempdir().unwrap();
    let [folder, programs, note, output, text] =
        ["folder", "programs", "note", "output", "script"].map(|name| scratch.path().join(name));
    for directory in [&folder, &programs] {
        std::fs::create_dir(directory).unwrap();
    }
    let program = env!("CARGO_BIN_EXE_looptrain-under-test");
    std::os::unix::fs::symlink(program, programs.join("looptrain")).unwrap();
    std::fs::write(&text, script(blocks, &note)).unwrap();
    let said = std::fs::File::create(&output).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = Command::new("bash")
        .arg(&text)
        .current_dir(&folder)
        .env("PATH", format!("{}:{path}", programs.display()))
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(said.try_clone().unwrap())
        .stderr(said)
        .process_group(0)
        .spawn()
        .unwrap();
    let begin = Instant::now();
    let status = loop {
        match shell.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if begin.elapsed() > limit => break None,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    // Whatever it has started and not ended is ended now.
    let left = processes_in(&folder);
    for (process, _) in &left {
        crate::support::signal_if_there(*process, "KILL");
    }
    let _ = shell.kill();
    let _ = shell.wait();
    let number = std::fs::read_to_string(&note).unwrap_or_default().trim().parse::<usize>();
    let block = number.ok().and_then(|number| blocks.get(number));
    let block = block.map_or(String::new(), |it| format!("line {}:\n{}", it.line, it.text));
    let output = std::fs::read(&output).unwrap();
    let output = String::from_utf8_lossy(&output);
    match status {
        None => Err(format!("it did not end within {limit:?}, at {block}\n{output}")),
        Some(status) if !status.success() => Err(format!("{status} at {block}\n{output}")),
        Some(_) if !left.is_empty() => Err(format!("it left processes behind: {left:?}\n{output}")),
        Some(_) => Ok(()),
    }
}

#[test]
fn the_tutorial_runs_from_its_first_line_to_its_last() {
    let page = repository().join("docs/tutorial.md");
    let text = pages::read(&page);
    let (blocks, _) = pages::parts(&text);
    let commands = blocks.iter().filter(|block| block.tag == "sh").count();
    assert!(commands >= BLOCKS, "only {commands} blocks of commands");
    assert!(blocks.iter().any(|block| file(block).is_some()), "no file is written");
    run(&blocks, LIMIT).unwrap_or_else(|complaint| panic!("docs/tutorial.md: {complaint}"));
}

fn blocks(text: &str) -> Vec<Block> {
    pages::parts(text).0
}

#[test]
fn a_tutorial_that_does_not_work_is_told_with_the_block_that_fails() {
    let limit = Duration::from_secs(60);
    let good = blocks(
        "```toml\n# FILE: a.toml\nx = 1\n```\n```text\nno command\n```\n```sh\ngrep 'x = 1' a.toml\nY=1\n```\n\
         ```sh\ntest $Y = 1 && looptrain --version\n```\n",
    );
    assert_eq!(run(&good, limit), Ok(()));
    let bad =
        blocks("```sh\ntrue\n```\n\n```sh\necho told\nfalse | cat\n```\n```sh\necho never\n```\n");
    let error = run(&bad, limit).unwrap_err();
    assert!(error.contains("line 5:") && error.contains("told"), "{error}");
    assert!(!error.contains("never"), "{error}");
    let left = run(&blocks("```sh\nsleep 100 &\n```\n"), limit).unwrap_err();
    assert!(left.contains("left processes behind") && left.contains("sleep 100"), "{left}");
    let slow = run(&blocks("```sh\nsleep 100\n```\n"), Duration::from_millis(300)).unwrap_err();
    assert!(slow.contains("did not end") && slow.contains("line 1:"), "{slow}");
}
