//! Reading shards block by block: how much is read, from where, and what happens to damage.

use std::time::Duration;

use object_store::memory::InMemory;
use object_store::throttle::{ThrottleConfig, ThrottledStore};

use super::super::shard;
use super::*;

/// Tokens of a shard of a few megabytes.
fn tokens() -> Vec<u32> {
    (0..1_500_000).map(|i| i * 31 % 50_021).collect()
}

/// A store with one shard in it.
struct Fixture {
    store: Store,
    file: Bytes,
    key: &'static str,
}

impl Fixture {
    async fn new() -> Self {
        Self::over(Store::open("memory://").unwrap()).await
    }

    async fn over(store: Store) -> Self {
        let tokens = tokens();
        let file = shard::encode(TokenType::U16, &tokens, &vec![false; tokens.len()]).unwrap();
        let key = "datasets/d/tokens-00000.arrow";
        store.put(key, file.clone()).await.unwrap();
        Self { store, file, key }
    }

    fn shard(&self) -> ShardFile<'_> {
        ShardFile {
            store: &self.store,
            key: self.key,
            digest: Digest::of(&self.file),
            bytes: self.file.len() as u64,
            tokens: 1_500_000,
            dtype: TokenType::U16,
            dataset: "datasets/d",
        }
    }

    async fn read(&self, reading: &Reading, first: u64, count: u64) -> Result<Vec<u32>> {
        read(reading, self.shard(), first, count).await
    }

    /// Changes a byte of the shard in the store.
    async fn damage(&self, place: usize) {
        let mut damaged = self.file.to_vec();
        damaged[place] ^= 1;
        self.store.put(self.key, damaged).await.unwrap();
    }
}

async fn read(reading: &Reading, shard: ShardFile<'_>, first: u64, count: u64) -> Result<Vec<u32>> {
    let (mut pieces, mut out) = (Vec::new(), Vec::new());
    reading.pieces(shard, first, count, &mut pieces).await?;
    for piece in pieces {
        let Piece::Block { dtype, bytes } = piece else { panic!("no local file: {piece:?}") };
        dtype.extend(&mut out, &bytes);
    }
    Ok(out)
}

fn with_disk(directory: &std::path::Path) -> Reading {
    Reading::new(ReadingOptions { disk: Some((directory.to_owned(), 1 << 30)), memory: 0 })
}

#[tokio::test]
async fn a_sequence_costs_its_blocks_and_the_end_of_the_shard_and_not_the_shard() {
    let fixture = Fixture::new().await;
    let reading = Reading::default();
    let read = fixture.read(&reading, 700_000, 2049).await.unwrap();
    assert_eq!(read, tokens()[700_000..702_049]);
    let counts = reading.counts();
    assert_eq!(counts.store, 2, "the end, and a block: {counts:?}");
    assert!(counts.store_bytes <= 3 * BLOCK, "{counts:?}");
    assert!(fixture.file.len() as u64 > 40 * BLOCK);

    let again = fixture.read(&reading, 700_500, 2049).await.unwrap();
    assert_eq!(again, tokens()[700_500..702_549]);
    assert_eq!(reading.counts().store, 2, "the block is in memory");
    assert_eq!(reading.counts().memory, 1);
}

#[tokio::test]
async fn all_of_a_shard_reads_as_it_was_written_whatever_the_memory() {
    let fixture = Fixture::new().await;
    for memory in [0, 200_000, MEMORY] {
        let reading = Reading::new(ReadingOptions { memory, disk: None });
        let mut all = Vec::new();
        for first in (0..1_500_000).step_by(49_999) {
            let count = (1_500_000 - first).min(49_999);
            all.extend(fixture.read(&reading, first, count).await.unwrap());
        }
        assert!(all == tokens(), "with {memory} bytes of memory");
    }
}

#[tokio::test]
async fn a_shard_of_before_that_has_no_hashes_is_read_whole_once() {
    let mut fixture = Fixture::new().await;
    fixture.file = shard::encode_as_before(&tokens());
    fixture.store.put(fixture.key, fixture.file.clone()).await.unwrap();
    let reading = Reading::default();
    for first in [0, 65_000, 1_400_000] {
        let read = fixture.read(&reading, first, 2000).await.unwrap();
        assert_eq!(read, tokens()[first as usize..first as usize + 2000]);
    }
    let counts = reading.counts();
    assert_eq!(counts.store, 1 + 1 + 4, "its end, all of it, and blocks: {counts:?}");
    fixture.damage(100_000).await;
    let error = fixture.read(&Reading::default(), 0, 10).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { expected, .. } if expected == fixture.shard().digest));
}

