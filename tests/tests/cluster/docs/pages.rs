//! Pages of Markdown: which there are, and what is in them.

use std::path::{Path, PathBuf};

use crate::support::repository;

/// A fenced block.
pub(super) struct Block {
    /// What stands behind the fence.
    pub(super) tag: String,
    /// The line of the fence, counted from 1.
    pub(super) line: usize,
    pub(super) text: String,
}

/// The README, all of `docs/`, and what is written beside examples.
pub(super) fn all() -> Vec<PathBuf> {
    let root = repository();
    let mut pages = vec![root.join("README.md")];
    for folder in ["docs", "examples"] {
        pages.extend(below(&root.join(folder), "md"));
    }
    assert!(pages.len() >= 8, "{pages:?}");
    pages
}

/// Files below a folder with this ending, in order.
pub(super) fn below(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    let files = |path: PathBuf| match path.is_dir() {
        true => below(&path, ending),
        false if path.extension().is_some_and(|found| found == ending) => vec![path],
        false => Vec::new(),
    };
    entries.into_iter().flat_map(files).collect()
}

pub(super) fn read(page: &Path) -> String {
    std::fs::read_to_string(page).unwrap_or_else(|error| panic!("{}: {error}", page.display()))
}

/// The page as messages name it.
pub(super) fn name(page: &Path) -> String {
    page.strip_prefix(repository()).unwrap_or(page).display().to_string()
}

/// The fenced blocks of a page, and the lines outside of them with their numbers.
pub(super) fn parts(text: &str) -> (Vec<Block>, Vec<(usize, &str)>) {
    let (mut blocks, mut prose) = (Vec::<Block>::new(), Vec::new());
    let mut is_open = false;
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line)) {
        match (line.trim_start().strip_prefix("```"), is_open) {
            (Some(_), true) => is_open = false,
            (Some(tag), false) => {
                is_open = true;
                blocks.push(Block { tag: tag.trim().into(), line: number, text: String::new() });
            }
            (None, true) => {
                let block = blocks.last_mut().unwrap();
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, false) => prose.push((number, line)),
        }
    }
    assert!(!is_open, "a fence is not closed");
    (blocks, prose)
}

#[test]
fn blocks_and_prose_are_told_apart() {
    let (blocks, prose) = parts("one\n```sh\ncat x\n```\ntwo\n```text\n```\n");
    assert_eq!(prose, [(1, "one"), (5, "two")]);
    let blocks: Vec<_> =
        blocks.iter().map(|it| (it.tag.as_str(), it.line, it.text.as_str())).collect();
    assert_eq!(blocks, [("sh", 2, "cat x\n"), ("text", 6, "")]);
}
