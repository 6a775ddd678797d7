//! What every store does, in a directory and in memory; and what opening one says.

#![allow(clippy::unwrap_used)]

use std::sync::Mutex;

use async_trait::async_trait;
use futures::stream::BoxStream;
use looptrain_proto::Digest;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, Error as ClientError, GetResult, ListResult, MultipartUpload, ObjectMeta,
    PutMultipartOptions, PutOptions, PutResult,
};

use super::*;

/// A store without some of what others have, and what it was asked.
#[derive(Debug, Default)]
struct Lacking {
    memory: InMemory,
    lack: Option<Lack>,
    asked: Mutex<Vec<String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    /// It writes whatever the condition.
    Conditions,
    /// It looks whether there is an object, and writes afterwards.
    Atomicity,
    /// It says that it knows no conditions.
    Knowledge,
    /// It is closed to whoever has these credentials.
    Trust,
    /// There is no answer.
    Life,
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a store without {:?}", self.lack)
    }
}

impl Lacking {
    fn refusal(&self, call: &str) -> Option<ClientError> {
        self.asked.lock().unwrap().push(call.to_owned());
        let document = "<?xml version=\"1.0\"?><Error><Code>SignatureDoesNotMatch</Code><Message>\
            The request signature does not match.</Message><AWSAccessKeyId>AKIDEXAMPLE\
            </AWSAccessKeyId><StringToSign>AWS4 wJalrXUtnFEMI</StringToSign></Error>";
        let denied = format!(
            "Server returned non-2xx status code: 403 Forbidden: {document}\nwJalrXUtnFEMI"
        );
        match self.lack? {
            Lack::Trust => {
                Some(ClientError::PermissionDenied { path: "k".into(), source: denied.into() })
            }
            Lack::Life => Some(ClientError::Generic {
                store: "S3",
                source: "error sending request with wJalrXUtnFEMI".into(),
            }),
            _ => None,
        }
    }
}

#[async_trait]
impl ObjectStore for Lacking {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> object_store::Result<PutResult> {
        if let Some(refusal) = self.refusal("put") {
            return Err(refusal);
        }
        match (self.lack, &options.mode) {
            (Some(Lack::Conditions), _) => options.mode = PutMode::Overwrite,
            (Some(Lack::Atomicity), PutMode::Create) => {
                if self.memory.head(location).await.is_ok() {
                    let (path, source) = (location.to_string(), "412".into());
                    return Err(ClientError::AlreadyExists { path, source });
                }
                tokio::task::yield_now().await;
                options.mode = PutMode::Overwrite;
            }
            (Some(Lack::Knowledge), PutMode::Create) => {
                let operation = "`put_opts` with mode `PutMode::Create`".into();
                return Err(ClientError::NotImplemented { operation, implementer: "S3".into() });
            }
            _ => {}
        }
        self.memory.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.memory.put_multipart_opts(location, options).await
    }

