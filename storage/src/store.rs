//! One object store, behind a URL: `file://`, `s3://` or `memory://`.
//!
//! Keys are relative to the URL, with `/` between their parts. Writes are atomic: a reader sees the
//! whole old object or the whole new one. [`Store::put_if_absent`] has one winner among any number
//! of racing writers; the run record and checkpoint manifests rest on it, and
//! [`Store::check_writable`] makes sure at start-up that the store keeps that promise.
//!
//! Retries (bounded, with jittered back-off) happen below, in the client of the remote store; an
//! error that comes out of here is final.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::Path as FilePath;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, RetryConfig};

use crate::error::one_line;
use crate::{Error, Result};

/// An open object store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    /// Put before every key; empty or without `/` at its ends.
    prefix: String,
    url: Arc<str>,
    /// The directory of a `file://` store.
    directory: Option<Arc<FilePath>>,
    /// What takes a core is done at once, on the calling thread.
    in_turn: bool,
}

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Key below the store's URL.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The client underneath may print what it was configured with; the URL is all one needs.
        f.debug_tuple("Store").field(&self.url).finish()
    }
}

impl Store {
    /// Opens the store at `url`; a directory that is not there is made.
    ///
    /// - `file://PATH`: a directory; `file://.looptrain` counts from the working directory,
    ///   `file:///var/lib/looptrain` is absolute.
    /// - `s3://BUCKET/PREFIX`: endpoint, region and credentials come from the `AWS_*` variables.
    /// - `memory://NAME`: shared by all who open that name in this process; without a name a new,
    ///   empty store each time. For tests.
    ///
    /// # Errors
    /// When the URL is none of these, or its directory cannot be made. Remote stores are not
    /// contacted yet: see [`Store::check_writable`].
    pub fn open(url: &str) -> Result<Self> {
        let wrong = |reason: &str| Error::Url { url: redact(url), reason: reason.to_owned() };
        let (scheme, rest) = url
            .split_once("://")
            .ok_or_else(|| wrong("is no URL; write file://PATH or s3://BUCKET/PREFIX"))?;
        let mut directory = None;
        let (objects, prefix): (Arc<dyn ObjectStore>, &str) = match scheme {
            "file" if rest.is_empty() => {
                return Err(wrong("names no directory; write file://PATH"));
            }
            "file" => {
                directory = Some(Arc::from(FilePath::new(rest)));
                (Arc::new(open_directory(url, FilePath::new(rest))?), "")
            }
            "s3" => {
                if rest.contains('@') {
                    return Err(wrong(
                        "holds credentials; put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                    ));
                }
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                if bucket.is_empty() {
                    return Err(wrong("names no bucket; write s3://BUCKET/PREFIX"));
                }
                (Arc::new(open_s3(url, bucket)?), prefix.trim_matches('/'))
            }
            "memory" => (open_memory(rest), ""),
            _ => return Err(wrong("has an unknown scheme; use file:// or s3://")),
        };
        let (prefix, url) = (prefix.to_owned(), url.into());
        Ok(Self { objects, prefix, url, directory, in_turn: false })
    }

    /// A store for a simulation, over objects that fail on purpose; `url` is what messages call
    /// them. What would run beside the async threads, and end at a time that nobody can foretell, is
    /// done in its turn.
    #[must_use]
    pub fn simulated(objects: Arc<dyn ObjectStore>, url: &str) -> Self {
        let (prefix, url) = (String::new(), url.into());
        Self { objects, prefix, url, directory: None, in_turn: true }
    }

    /// Opens a store to read from it: as [`Store::open`], but a directory that is not there is an
    /// error, not made.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_existing(url: &str) -> Result<Self> {
        match url.strip_prefix("file://") {
            Some(path) if !path.is_empty() && !FilePath::new(path).is_dir() => {
                let reason = "there is no such directory; check the path".to_owned();
                Err(Error::Url { url: url.to_owned(), reason })
            }
            _ => Self::open(url),
        }
    }

    /// The URL as given to [`Store::open`].
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The object's URL, for messages.
    pub(crate) fn place(&self, key: &str) -> String {
        let slash = if self.url.ends_with('/') { "" } else { "/" };
        format!("{}{slash}{key}", self.url)
    }

    /// Makes sure that objects can be written and that put-if-absent is honoured, with a probe
    /// object that is deleted again.
    ///
    /// # Errors
    /// One line with what the store said and what to do.
    pub async fn check_writable(&self) -> Result<()> {
        let key = format!(".probe-{:016x}", crate::record::unique());
        let unwritable = |error: Error| Error::Unwritable {
            url: self.url.to_string(),
            reason: match error {
                Error::Operation { reason, .. } => reason,
                other => other.to_string(),
            },
            remedy: if self.url.starts_with("s3://") {
                "check the bucket, AWS_ENDPOINT_URL, AWS_REGION and the credentials".to_owned()
            } else {
                "change the permissions or choose another run.store".to_owned()
            },
        };
        // This one may already lose, to its own retry when an answer got lost. The second must.
        self.put_if_absent(&key, "probe").await.map_err(unwritable)?;
        let second = self.put_if_absent(&key, "probe").await.map_err(unwritable);
        self.delete(&key).await.map_err(unwritable)?;
        if second? {
            return Err(Error::Unwritable {
                url: self.url.to_string(),
                reason: "it lets two writers create the same object".to_owned(),
                remedy: "use a store with conditional writes (If-None-Match)".to_owned(),
            });
        }
        Ok(())
    }

    /// The whole object.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub async fn get(&self, key: &str) -> Result<Bytes> {
        self.get_opt(key).await?.ok_or_else(|| Error::NotFound { place: self.place(key) })
    }