#[tokio::test]
async fn a_damaged_block_is_named_with_its_bytes_and_the_others_can_be_read() {
    let fixture = Fixture::new().await;
    let reading = Reading::default();
    fixture.damage(5 * BLOCK as usize + 77).await;
    let error = fixture.read(&reading, 5 * BLOCK / 2, 100).await.unwrap_err().to_string();
    let place = format!("(bytes {} to {})", 5 * BLOCK, 6 * BLOCK - 1);
    for part in [fixture.key, &place, "is damaged", "restore the file"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(reading.counts().damaged, 1);
    fixture.read(&reading, 0, 100).await.unwrap();
    // Repaired: it is read again, not remembered as damaged.
    fixture.store.put(fixture.key, fixture.file.clone()).await.unwrap();
    fixture.read(&reading, 5 * BLOCK / 2, 100).await.unwrap();
}

#[tokio::test]
async fn a_shard_that_is_not_the_one_of_the_manifest_is_refused() {
    let fixture = Fixture::new().await;
    let other = ShardFile { digest: Digest::of(b"other"), ..fixture.shard() };
    let error = read(&Reading::default(), other, 0, 10).await.unwrap_err();
    let found = fixture.shard().digest;
    assert!(matches!(error, Error::Corrupt { found: f, .. } if f == found), "{error}");
    let longer = ShardFile { tokens: 1_500_001, ..fixture.shard() };
    let error = read(&Reading::default(), longer, 0, 10).await.unwrap_err();
    assert!(error.to_string().contains("1500000 tokens, the manifest says 1500001"), "{error}");
    let shorter = ShardFile { bytes: fixture.file.len() as u64 + 5, ..fixture.shard() };
    assert!(read(&Reading::default(), shorter, 0, 10).await.is_err());
}

#[tokio::test]
async fn what_one_process_has_read_another_finds_on_the_disk_of_the_machine() {
    let fixture = Fixture::new().await;
    let directory = tempfile::tempdir().unwrap();
    let one = with_disk(directory.path());
    fixture.read(&one, 700_000, 2049).await.unwrap();
    assert_eq!((one.counts().store, one.counts().disk), (2, 0));
    let two = with_disk(directory.path());
    let read = fixture.read(&two, 700_000, 2049).await.unwrap();
    assert_eq!(read, tokens()[700_000..702_049]);
    assert_eq!((two.counts().store, two.counts().disk), (0, 2), "the end, and a block");
}

#[tokio::test]
async fn a_block_that_is_damaged_on_the_disk_is_read_from_the_store_again() {
    let fixture = Fixture::new().await;
    let directory = tempfile::tempdir().unwrap();
    fixture.read(&with_disk(directory.path()), 700_000, 100).await.unwrap();
    for subdirectory in std::fs::read_dir(directory.path().join("blocks")).unwrap() {
        for file in std::fs::read_dir(subdirectory.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            // Neither the end's length nor its form tells of this, only its hash.
            bytes[1000] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    for (damaged, disk) in [(2, 0), (0, 2)] {
        let reading = with_disk(directory.path());
        let read = fixture.read(&reading, 700_000, 100).await.unwrap();
        assert_eq!(read, tokens()[700_000..700_100]);
        assert_eq!((reading.counts().damaged, reading.counts().disk), (damaged, disk));
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_read_is_overtaken_by_a_second_one_and_counted() {
    let slow = Arc::new(ThrottledStore::new(InMemory::new(), ThrottleConfig::default()));
    let fixture = Fixture::over(Store::simulated(Arc::clone(&slow) as _, "slow://")).await;
    assert!(fixture.store.is_remote());
    let reading = Reading::default();
    for block in 0..20 {
        fixture.read(&reading, block * BLOCK / 2, 1).await.unwrap();
    }
    assert_eq!(reading.counts().hedged, 0, "{:?}", reading.counts());
    let stuck = Duration::from_secs(3600);
    slow.config_mut(|config| config.wait_get_per_call = stuck);
    let wakes = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        // What has begun sleeps on; what begins now does not.
        slow.config_mut(|config| config.wait_get_per_call = Duration::ZERO);
    };
    let (read, ()) = tokio::join!(fixture.read(&reading, 30 * BLOCK / 2, 100), wakes);
    assert_eq!(read.unwrap(), tokens()[30 * BLOCK as usize / 2..][..100]);
    let counts = reading.counts();
    assert_eq!((counts.hedged, counts.overtaken), (1, 1), "{counts:?}");
}
