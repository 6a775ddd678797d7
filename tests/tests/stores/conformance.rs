//! One suite, run against memory, a directory, and a real S3 server; and each of them in a storm.
//!
//! s3s-fs is not among them: it looks whether an object exists and then writes it, so that of
//! racing writers several win.

use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use futures::future::join_all;
use looptrain_storage::{Error, Faults, ObjectInfo, Store};
use tempfile::TempDir;

use crate::seaweed::Seaweed;

/// Writers that race.
const RACERS: usize = 64;

/// All promises of a store below `prefix`.
async fn keeps_its_promises(store: &Store, prefix: &str) {
    store.check_writable().await.unwrap();
    let [basic, large, counter] = ["basic", "large", "counter"].map(|it| format!("{prefix}/{it}"));
    // SeaweedFS takes ten seconds for 64 writers of one object.
    let rounds = if store.url().starts_with("s3://") { 1 } else { 5 };
    let races = async {
        for round in 0..rounds {
            let [create, update] = ["create", "update"].map(|it| format!("{prefix}/{it}/{round}"));
            one_of_64_racing_writers_creates_an_object(store, &create).await;
            one_of_64_racing_writers_updates_an_object(store, &update).await;
        }
    };
    // All at once, on keys of their own: most of the time a server waits for its own locks.
    tokio::join!(
        put_get_range_list_and_delete(store, &basic),
        large_objects(store, &large),
        races,
        no_update_of_a_counter_is_lost(store, &counter)
    );
    assert!(store.delete_prefix(prefix).await.unwrap() > 0);
    if in_storm(store) {
        // Listings do not lack anymore what is there by now.
        tokio::time::sleep(STALE).await;
        store.delete_prefix(prefix).await.unwrap();
    }
    assert!(store.list(prefix).await.unwrap().is_empty());
}

/// Whether a store is one of [`storm`]'s, which its URL says.
fn in_storm(store: &Store) -> bool {
    store.url().contains("storm")
}

/// For so long a listing of a store in a storm may lack what was written.
const STALE: Duration = Duration::from_secs(3);

/// What is there below a prefix, by its keys.
async fn listed(store: &Store, prefix: &str) -> Vec<ObjectInfo> {
    if in_storm(store) {
        tokio::time::sleep(STALE).await;
    }
    store.list(prefix).await.unwrap()
}

async fn put_get_range_list_and_delete(store: &Store, prefix: &str) {
    let key = |name: &str| format!("{prefix}/{name}");
    assert_eq!(store.get_opt(&key("one")).await.unwrap(), None);
    assert_eq!(store.size(&key("one")).await.unwrap(), None);
    let missing = store.get(&key("one")).await.unwrap_err();
    assert!(matches!(missing, Error::NotFound { .. }), "{missing}");
    assert!(missing.to_string().contains(&key("one")), "{missing}");
    store.delete(&key("one")).await.unwrap();

    for (name, body) in [("two", "2"), ("one", "first"), ("deep/er", ""), ("one#1+ä &=", "odd")] {
        store.put(&key(name), body).await.unwrap();
        assert_eq!(store.get(&key(name)).await.unwrap(), body);
    }
    store.put(&key("one"), "0123456789").await.unwrap();
    assert_eq!(store.get(&key("one")).await.unwrap(), "0123456789", "over an older one");
    assert_eq!(store.size(&key("one")).await.unwrap(), Some(10));
    assert_eq!(store.get_range(&key("one"), 3..7).await.unwrap(), "3456");
    assert_eq!(store.get_range(&key("one"), 9..10).await.unwrap(), "9");
    assert!(store.get_range(&key("one"), 5..11).await.is_err(), "past the end");
    assert!(store.get_range(&key("none"), 0..1).await.is_err());

    store.put(&format!("{prefix}-beside"), "not below").await.unwrap();
    let listed = listed(store, prefix).await;
    let keys: Vec<&str> = listed.iter().map(|object| object.key.as_str()).collect();
    let expected = ["deep/er", "one", "one#1+ä &=", "two"].map(key);
    assert_eq!(keys, expected);
    let sizes: Vec<u64> = listed.iter().map(|object| object.size).collect();
    assert_eq!(sizes, [0, 10, 3, 1]);
    for object in &listed {
        let age = object.modified.elapsed().unwrap_or_default().as_secs();
        assert!(age < 600, "{object:?}");
    }
    store.delete(&key("two")).await.unwrap();
    assert_eq!(store.get_opt(&key("two")).await.unwrap(), None);
    store.delete(&format!("{prefix}-beside")).await.unwrap();
}