    /// The whole object, `None` when there is none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn get_opt(&self, key: &str) -> Result<Option<Bytes>> {
        let result = async { self.objects.get(&self.path(key)?).await?.bytes().await };
        match result.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("read", key, &error)),
        }
    }

    /// A part of the object.
    ///
    /// # Errors
    /// When there is no such object, or it is shorter, or the store fails.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let result = async { self.objects.get_range(&self.path(key)?, range).await };
        result.await.map_err(|error| self.failed("read", key, &error))
    }

    /// Size of the object, `None` when there is none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn size(&self, key: &str) -> Result<Option<u64>> {
        match async { self.objects.head(&self.path(key)?).await }.await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("read", key, &error)),
        }
    }

    /// Writes the object, over an older one if need be.
    ///
    /// # Errors
    /// When the store fails; the older object is then still whole.
    pub async fn put(&self, key: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        let result = async { self.objects.put(&self.path(key)?, bytes.into()).await };
        result.await.map(drop).map_err(|error| self.failed("write", key, &error))
    }

    /// Writes the object unless it exists; `false` when somebody else was first.
    ///
    /// When an answer got lost and the client tried again, `false` may also mean that this very
    /// call wrote the object. Who must know for sure looks at what is there.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_if_absent(&self, key: &str, bytes: impl Into<Bytes>) -> Result<bool> {
        let bytes = bytes.into();
        let result = async {
            self.objects.put_opts(&self.path(key)?, bytes.into(), PutMode::Create.into()).await
        };
        match result.await {
            Ok(_) => Ok(true),
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => Ok(false),
            Err(error) => Err(self.failed("write", key, &error)),
        }
    }

    /// Deletes the object; one that is not there is fine.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn delete(&self, key: &str) -> Result<()> {
        let result = async { self.objects.delete(&self.path(key)?).await };
        match result.await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed("delete", key, &error)),
        }
    }

    /// All objects below `prefix` (whole path parts, as directories are), ascending by key.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let skip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
        let result = async {
            let found = self.objects.list(Some(&self.path(prefix)?));
            found.try_collect::<Vec<_>>().await
        };
        let found = result.await.map_err(|error| self.failed("list", prefix, &error))?;
        let mut objects: Vec<ObjectInfo> = found
            .into_iter()
            .filter_map(|meta| {
                let key = meta.location.as_ref().get(skip..)?.to_owned();
                Some(ObjectInfo { key, size: meta.size })
            })
            .collect();
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    /// Deletes all objects below `prefix` and says how many there were.
    ///
    /// # Errors
    /// When the store fails; some objects may be gone then.
    pub async fn delete_prefix(&self, prefix: &str) -> Result<usize> {
        let objects = self.list(prefix).await?;
        futures::stream::iter(&objects)
            .map(|object| self.delete(&object.key))
            .buffer_unordered(8)
            .try_collect::<()>()
            .await?;
        Ok(objects.len())
    }

    /// Removes what writers that were killed have left half-written below `prefix`, when nobody
    /// has touched it for `age`, and says how many such files there were. In a directory they are
    /// no objects and nothing lists them, but they take room; remote stores have rules for theirs.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn sweep(&self, prefix: &str, age: Duration) -> Result<usize> {
        let Some(root) = self.directory.clone() else { return Ok(0) };
        let below = root.join(prefix);
        let swept = tokio::task::spawn_blocking(move || sweep_directory(&below, age)).await;
        let failed = |reason: String| {
            let (operation, place) = ("clean up", self.place(prefix));
            Error::Operation { operation, place, reason }
        };
        match swept {
            Ok(swept) => swept.map_err(|error| failed(error.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// Hashing, encoding and other things that take a core, off the async threads.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        match self.in_turn {
            true => Ok(work()),
            false => crate::blocking(work).await,
        }
    }

    fn path(&self, key: &str) -> std::result::Result<Path, object_store::Error> {
        let path = match self.prefix.as_str() {
            "" => Path::parse(key),
            prefix => Path::parse(format!("{prefix}/{key}")),
        };
        Ok(path?)
    }

    fn failed(&self, operation: &'static str, key: &str, error: &object_store::Error) -> Error {
        let place = self.place(key);
        match error {
            object_store::Error::NotFound { .. } => Error::NotFound { place },
            error => Error::Operation { operation, place, reason: reason(error) },
        }
    }
}

