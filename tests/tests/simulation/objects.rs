//! The one object store of a simulation: it outlives every host, and has its weather. Each process
//! that opens it does so through an [`Objects`] of its own, so that it is known who wrote what.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::dice::Dice;
use crate::witness::Witness;

/// How the store behaves at the moment.
#[derive(Debug)]
pub(crate) struct Weather {
    seed: u64,
    /// Calls out of a thousand that fail; half of the writes among them have been done all the same.
    pub(crate) errors: u64,
    /// How long a call may take, in milliseconds.
    pub(crate) slow: u64,
}

impl Weather {
    pub(crate) fn fair(seed: u64) -> Self {
        Self { seed, errors: 0, slow: FAIR }
    }

    pub(crate) fn clear_up(&mut self) {
        (self.errors, self.slow) = (0, FAIR);
    }
}

/// Milliseconds of a call in fair weather.
const FAIR: u64 = 20;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    Failed,
    /// It was done, and whoever asked is told that it was not.
    Denied,
}

pub(crate) struct Objects {
    pub(crate) inner: Arc<InMemory>,
    pub(crate) weather: Arc<Mutex<Weather>>,
    pub(crate) witness: Arc<Mutex<Witness>>,
    /// The process that uses it.
    pub(crate) owner: String,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Objects").field(&self.owner).finish()
    }
}

impl fmt::Display for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the objects of {}", self.owner)
    }
}

impl Objects {
    fn clone_of(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            weather: Arc::clone(&self.weather),
            witness: Arc::clone(&self.witness),
            owner: self.owner.clone(),
        }
    }

    async fn fate(&self, call: &str, key: Option<&Path>) -> Fate {
        let (now, owner) = (self.witness().now(), &self.owner);
        // The probe of a start has a name that nobody else has.
        let key = key.filter(|key| !key.as_ref().starts_with(".probe"));
        let (delay, fate) = {
            let weather = self.weather.lock().unwrap_or_else(PoisonError::into_inner);
            let mut dice = Dice::new(weather.seed, &format!("{owner} {call} {key:?} at {now:?}"));
            let delay = dice.millis(0, weather.slow);
            let fate = match (dice.chance(weather.errors), dice.chance(500)) {
                (false, _) => Fate::Done,
                (true, false) => Fate::Failed,
                (true, true) => Fate::Denied,
            };
            (delay, fate)
        };
        if delay > Duration::ZERO {
            tokio::time::sleep(delay).await;
        }
        fate
    }

    fn witness(&self) -> std::sync::MutexGuard<'_, Witness> {
        self.witness.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn storm() -> Error {
    Error::Generic { store: "simulation", source: "503: the store is out of order".into() }
}

#[async_trait]
impl ObjectStore for Objects {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let begun = self.witness().now();
        let fate = self.fate("put", Some(location)).await;
        if fate == Fate::Failed {
            self.witness().storms += 1;
            return Err(storm());
        }
        let bytes: Vec<u8> = payload.iter().flat_map(|bytes| bytes.to_vec()).collect();
        let written = self.inner.put_opts(location, payload, opts).await;
        if written.is_ok() {
            self.witness().written(&self.owner, begun, location.as_ref(), &bytes);
        }
        match fate {
            Fate::Denied => {
                self.witness().storms += 1;
                Err(storm())
            }
            _ => written,
        }
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(Error::NotImplemented {
            operation: "put_multipart".into(),
            implementer: "simulation".into(),
        })
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.fate("get", Some(location)).await {
            Fate::Done => self.inner.get_opts(location, options).await,
            Fate::Failed | Fate::Denied => {
                self.witness().storms += 1;
                Err(storm())
            }
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let this = self.clone_of();
        let fated = locations.then(move |location| {
            let this = this.clone_of();
            async move {
                let location = location?;
                match this.fate("delete", Some(&location)).await {
                    Fate::Failed => Err(storm()),
                    fate => {
                        let gone = futures::stream::iter([Ok(location)]).boxed();
                        let gone = this.inner.delete_stream(gone).try_collect::<Vec<_>>().await?;
                        let gone = gone.into_iter().next().ok_or_else(storm);
                        if fate == Fate::Denied { Err(storm()) } else { gone }
                    }
                }
            }
        });
        fated.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone_of(), prefix.cloned());
        let listed = async move {
            match this.fate("list", prefix.as_ref()).await {
                Fate::Done => this.inner.list(prefix.as_ref()),
                Fate::Failed | Fate::Denied => {
                    this.witness().storms += 1;
                    futures::stream::iter([Err(storm())]).boxed()
                }
            }
        };
        listed.into_stream().flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