/// In parts, where the store knows them.
async fn large_objects(store: &Store, key: &str) {
    let body = |salt: usize| -> Vec<u8> {
        (0..(20 << 20) + 17).map(|index: usize| ((index * 31 + salt) % 251) as u8).collect()
    };
    for salt in [0, 7] {
        let bytes = body(salt);
        store.put_large(key, bytes.clone()).await.unwrap();
        assert_eq!(store.size(key).await.unwrap(), Some(bytes.len() as u64));
        let chunks: Vec<Bytes> = store.stream(key, bytes.len() as u64).try_collect().await.unwrap();
        assert!(chunks.concat() == bytes, "it comes back as it was");
        let middle = store.get_range(key, (8 << 20) - 3..(8 << 20) + 3).await.unwrap();
        assert_eq!(middle, bytes[(8 << 20) - 3..(8 << 20) + 3]);
    }
    let listed = listed(store, key.rsplit_once('/').unwrap().0).await;
    let named: Vec<&str> = listed.iter().map(|object| object.key.as_str()).collect();
    assert!(named.contains(&key), "{named:?}");
    store.put_large(key, "small").await.unwrap();
    assert_eq!(store.get(key).await.unwrap(), "small");
}

/// The writers that were told that they won.
async fn race(
    writers: impl Iterator<Item = impl Future<Output = bool> + Send + 'static>,
) -> Vec<usize> {
    let racers: Vec<_> = writers.map(tokio::spawn).collect();
    let won = join_all(racers).await;
    won.into_iter().enumerate().filter_map(|(index, won)| won.unwrap().then_some(index)).collect()
}

async fn one_of_64_racing_writers_creates_an_object(store: &Store, key: &str) {
    let winners = race((0..RACERS).map(|writer| {
        let (store, key) = (store.clone(), key.to_owned());
        async move { store.put_if_absent(&key, format!("writer {writer}")).await.unwrap() }
    }));
    one_winner(store, key, winners.await).await;
}

async fn one_of_64_racing_writers_updates_an_object(store: &Store, key: &str) {
    store.put(key, "before").await.unwrap();
    let (bytes, seen) = store.get_versioned(key).await.unwrap().unwrap();
    assert_eq!(bytes, "before");
    let winners =
        race(
            (0..RACERS).map(|writer| {
                let (store, key, seen) = (store.clone(), key.to_owned(), seen.clone());
                async move {
                    store.put_if_unchanged(&key, format!("writer {writer}"), &seen).await.unwrap()
                }
            }),
        );
    one_winner(store, key, winners.await).await;
    store.delete(key).await.unwrap();
    assert!(
        !store.put_if_unchanged(key, "late", &seen).await.unwrap(),
        "there is nothing to update"
    );
    assert_eq!(store.get_opt(key).await.unwrap(), None);
}

/// What is there is the winner's. In a storm the winner may have been told that it was not written,
/// and then finds its own object in the way: there is no other winner then.
async fn one_winner(store: &Store, key: &str, winners: Vec<usize>) {
    let there = store.get(key).await.unwrap();
    let there = std::str::from_utf8(&there).unwrap();
    assert!(there.starts_with("writer "), "somebody has written: {there}");
    match winners[..] {
        [winner] => assert_eq!(there, format!("writer {winner}")),
        [] if in_storm(store) => {}
        _ => panic!("{} of {RACERS} won: {winners:?}; there is {there}", winners.len()),
    }
}

async fn no_update_of_a_counter_is_lost(store: &Store, key: &str) {
    store.put(key, "0").await.unwrap();
    let counters = (0..8).map(|_| {
        let (store, key) = (store.clone(), key.to_owned());
        tokio::spawn(async move {
            let mut told = 0;
            while told < 10 {
                let (bytes, seen) = store.get_versioned(&key).await.unwrap().unwrap();
                let count: u64 = std::str::from_utf8(&bytes).unwrap().parse().unwrap();
                let next = (count + 1).to_string();
                told += u64::from(store.put_if_unchanged(&key, next, &seen).await.unwrap());
            }
        })
    });
    for counter in join_all(counters).await {
        counter.unwrap();
    }
    let count: u64 = std::str::from_utf8(&store.get(key).await.unwrap()).unwrap().parse().unwrap();
    // In a storm an update may be made and denied, and is made once more.
    match in_storm(store) {
        true => assert!(count >= 80, "{count}"),
        false => assert_eq!(count, 80),
    }
}

/// The same store behind faults; its URL says so.
fn storm(store: Store, seed: u64) -> Store {
    store.with_faults(Faults::new(seed, 0.15))
}

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    let store = Store::open("memory://").unwrap();
    keeps_its_promises(&store, "all").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory() {
    let directory = TempDir::new().unwrap();
    let url = format!("file://{}", directory.path().display());
    keeps_its_promises(&Store::open(&url).unwrap(), "all").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_in_a_storm() {
    let store = Store::open("memory://storm").unwrap();
    keeps_its_promises(&storm(store, 5), "all").await;
}

#[test]
fn seaweedfs() {
    let Some(seaweed) = Seaweed::start() else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let open = |url: &str| Store::open_with(url, seaweed.variables()).unwrap();
    runtime.block_on(async {
        let (plain, stormy) = (open("s3://lab/some/where"), storm(open("s3://lab/storm"), 3));
        tokio::join!(keeps_its_promises(&plain, "all"), keeps_its_promises(&stormy, "all"));
        assert!(open("s3://lab").list("").await.unwrap().is_empty(), "nothing is left");
    });
}
