//! Commands in documents, in comments of examples, and in what operators deploy: the program's own parser
//! has to understand each of them.

use std::process::Command;

use super::{pages, shell};
use crate::support::repository;

/// The words behind the program's name, when a command is one of the program.
fn words(command: &[String]) -> Option<&[String]> {
    let named = |words: &[&str]| {
        command.len() > words.len() && command.iter().zip(words).all(|(a, b)| a == b)
    };
    if named(&["looptrain"]) {
        return Some(&command[1..]);
    }
    named(&["cargo", "run", "--release", "--"]).then(|| &command[4..])
}

/// All of them, with where they stand.
fn documented() -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let mut add = |place: &str, text: &str| {
        for command in shell::commands(text) {
            if let Some(words) = words(&command) {
                found.push((place.to_owned(), words.to_vec()));
            }
        }
    };
    for page in pages::all() {
        let text = pages::read(&page);
        for block in pages::parts(&text).0.iter().filter(|block| block.tag == "sh") {
            add(&format!("{}:{}", pages::name(&page), block.line), &block.text);
        }
    }
    for example in pages::below(&repository().join("examples"), "toml") {
        let text = pages::read(&example);
        // Commands of a comment are indented.
        let lines = text.lines().filter_map(|line| line.strip_prefix("#   "));
        add(&pages::name(&example), &lines.collect::<Vec<_>>().join("\n"));
    }
    found
}

#[track_caller]
fn understood(commands: &[(String, Vec<String>)]) {
    let mut wrong = Vec::new();
    for (place, words) in commands {
        if let Err(error) = looptrain::check_command_line(words) {
            wrong.push(format!("{place}: looptrain {}\n{error}", words.join(" ")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_program_understands_every_command_of_the_documents() {
    let commands = documented();
    understood(&commands);
    assert!(commands.len() >= 100, "only {} commands were found", commands.len());
    let of = |begin: &str| commands.iter().filter(|(place, _)| place.starts_with(begin)).count();
    for place in ["README.md", "docs/data.md", "docs/models.md", "docs/spec.md", "examples/"] {
        assert!(of(place) > 0, "no command of {place} was found");
    }
}

#[test]
fn a_command_that_the_program_does_not_know_is_told() {
    for wrong in
        ["train", "train a.toml --worker 2", "coordinator a.toml --listen HOST:7400", "tran"]
    {
        let words: Vec<String> = wrong.split(' ').map(str::to_owned).collect();
        let error = looptrain::check_command_line(&words).unwrap_err();
        assert!(error.contains("error: "), "{wrong}: {error}");
    }
}

#[test]
fn the_program_understands_every_command_that_is_deployed() {
    let checks = repository().join("ops/checks");
    let mut command = Command::new("python3");
    command.arg(&checks).arg("--commands").env("PYTHONDONTWRITEBYTECODE", "1");
    // With these it also tells what is in manifests.
    if let Some(tools) = std::env::var_os("LOOPTRAIN_TEST_DEPLOYMENT") {
        let bin = std::path::Path::new(&tools).join("bin");
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", bin.display())).env("PYTHONPATH", &tools);
    }
    let end = command.output().unwrap();
    let said = String::from_utf8_lossy(&end.stderr);
    assert!(end.status.success(), "{said}");
    let commands: Vec<(String, Vec<String>)> = String::from_utf8(end.stdout)
        .unwrap()
        .lines()
        .map(|line| ("ops".to_owned(), serde_json::from_str(line).unwrap()))
        .collect();
    understood(&commands);
    assert!(commands.len() >= 6, "only {} commands were found: {said}", commands.len());
}
