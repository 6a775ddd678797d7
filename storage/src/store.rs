//! One object store, behind a URL: `file://`, `s3://`, `gs://`, `az://` or `memory://`.
//!
//! Keys are relative to the URL, with `/` between their parts. Writes are atomic: a reader sees the
//! whole old object or the whole new one. [`Store::put_if_absent`] has one winner among any number
//! of racing writers; the run record and checkpoint manifests rest on it, and
//! [`Store::check_writable`] makes sure at start-up that the store keeps that promise.
//!
//! Calls that may succeed a little later are tried again (bounded, with jittered back-off); an error
//! that comes out of here is final, and says what was tried how often. No message holds credentials.
//! A listing may lack what was written a moment ago; reads, sizes and conditional writes may not.

mod call;
mod directory;
mod faults;
mod large;
mod open;
mod patience;
mod probe;
mod retry;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload,
    UpdateVersion,
};

use self::call::wrong_key;
pub use self::faults::Faults;
use self::faults::Faulty;
use self::open::Backend;
use self::patience::Patience;
pub use self::probe::Measured;
use self::retry::{Failure, Retry};
use crate::{Error, Result, Tries};

/// An open object store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    /// Where large objects are uploaded in parts; elsewhere they are written at once.
    multipart: Option<Arc<dyn MultipartStore>>,
    /// Put before every key; empty or without `/` at its ends.
    prefix: String,
    url: Arc<str>,
    /// The directory of a `file://` store.
    directory: Option<Arc<FilePath>>,
    retry: Retry,
    patience: Patience,
    /// What no message may hold.
    secrets: Arc<[String]>,
    /// Whether files of the directory may be read past the client.
    direct: bool,
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
    /// When it was written, by the store's clock.
    pub modified: SystemTime,
}

