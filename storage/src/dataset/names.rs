//! What the files of a dataset are called, but for its manifest.
//!
//! The names of shards, tokenizer and progress hold a tag: eight hex digits of the digest of all that
//! decides their bytes. So makers of different things under one dataset's name never write to the same
//! file, and makers of the same thing write the same bytes to it. Whose manifest is put first makes
//! the dataset, and what that does not name is of no use to anybody from then on: see
//! [`super::prepare`]. Datasets that were made before there were tags go on to be read, for a manifest
//! names its files.

use looptrain_proto::Digest;
use serde::Serialize;

use super::Split;

/// Changes when the same documents would be packed into other bytes.
const VERSION: u32 = 2;

/// Names of the files that one maker writes.
#[derive(Clone, Debug)]
pub(super) struct Names {
    tag: String,
}

impl Names {
    /// For files whose bytes `what` decides.
    pub(super) fn of(what: &impl Serialize) -> Self {
        let text = serde_json::to_vec(&(VERSION, what));
        let digest = Digest::of(&text.expect("numbers, texts and digests have a JSON form"));
        let tag = digest.0[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { tag }
    }

    /// A shard, by its number in its split.
    pub(super) fn shard(&self, split: Split, number: u64) -> String {
        format!("{}-{number:05}-{}.arrow", stem(split), self.tag)
    }

    pub(super) fn tokenizer(&self) -> String {
        format!("tokenizer-{}.json", self.tag)
    }

    /// How far the making has come.
    pub(super) fn progress(&self) -> String {
        format!("progress-{}.json", self.tag)
    }

    /// The entries of some shards, while the dataset is being made.
    pub(super) fn segment(&self, split: Split, number: u64) -> String {
        format!("progress-{}-{number:05}-{}.json", stem(split), self.tag)
    }
}

fn stem(split: Split) -> &'static str {
    match split {
        Split::Train => "tokens",
        Split::Validation => "validation",
    }
}

/// Whether a maker calls a file so, of this program or of one before it, whatever its tag.
pub(super) fn is_made(file: &str) -> bool {
    let stem = file.strip_suffix(".arrow").or_else(|| file.strip_suffix(".json"));
    let first = stem.and_then(|stem| stem.split('-').next());
    matches!(first, Some("tokens" | "validation" | "tokenizer" | "progress"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makers_of_different_things_share_no_name_and_those_of_the_same_all_of_them() {
        let all = |names: &Names| {
            let splits = [Split::Train, Split::Validation];
            let of_split = |split| [names.shard(split, 7), names.segment(split, 7)];
            let mut all = splits.map(of_split).concat();
            all.extend([names.tokenizer(), names.progress()]);
            all
        };
        let (one, same, other) = (Names::of(&(1, "a")), Names::of(&(1, "a")), Names::of(&(2, "a")));
        assert_eq!(all(&one), all(&same));
        assert!(all(&one).iter().all(|name| is_made(name) && !all(&other).contains(name)));
        let shard = one.shard(Split::Train, 7);
        assert!(
            shard.starts_with("tokens-00007-")
                && shard.len() == "tokens-00007-01234567.arrow".len()
        );
    }

    #[test]
    fn what_makers_do_not_write_is_not_taken_for_theirs() {
        for old in
            ["tokens-00000.arrow", "tokenizer.json", "progress.json", "progress-tokens-00000.json"]
        {
            assert!(is_made(old), "{old}");
        }
        for foreign in
            ["manifest.json", "README.md", "tokens.txt", "mytokens-00000.arrow", "progress"]
        {
            assert!(!is_made(foreign), "{foreign}");
        }
    }
}