/// Removes files that were being written, `NAME#NUMBER`, and are older than `age`.
fn sweep_directory(directory: &FilePath, age: Duration) -> std::io::Result<usize> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut swept = 0;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            swept += sweep_directory(&entry.path(), age)?;
            continue;
        }
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.rsplit_once('#'));
        let staged = number.is_some_and(|(_, number)| number.parse::<u64>().is_ok());
        // A file that is gone by now had a living writer; one from the future goes another time.
        let touched = entry.metadata().and_then(|metadata| metadata.modified());
        let old = touched.is_ok_and(|time| time.elapsed().is_ok_and(|old| old >= age));
        if staged && old {
            std::fs::remove_file(entry.path())?;
            swept += 1;
        }
    }
    Ok(swept)
}

/// What the system said when it was the system, else what the client said.
fn reason(error: &object_store::Error) -> String {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<std::io::Error>()
            && io.raw_os_error().is_some()
        {
            return io.to_string();
        }
        cause = inner.source();
    }
    one_line(&error.to_string())
}

/// The URL without what stands between `//` and `@`.
fn redact(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(start), Some(end)) if end > start => {
            format!("{}***{}", &url[..start + 3], &url[end..])
        }
        _ => url.to_owned(),
    }
}

fn open_directory(url: &str, path: &FilePath) -> Result<LocalFileSystem> {
    let unwritable = |reason: String| Error::Unwritable {
        url: url.to_owned(),
        reason,
        remedy: "change the permissions or choose another run.store".to_owned(),
    };
    std::fs::create_dir_all(path).map_err(|error| {
        if path.exists() && !path.is_dir() {
            unwritable(format!("{} is a file, not a directory", path.display()))
        } else {
            unwritable(format!("{}: {error}", path.display()))
        }
    })?;
    // Synced writes: a manifest must not outlive its parts when the machine loses power.
    LocalFileSystem::new_with_prefix(path)
        .map(|objects| objects.with_fsync(true).with_automatic_cleanup(true))
        .map_err(|error| unwritable(reason(&error)))
}

fn open_s3(url: &str, bucket: &str) -> Result<impl ObjectStore> {
    let builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    let plain = builder
        .get_config_value(&AmazonS3ConfigKey::Endpoint)
        .is_some_and(|endpoint| endpoint.starts_with("http://"));
    let retry = RetryConfig {
        max_retries: 8,
        retry_timeout: Duration::from_secs(60),
        ..RetryConfig::default()
    };
    builder
        .with_allow_http(plain)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(retry)
        .build()
        .map_err(|error| Error::Url {
            url: url.to_owned(),
            reason: format!("cannot be opened: {}", reason(&error)),
        })
}

fn open_memory(name: &str) -> Arc<dyn ObjectStore> {
    static NAMED: OnceLock<Mutex<HashMap<String, Arc<InMemory>>>> = OnceLock::new();
    if name.is_empty() {
        return Arc::new(InMemory::new());
    }
    let mut named =
        NAMED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(named.entry(name.to_owned()).or_default()) as Arc<dyn ObjectStore>
}
