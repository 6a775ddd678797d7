//! Manifests for the tests of this module.

use looptrain_proto::{Digest, spec};

use super::{DatasetManifest, ShardEntry, SourceSummary, SplitManifest, TokenType};

/// The manifest of a dataset whose splits hold that many tokens, in a shard each.
pub(super) fn manifest(name: &str, train: u64, validation: u64) -> DatasetManifest {
    let split = |prefix: &str, tokens: u64| {
        let file = format!("{prefix}-00000.arrow");
        let digest = Digest::of(format!("{file} {tokens}").as_bytes());
        let shard = ShardEntry { file, tokens, documents: 1, bytes: 2 * tokens, digest };
        SplitManifest { tokens, documents: 1, bytes: tokens, shards: vec![shard] }
    };
    DatasetManifest {
        version: DatasetManifest::VERSION,
        name: name.to_owned(),
        vocabulary_size: 1000,
        tokenizer: "tokenizer.json".to_owned(),
        tokenizer_digest: Digest::of(b"{}"),
        end_of_text: 0,
        dtype: TokenType::U16,
        train: split("tokens", train),
        validation: split("validation", validation),
        unigram_loss: None,
        source: SourceSummary {
            options: spec::Source::default(),
            files: 0,
            inputs: Vec::new(),
            inputs_digest: None,
            records: 0,
            malformed: 0,
            empty: 0,
            duplicates: 0,
            unreadable: 0,
        },
    }
}
