//! What every store does, in a directory and in memory; and what opening one says.

#![allow(clippy::unwrap_used)]

use super::*;

fn stores() -> (tempfile::TempDir, Vec<Store>) {
    let directory = tempfile::tempdir().unwrap();
    let file = Store::open(&format!("file://{}", directory.path().display())).unwrap();
    (directory, vec![file, Store::open("memory://").unwrap()])
}

#[tokio::test]
async fn objects_are_written_read_listed_and_deleted() {
    for store in stores().1 {
        store.put("a/b/2", "two").await.unwrap();
        store.put("a/b/1", "one").await.unwrap();
        store.put("a/bc", "other").await.unwrap();
        assert_eq!(store.get("a/b/2").await.unwrap(), "two");
        assert_eq!(store.get_opt("a/b/3").await.unwrap(), None);
        let keys: Vec<_> = store.list("a/b").await.unwrap().into_iter().map(|o| o.key).collect();
        assert_eq!(keys, ["a/b/1", "a/b/2"]);
        assert_eq!(store.delete_prefix("a/b").await.unwrap(), 2);
        store.delete("a/b/1").await.unwrap();
        assert!(store.list("a/b").await.unwrap().is_empty());
        assert!(store.list("nowhere").await.unwrap().is_empty());
        assert_eq!(store.get("a/bc").await.unwrap(), "other");
    }
}

#[tokio::test]
async fn a_missing_object_is_named_with_its_url() {
    for store in stores().1 {
        let error = store.get("runs/x").await.unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
        assert!(error.to_string().starts_with(store.url()), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_64_racing_writers_one_wins() {
    for store in stores().1 {
        let racers = (0..64_u8).map(|writer| {
            let store = store.clone();
            tokio::spawn(async move { store.put_if_absent("k", vec![writer]).await.unwrap() })
        });
        let won = futures::future::join_all(racers).await;
        let winners: Vec<usize> = won
            .iter()
            .enumerate()
            .filter_map(|(i, won)| won.as_ref().unwrap().then_some(i))
            .collect();
        assert_eq!(winners.len(), 1);
        assert_eq!(store.get("k").await.unwrap()[..], [winners[0] as u8]);
    }
}

#[tokio::test]
async fn what_a_killed_writer_left_is_swept_when_it_is_old_and_objects_stay() {
    let (directory, stores) = stores();
    let (file, memory) = (&stores[0], &stores[1]);
    for store in [file, memory] {
        store.put("runs/r/log/1.jsonl", "whole").await.unwrap();
    }
    let half = directory.path().join("runs/r/log/1.jsonl#1");
    std::fs::write(&half, "ha").unwrap();
    std::fs::write(directory.path().join("runs/r/log/notes#draft"), "a hand's").unwrap();
    assert_eq!(file.sweep("runs/r", Duration::from_secs(60)).await.unwrap(), 0);
    assert!(half.exists());
    assert_eq!(file.sweep("runs/r", Duration::ZERO).await.unwrap(), 1);
    assert!(!half.exists());
    assert!(directory.path().join("runs/r/log/notes#draft").exists());
    assert_eq!(file.sweep("runs/none", Duration::ZERO).await.unwrap(), 0);
    for store in [file, memory] {
        assert_eq!(store.sweep("runs", Duration::ZERO).await.unwrap(), 0);
        assert_eq!(store.get("runs/r/log/1.jsonl").await.unwrap(), "whole");
    }
}

#[tokio::test]
async fn the_probe_leaves_nothing_behind() {
    for store in stores().1 {
        store.check_writable().await.unwrap();
        assert!(store.list("").await.unwrap().is_empty());
    }
}

#[test]
fn memory_stores_are_shared_by_name() {
    let open = |url| Store::open(url).unwrap().objects;
    assert!(Arc::ptr_eq(&open("memory://shared-by-name"), &open("memory://shared-by-name")));
    assert!(!Arc::ptr_eq(&open("memory://"), &open("memory://")));
}

#[test]
fn a_store_that_is_a_file_is_refused_in_one_line() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [file.path().to_owned(), file.path().join("below")] {
        let error = Store::open(&format!("file://{}", path.display())).unwrap_err().to_string();
        assert!(error.starts_with("cannot write to the store file://"), "{error}");
        assert!(error.contains("directory") && !error.contains('\n'), "{error}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_directory_without_write_permission_is_refused_in_one_line() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let url = format!("file://{}", directory.path().display());
    let store = Store::open(&url).unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o555)).unwrap();
    // Root may write everywhere; then there is nothing to see here.
    if std::fs::write(directory.path().join("x"), "").is_ok() {
        return;
    }
    let error = store.check_writable().await.unwrap_err().to_string();
    assert!(error.contains(&url) && error.contains("Permission denied"), "{error}");
}

#[test]
fn urls_that_name_no_store_say_what_to_write() {
    for (url, said) in [
        ("somewhere", "write file://PATH"),
        ("file://", "names no directory"),
        ("s3:///x", "names no bucket"),
        ("ftp://host/x", "unknown scheme"),
        ("s3://KEYID:topsecret@bucket/x", "AWS_SECRET_ACCESS_KEY"),
    ] {
        let error = Store::open(url).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert!(!error.contains("topsecret"), "{error}");
    }
}

#[test]
fn an_s3_prefix_goes_before_every_key() {
    let store = Store::open("s3://bucket/some/where/").unwrap();
    assert_eq!(store.path("runs/a").unwrap().as_ref(), "some/where/runs/a");
    assert_eq!(store.place("runs/a"), "s3://bucket/some/where/runs/a");
    assert_eq!(format!("{store:?}"), r#"Store("s3://bucket/some/where/")"#);
}