    async fn get_opts(
        &self,
        location: &Path,
        options: GetOptions,
    ) -> object_store::Result<GetResult> {
        match self.refusal("get") {
            Some(refusal) => Err(refusal),
            None => self.memory.get_opts(location, options).await,
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.memory.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.memory.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.memory.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.memory.copy_opts(from, to, options).await
    }
}

/// A store like a remote one, whose pauses are short.
fn lacking(lack: Lack) -> (Store, Arc<Lacking>) {
    let objects = Arc::new(Lacking { lack: Some(lack), ..Lacking::default() });
    let retry = Retry { first_pause: Duration::from_micros(50), ..Retry::PATIENT };
    let secrets = Arc::from(["AKIDEXAMPLE".to_owned(), "wJalrXUtnFEMI".to_owned()]);
    let store = Store { retry, secrets, ..Store::simulated(objects.clone(), "s3://bucket") };
    (store, objects)
}

/// As [`stores`], misbehaving in a third of all calls.
fn in_a_storm(seed: u64) -> (tempfile::TempDir, Vec<Store>) {
    let (directory, stores) = stores();
    let retry = Retry { attempts: 30, first_pause: Duration::from_micros(50), ..Retry::PATIENT };
    let storm = |store: Store| Store { retry, ..store }.with_faults(Faults::new(seed, 0.33));
    (directory, stores.into_iter().map(storm).collect())
}

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
        store.check_reachable().await.unwrap();
        store.check_writable().await.unwrap();
        let measured = store.measure(100_000).await.unwrap();
        assert!(measured.clock_ahead.abs() < 60.0, "{measured:?}");
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
        ("gs://", "write gs://BUCKET/PREFIX"),
        ("az:///x", "write az://CONTAINER/PREFIX"),
        ("gs://topsecret@bucket/x", "GOOGLE_SERVICE_ACCOUNT"),
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

#[test]
fn google_and_azure_are_opened_with_their_own_variables() {
    let variables = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let key = r#"{"private_key":"","private_key_id":"","client_email":"","disable_oauth":true}"#;
    let google = variables(&[("GOOGLE_SERVICE_ACCOUNT_KEY", key)]);
    let store = Store::open_with("gs://bucket/some/where", google).unwrap();
    assert_eq!(store.path("k").unwrap().as_ref(), "some/where/k");
    assert!(store.multipart.is_some());

    let azure =
        [("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0a2V5")];
    let store = Store::open_with("az://container", variables(&azure)).unwrap();
    assert_eq!(store.path("k").unwrap().as_ref(), "k");
    assert_eq!(format!("{store:?}"), r#"Store("az://container")"#);
}

#[test]
fn credentials_that_cannot_be_parsed_are_not_repeated() {
    for (url, name) in [
        ("gs://bucket", "GOOGLE_SERVICE_ACCOUNT_KEY"),
        ("az://container", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("s3://bucket", "AWS_SECRET_ACCESS_KEY"),
    ] {
        let variable = (name.to_owned(), "topsecret%%%".to_owned());
        let error = Store::open_with(url, [variable]).err().map(|error| error.to_string());
        assert!(!error.unwrap_or_default().contains("topsecret"), "{url}");
    }
}

#[tokio::test]
async fn a_store_without_conditional_writes_is_refused_with_the_remedy() {
    for (lack, said) in [
        (Lack::Conditions, "two writers create the same object"),
        (Lack::Atomicity, "two writers create the same object"),
        (Lack::Knowledge, "PutMode"),
    ] {
        let (store, objects) = lacking(lack);
        let error = store.check_writable().await.unwrap_err().to_string();
        for part in ["cannot write to the store s3://bucket", said, "If-None-Match"] {
            assert!(error.contains(part), "`{part}` is missing in: {error}");
        }
        assert!(store.measure(10).await.is_ok(), "{lack:?} is about conditions");
        assert_eq!(objects.memory.list(None).count().await, 0, "the probes are gone");
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_says_what_was_tried_on_what_how_often_and_for_how_long() {
    let (store, objects) = lacking(Lack::Life);
    let error = store.get("runs/r/x").await.unwrap_err();
    let Error::Operation { operation, place, tries, .. } = &error else { panic!("{error}") };
    assert_eq!((*operation, place.as_str()), ("read", "s3://bucket/runs/r/x"));
    assert_eq!((tries.attempts, objects.asked.lock().unwrap().len()), (10, 10));
    assert!(!tries.elapsed.is_zero());
    let text = error.to_string();
    assert!(text.starts_with("cannot read s3://bucket/runs/r/x: ") && !text.contains('\n'));
    assert!(text.contains("(10 attempts in 0."), "{text}");
    for error in
        [store.put("k", "v").await.unwrap_err(), store.put_if_absent("k", "v").await.unwrap_err()]
    {
        assert!(error.to_string().starts_with("cannot write s3://bucket/k: "), "{error}");
    }
}

#[tokio::test]
async fn what_does_not_pass_is_tried_once_and_no_message_holds_credentials() {
    let (store, objects) = lacking(Lack::Trust);
    let error = store.get("k").await.unwrap_err();
    assert_eq!(objects.asked.lock().unwrap().len(), 1);
    let text = format!("{error} {error:?}");
    assert!(text.contains("SignatureDoesNotMatch: The request signature"), "{text}");
    for secret in ["AKIDEXAMPLE", "wJalrXUtnFEMI", "StringToSign"] {
        assert!(!text.contains(secret), "{text}");
    }
    let (silent, _) = lacking(Lack::Life);
    let text = format!("{:?}", silent.get("k").await.unwrap_err());
    assert!(text.contains("error sending request with ***"), "{text}");
}

#[tokio::test]
async fn nothing_is_lost_torn_or_made_up_in_a_storm() {
    for seed in 0..3 {
        for store in in_a_storm(seed).1 {
            store.check_writable().await.unwrap();
            for number in 0..10 {
                let body = format!("{number}").repeat(1000);
                store.put(&format!("a/{number:02}"), body.clone()).await.unwrap();
                assert_eq!(store.get(&format!("a/{number:02}")).await.unwrap(), body);
                let range = store.get_range(&format!("a/{number:02}"), 10..20).await.unwrap();
                assert_eq!(range, body[10..20]);
                assert_eq!(
                    store.size(&format!("a/{number:02}")).await.unwrap(),
                    Some(body.len() as u64)
                );
            }
            assert_eq!(store.get_opt("a/99").await.unwrap(), None);
            // What is written stays written, whoever was told what.
            assert!(!store.put_if_absent("a/00", "other").await.unwrap());
            store.put_if_absent("b", "mine").await.unwrap();
            assert_eq!(store.get("b").await.unwrap(), "mine");
            store.delete("b").await.unwrap();
            assert_eq!(store.get_opt("b").await.unwrap(), None);
        }
    }
}

#[tokio::test]
async fn large_objects_survive_a_storm_whole() {
    let bytes: Vec<u8> = (0..3 * large::PART_BYTES + 5).map(|i| (i % 251) as u8).collect();
    for seed in 0..2 {
        for store in in_a_storm(seed).1 {
            store.put_large("large", bytes.clone()).await.unwrap();
            let size = store.size("large").await.unwrap().unwrap();
            let chunks: Vec<Bytes> = store.stream("large", size).try_collect().await.unwrap();
            assert!(chunks.concat() == bytes, "seed {seed} of {store:?}");
        }
    }
}

#[tokio::test]
async fn an_object_is_copied_whole_and_its_digest_is_that_of_the_copy() {
    let bytes: Vec<u8> = (0..2 * large::PART_BYTES + 7).map(|i| (i % 241) as u8).collect();
    let small = &bytes[..1000];
    for store in in_a_storm(3).1 {
        for source in [small, &bytes] {
            store.put_large("from", source.to_vec()).await.unwrap();
            for _ in 0..2 {
                let copied = store.copy_large("from", "below/to", source.len() as u64).await;
                assert_eq!(copied.unwrap(), Digest::of(source), "{store:?}");
            }
            // Another one in place of the first leaves the copy alone.
            store.put_large("from", vec![1; source.len()]).await.unwrap();
            assert!(store.get("below/to").await.unwrap() == source, "{store:?}");
            store.delete("below/to").await.unwrap();
        }
        assert!(store.copy_large("none", "below/to", 5).await.is_err());
        assert_eq!(store.get_opt("below/to").await.unwrap(), None);
    }
}

#[tokio::test]
async fn folders_are_named_without_what_is_in_them() {
    for store in in_a_storm(4).1 {
        for key in ["runs/b/x/1", "runs/a/1", "runs/a/2", "runs/alone", "other/c/1"] {
            store.put(key, "x").await.unwrap();
        }
        assert_eq!(store.folders("runs").await.unwrap(), ["a", "b"], "{store:?}");
        assert!(store.folders("none").await.unwrap().is_empty());
    }
}

#[test]
fn files_are_read_past_the_client_but_not_past_faults() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("file://{}", root.path().display())).unwrap();
    assert_eq!(store.local_path("a/b"), Some(root.path().join("a/b")));
    assert_eq!(store.with_faults(Faults::new(1, 0.5)).local_path("a/b"), None);
}