/// Tells one state of an object from every other: see [`Store::put_if_unchanged`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version(UpdateVersion);

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
    /// - `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`: likewise from `GOOGLE_*` and `AZURE_*`.
    /// - `memory://NAME`: shared by all who open that name in this process; without a name a new,
    ///   empty store each time. For tests.
    ///
    /// # Errors
    /// When the URL is none of these, or its directory cannot be made. Remote stores are not
    /// contacted yet: see [`Store::check_writable`].
    pub fn open(url: &str) -> Result<Self> {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self::open_with(url, std::env::vars_os().filter_map(text))
    }

    /// As [`Store::open`], with these variables in place of the environment's.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        let variables: Vec<_> = variables.into_iter().collect();
        let Backend { objects, multipart, prefix, directory, secrets, remote } =
            open::open(url, &variables)?;
        let (url, secrets, retry) = (url.into(), secrets.into(), Retry::PATIENT);
        let (direct, in_turn) = (true, false);
        let patience = if remote { Patience::LIMITED } else { Patience::ENDLESS };
        let store = Self {
            objects,
            multipart,
            prefix,
            url,
            directory,
            retry,
            patience,
            secrets,
            direct,
            in_turn,
        };
        Ok(match faults::installed() {
            Some(faults) => store.over(faults),
            None => store,
        })
    }

    /// The same store, misbehaving; for tests.
    #[must_use]
    pub fn with_faults(self, faults: Faults) -> Self {
        self.over(Arc::new(faults))
    }

    /// The same store, with listings that lack what was written in the last seconds.
    #[cfg(test)]
    pub(crate) fn with_stale_lists(&self) -> Self {
        self.clone().over(Arc::new(Faults::stale_lists()))
    }

    /// The same store, which does not give out objects with this in their key.
    #[cfg(test)]
    pub(crate) fn refusing(&self, part_of_key: &str) -> Self {
        Self { retry: Retry::NEVER, ..self.clone() }.over(Arc::new(Faults::dead(part_of_key)))
    }

    fn over(self, faults: Arc<Faults>) -> Self {
        let multipart = self.multipart.map(|inner| {
            let faults = Arc::clone(&faults);
            Arc::new(Faulty { faults, inner }) as Arc<dyn MultipartStore>
        });
        let objects = Arc::new(Faulty { faults, inner: self.objects });
        // What is read past the faults is none the worse for them.
        Self { objects, multipart, direct: false, ..self }
    }

    /// A store for a simulation, over objects that fail on purpose; `url` is what messages call
    /// them. What would run beside the async threads, and end at a time that nobody can foretell, is
    /// done in its turn; and every failure reaches the caller.
    #[must_use]
    pub fn simulated(objects: Arc<dyn ObjectStore>, url: &str) -> Self {
        Self {
            objects,
            multipart: None,
            prefix: String::new(),
            url: url.into(),
            directory: None,
            retry: Retry::NEVER,
            patience: Patience::ENDLESS,
            secrets: Arc::default(),
            direct: false,
            in_turn: true,
        }
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

    /// Whether objects come over a network.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.directory.is_none() && !self.url.starts_with("memory://")
    }

    /// The object's file, when it is one of this machine and nothing is to come between.
    pub(crate) fn local_path(&self, key: &str) -> Option<PathBuf> {
        self.directory.as_ref().filter(|_| self.direct).map(|directory| directory.join(key))
    }

    /// Whether an error says something of the store, and nothing of the object that was asked for. A
    /// server that does not answer holds good objects all the same; a directory that can be
    /// listed, with a file that cannot be read, has a bad one.
    #[must_use]
    pub fn is_to_blame(&self, error: &Error) -> bool {
        match error {
            Error::Operation { .. } => self.directory.is_none(),
            Error::Interrupted => true,
            _ => false,
        }
    }

    /// The object's URL, for messages.
    pub(crate) fn place(&self, key: &str) -> String {
        let slash = if self.url.ends_with('/') { "" } else { "/" };
        format!("{}{slash}{key}", self.url)
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
        Ok(self.read(key, None).await?.map(|(bytes, _)| bytes))
    }

    /// The whole object with its version, `None` when there is none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn get_versioned(&self, key: &str) -> Result<Option<(Bytes, Version)>> {
        self.read(key, None).await
    }

    /// Some bytes of an object.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none; also when it does not reach so far.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let read = self.read(key, Some(range.clone())).await?;
        let (bytes, _) = read.ok_or_else(|| Error::NotFound { place: self.place(key) })?;
        if bytes.len() as u64 != range.end - range.start {
            let reason = format!("it ends before byte {}", range.end);
            return Err(Error::Malformed { place: self.place(key), reason });
        }
        Ok(bytes)
    }

    async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Option<(Bytes, Version)>> {
        let range = range.map(GetRange::Bounded);
        let path = self.path(key);
        let attempt = || async {
            let options = GetOptions { range: range.clone(), ..GetOptions::default() };
            let get = self.objects.get_opts(path.as_ref().map_err(wrong_key)?, options);
            let got = self.patience.answer(0, get).await?;
            let announced = got.range.end - got.range.start;
            let (e_tag, version) = (got.meta.e_tag.clone(), got.meta.version.clone());
            let bytes = self.patience.body(got).await?;
            if bytes.len() as u64 != announced {
                let source = format!("the body ended after {} of {announced} bytes", bytes.len());
                return Err(object_store::Error::Generic { store: "body", source: source.into() });
            }
            Ok((bytes, Version(UpdateVersion { e_tag, version })))
        };
        match self.retried("read", key, attempt).await {
            Ok(read) => Ok(Some(read)),
            Err(Failure { error: object_store::Error::NotFound { .. }, .. }) => Ok(None),
            Err(failure) => Err(self.failed("read", key, failure)),
        }
    }

    /// The object's size in bytes, `None` when there is none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn size(&self, key: &str) -> Result<Option<u64>> {
        Ok(self.info(key).await?.map(|object| object.size))
    }

    /// What a listing says of an object, `None` when there is none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn info(&self, key: &str) -> Result<Option<ObjectInfo>> {
        let path = self.path(key);
        let attempt = || async {
            self.patience.answer(0, self.objects.head(path.as_ref().map_err(wrong_key)?)).await
        };
        match self.retried("look at", key, attempt).await {
            Ok(meta) => Ok(Some(ObjectInfo {
                key: key.to_owned(),
                size: meta.size,
                modified: modified(&meta),
            })),
            Err(Failure { error: object_store::Error::NotFound { .. }, .. }) => Ok(None),
            Err(failure) => Err(self.failed("look at", key, failure)),
        }
    }

    /// Writes the object, over an older one if need be.
    ///
    /// # Errors
    /// When the store fails; the older object is then still whole.
    pub async fn put(&self, key: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let written = self.write(key, bytes.into().into(), PutMode::Overwrite).await;
        written.map_err(|failure| self.failed("write", key, failure))
    }

    /// Writes the object unless it exists; `false` when somebody else was first.
    ///
    /// When an answer got lost and the call was tried again, `false` may also mean that this very
    /// call wrote the object. Who must know for sure looks at what is there.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_if_absent(&self, key: &str, bytes: impl Into<Bytes>) -> Result<bool> {
        self.write_if(key, bytes.into(), PutMode::Create).await
    }

    /// Writes the object if it is still the one that was read; `false` when it is not. As with
    /// [`Store::put_if_absent`], that may be by this very call.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_if_unchanged(
        &self,
        key: &str,
        bytes: impl Into<Bytes>,
        seen: &Version,
    ) -> Result<bool> {
        self.write_if(key, bytes.into(), PutMode::Update(seen.0.clone())).await
    }

    async fn write_if(&self, key: &str, bytes: Bytes, mode: PutMode) -> Result<bool> {
        use object_store::Error::{AlreadyExists, Precondition};
        match self.write(key, bytes.into(), mode).await {
            Ok(()) => Ok(true),
            Err(Failure { error: AlreadyExists { .. } | Precondition { .. }, .. }) => Ok(false),
            Err(failure) => Err(self.failed("write", key, failure)),
        }
    }

    async fn write(
        &self,
        key: &str,
        payload: PutPayload,
        mode: PutMode,
    ) -> std::result::Result<(), Failure> {
        let path = self.path(key);
        let attempt = || async {
            let path = path.as_ref().map_err(wrong_key)?;
            let put = self.objects.put_opts(path, payload.clone(), mode.clone().into());
            self.patience.answer(payload.content_length(), put).await
        };
        self.retried("write", key, attempt).await.map(drop)
    }

    /// Deletes the object; one that is not there is fine.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn delete(&self, key: &str) -> Result<()> {
        let path = self.path(key);
        let attempt = || async {
            self.patience.answer(0, self.objects.delete(path.as_ref().map_err(wrong_key)?)).await
        };
        match self.retried("delete", key, attempt).await {
            Ok(()) | Err(Failure { error: object_store::Error::NotFound { .. }, .. }) => Ok(()),
            Err(failure) => Err(self.failed("delete", key, failure)),
        }
    }

    /// All objects below `prefix` (whole path parts, as directories are), ascending by key.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let skip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
        let path = self.path(prefix);
        let attempt = || async {
            let found = self.objects.list(Some(path.as_ref().map_err(wrong_key)?));
            self.patience.all(found).await
        };
        let found = self.retried("list", prefix, attempt).await;
        let found = found.map_err(|failure| self.failed("list", prefix, failure))?;
        let mut objects: Vec<ObjectInfo> = found
            .into_iter()
            .filter_map(|meta| {
                let key = meta.location.as_ref().get(skip..)?.to_owned();
                Some(ObjectInfo { key, size: meta.size, modified: modified(&meta) })
            })
            .collect();
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    /// The names right below `prefix` that have objects below themselves, ascending; those objects are not
    /// listed.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let path = self.path(prefix);
        let attempt = || async {
            let found = self.objects.list_with_delimiter(Some(path.as_ref().map_err(wrong_key)?));
            self.patience.answer(0, found).await
        };
        let found = self.retried("list", prefix, attempt).await;
        let found = found.map_err(|failure| self.failed("list", prefix, failure))?;
        let names = found.common_prefixes.iter().filter_map(|below| below.filename());
        let mut names: Vec<String> = names.map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// Deletes all objects below `prefix` and says how many there were.
    ///
    /// # Errors
    /// When the store fails; some objects may be gone then.
    pub async fn delete_prefix(&self, prefix: &str) -> Result<usize> {
        let mut deleted = 0;
        // Until nothing is left: a listing may lack what is new, and show what is gone.
        for _ in 0..LISTINGS {
            let objects = self.list(prefix).await?;
            if objects.is_empty() {
                break;
            }
            deleted += objects.len();
            futures::stream::iter(&objects)
                .map(|object| self.delete(&object.key))
                .buffer_unordered(8)
                .try_collect::<()>()
                .await?;
        }
        Ok(deleted)
    }

    /// Removes what writers that were killed have left half-written below `prefix`, when nobody
    /// has touched it for `age`, and says how many such files there were. In a directory they are
    /// no objects and nothing lists them, but they take room; remote stores have rules for theirs.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn sweep(&self, prefix: &str, age: Duration) -> Result<usize> {
        self.sweeping(prefix, move |below| directory::sweep(below, age)).await
    }

    /// As [`Store::sweep`], of those directories right below `prefix` whose names are `wanted`.
    ///
    /// # Errors
    /// As [`Store::sweep`].
    pub(crate) async fn sweep_some(
        &self,
        prefix: &str,
        age: Duration,
        wanted: impl Fn(&str) -> bool + Send + 'static,
    ) -> Result<usize> {
        self.sweeping(prefix, move |below| directory::sweep_some(below, age, wanted)).await
    }

    async fn sweeping(
        &self,
        prefix: &str,
        sweep: impl FnOnce(&FilePath) -> std::io::Result<usize> + Send + 'static,
    ) -> Result<usize> {
        let Some(root) = self.directory.clone() else { return Ok(0) };
        let below = root.join(prefix);
        let swept = tokio::task::spawn_blocking(move || sweep(&below)).await;
        let failed = |reason: String| {
            let (operation, place) = ("clean up", self.place(prefix));
            Error::Operation { operation, place, reason, tries: Tries::default() }
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
}

/// Listings after which a prefix that does not become empty is given up: somebody writes there.
const LISTINGS: usize = 5;

fn modified(meta: &ObjectMeta) -> SystemTime {
    let written = u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0);
    UNIX_EPOCH + Duration::from_millis(written)
}
