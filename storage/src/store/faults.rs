//! A store that misbehaves on purpose, as remote stores do: for tests of everything above it.
//!
//! What goes wrong is decided by a seed. Each kind of call (read, look, write, list, delete, upload)
//! counts its calls; whether the n-th one fails is a function of seed and n, and what happens to those
//! that do is dealt from a shuffled deck of all that can happen to such a call, so that within a
//! few faults every kind has had its turn. Each fault is told as a warning, for tests to count. Or the
//! whole store is away for as long as there is some file.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartId,
    MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result,
};

/// How long a call hangs before it is given up, and a slow body takes.
const HANG: Duration = Duration::from_millis(300);

/// A stale list lacks what was written within this time.
const STALE: Duration = Duration::from_secs(2);

/// Which calls go wrong, and how.
#[derive(Debug)]
pub struct Faults {
    seed: u64,
    /// Whether nothing happens but that listings are stale.
    only_stale_lists: bool,
    /// What is in the keys of the only objects that go wrong.
    dead: Option<String>,
    /// While there is such a file the whole store is away.
    away: Option<PathBuf>,
    /// Of all calls, those that go wrong.
    share: f64,
    /// Of each kind of call: how many there were, and how many of them went wrong.
    counts: Mutex<[(u64, u64); CALLS]>,
}

/// Kinds of calls.
#[derive(Clone, Copy, Debug)]
enum Call {
    Read,
    Look,
    Write,
    List,
    Delete,
    Upload,
}

const CALLS: usize = 6;

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Unavailable,
    TooMany,
    Reset,
    TimeOut,
    SlowBody,
    TruncatedBody,
    /// It was done, and whoever asked is told that it was not.
    LostAnswer,
    StaleList,
}

/// What can happen to any call.
const COMMON: [Fault; 4] = [Fault::Unavailable, Fault::TooMany, Fault::Reset, Fault::TimeOut];

impl Call {
    /// What can happen to it, besides.
    fn special(self) -> &'static [Fault] {
        match self {
            Self::Read => &[Fault::SlowBody, Fault::TruncatedBody],
            Self::Write | Self::Delete | Self::Upload => &[Fault::LostAnswer],
            Self::List => &[Fault::StaleList],
            Self::Look => &[],
        }
    }

    /// What can happen to it in the order of the `round`-th deal: shuffled, but for the first time
    /// what is special comes first, since some calls are rare.
    fn deck(self, round: u64, dice: impl Fn(u64) -> u64) -> Vec<Fault> {
        let mut deck: Vec<Fault> = self.special().iter().chain(&COMMON).copied().collect();
        deck.sort_by_key(|fault| {
            let late = round == 0 && COMMON.contains(fault);
            (late, dice(round * 16 + *fault as u64))
        });
        deck
    }
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "503",
            Self::TooMany => "429",
            Self::Reset => "reset",
            Self::TimeOut => "time-out",
            Self::SlowBody => "slow body",
            Self::TruncatedBody => "truncated body",
            Self::LostAnswer => "lost answer",
            Self::StaleList => "stale list",
        }
    }

    /// What the caller is told.
    fn error(self) -> Error {
        let source = match self {
            Self::Unavailable => "Server returned non-2xx status code: 503 Service Unavailable",
            Self::TooMany => "Server returned non-2xx status code: 429 Too Many Requests",
            Self::TimeOut => "operation timed out",
            Self::LostAnswer => "the connection was closed before the answer came",
            _ => "connection reset by peer",
        };
        Error::Generic { store: "faults", source: source.into() }
    }
}

impl Faults {
    /// The names of all that can go wrong, as the warnings have them.
    pub const NAMES: [&str; 8] = [
        "503",
        "429",
        "reset",
        "time-out",
        "slow body",
        "truncated body",
        "lost answer",
        "stale list",
    ];

    /// Of all calls the `share` (0 to 1) that `seed` chooses go wrong.
    #[must_use]
    pub fn new(seed: u64, share: f64) -> Self {
        let counts = Mutex::default();
        Self { seed, only_stale_lists: false, dead: None, away: None, share, counts }
    }

    /// While there is a file at `path`, no call is answered with anything but an error that may pass.
    #[must_use]
    pub fn away_while(path: PathBuf) -> Self {
        Self { away: Some(path), ..Self::new(0, 0.0) }
    }

    /// Every listing is stale, and nothing else goes wrong.
    #[cfg(test)]
    pub(super) fn stale_lists() -> Self {
        Self { only_stale_lists: true, ..Self::new(0, 1.0) }
    }

    /// Objects with this in their key are never given out, and nothing else goes wrong.
    #[cfg(test)]
    pub(super) fn dead(part_of_key: &str) -> Self {
        Self { dead: Some(part_of_key.to_owned()), ..Self::new(0, 0.0) }
    }

    /// From now on every store that this process opens misbehaves; for tests. What was said first
    /// counts.
    pub fn install(self) {
        let _ = INSTALLED.set(Arc::new(self));
    }

    /// What happens to the next call of a kind.
    fn next(&self, call: Call, key: &str) -> Option<Fault> {
        if let Some(file) = &self.away {
            return file.exists().then_some(Fault::Unavailable);
        }
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (calls, faults) = &mut counts[call as usize];
        let dice = |salt: u64, number: u64| mixed(self.seed ^ mixed(salt ^ mixed(number)));
        let kind = call as u64;
        let drawn = dice(kind, *calls) as f64 / u64::MAX as f64;
        *calls += 1;
        if let Some(dead) = &self.dead {
            return key.contains(dead).then_some(Fault::Unavailable);
        }
        if self.only_stale_lists {
            return matches!(call, Call::List).then_some(Fault::StaleList);
        }
        if drawn >= self.share {
            return None;
        }
        let cards = (COMMON.len() + call.special().len()) as u64;
        let (round, turn) = (*faults / cards, *faults % cards);
        *faults += 1;
        let fault = call.deck(round, |number| dice(kind + 100, number))[turn as usize];
        tracing::warn!("store fault: {} on {call:?} of {key}", fault.name());
        Some(fault)
    }

    /// Lets a call go wrong in one of the ways in which its effect does not happen at all, or says
    /// which other fault it has.
    async fn befall(&self, call: Call, key: &str) -> Result<Option<Fault>> {
        match self.next(call, key) {
            Some(fault @ Fault::TimeOut) => {
                tokio::time::sleep(HANG).await;
                Err(fault.error())
            }
            Some(fault @ (Fault::Unavailable | Fault::TooMany | Fault::Reset)) => {
                Err(fault.error())
            }
            fault => Ok(fault),
        }
    }

    /// A call that changes something: it may be done and denied.
    async fn change<T>(
        &self,
        call: Call,
        key: &Path,
        change: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let fault = self.befall(call, key.as_ref()).await?;
        let done = change.await?;
        fault.map_or(Ok(done), |fault| Err(fault.error()))
    }
}

/// Those of this process.
static INSTALLED: OnceLock<Arc<Faults>> = OnceLock::new();

/// Those that were installed, if any.
pub(super) fn installed() -> Option<Arc<Faults>> {
    INSTALLED.get().cloned()
}

/// How they are written: `seed=7,share=0.2`, or `away=FILE`.
impl FromStr for Faults {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Some(file) = text.strip_prefix("away=").filter(|file| !file.is_empty()) {
            return Ok(Self::away_while(file.into()));
        }
        let form = || format!("write seed=NUMBER,share=FROM-0-TO-1, or away=FILE, not `{text}`");
        let (seed, share) = text.split_once(',').ok_or_else(form)?;
        let seed = seed.strip_prefix("seed=").and_then(|seed| seed.parse().ok());
        let share = share.strip_prefix("share=").and_then(|share| share.parse().ok());
        match (seed, share.filter(|share| (0.0..=1.0).contains(share))) {
            (Some(seed), Some(share)) => Ok(Self::new(seed, share)),
            _ => Err(form()),
        }
    }
}

/// One step of SplitMix64: a number that says nothing about the one before.
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A store with faults.
#[derive(Debug)]
pub(super) struct Faulty<T: ?Sized> {
    pub(super) faults: Arc<Faults>,
    pub(super) inner: Arc<T>,
}

impl<T: ?Sized> Faulty<T> {
    fn again(&self) -> Self {
        Self { faults: Arc::clone(&self.faults), inner: Arc::clone(&self.inner) }
    }
}

impl<T: fmt::Display + ?Sized> fmt::Display for Faulty<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with faults", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Faulty<dyn ObjectStore> {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let put = self.inner.put_opts(location, payload, options);
        self.faults.change(Call::Write, location, put).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let call = if options.head { Call::Look } else { Call::Read };
        let fault = self.faults.befall(call, location.as_ref()).await?;
        let mut got = self.inner.get_opts(location, options).await?;
        let Some(fault) = fault else { return Ok(got) };
        let (meta, range, attributes) = (got.meta.clone(), got.range.clone(), got.attributes);
        got.attributes = Default::default();
        let body = got.bytes().await?;
        let payload = GetResultPayload::Stream(hampered(fault, body));
        Ok(GetResult { payload, meta, range, attributes, extensions: Default::default() })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let this = self.again();
        let deleted = locations.then(move |location| {
            let this = this.again();
            async move {
                let location = location?;
                let delete = this.inner.delete(&location);
                this.faults.change(Call::Delete, &location, delete).await?;
                Ok(location)
            }
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.again(), prefix.cloned());
        let listed = async move {
            let key = prefix.as_ref().map_or("", |prefix| prefix.as_ref()).to_owned();
            let fault = match this.faults.befall(Call::List, &key).await {
                Err(error) => return futures::stream::iter([Err(error)]).boxed(),
                Ok(fault) => fault,
            };
            let old = |object: &ObjectMeta| fault.is_none() || written(object) + STALE < now();
            let objects: Result<Vec<ObjectMeta>> =
                this.inner.list(prefix.as_ref()).try_collect().await;
            match objects {
                Ok(objects) => {
                    let objects: Vec<_> = objects.into_iter().filter(old).map(Ok).collect();
                    futures::stream::iter(objects).boxed()
                }
                Err(error) => futures::stream::iter([Err(error)]).boxed(),
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

#[async_trait]
impl MultipartStore for Faulty<dyn MultipartStore> {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        self.faults.change(Call::Upload, path, self.inner.create_multipart(path)).await
    }

    async fn put_part(
        &self,
        path: &Path,
        id: &MultipartId,
        part: usize,
        data: PutPayload,
    ) -> Result<PartId> {
        let put = self.inner.put_part(path, id, part, data);
        self.faults.change(Call::Upload, path, put).await
    }

    async fn complete_multipart(
        &self,
        path: &Path,
        id: &MultipartId,
        parts: Vec<PartId>,
    ) -> Result<PutResult> {
        let complete = self.inner.complete_multipart(path, id, parts);
        self.faults.change(Call::Upload, path, complete).await
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.inner.abort_multipart(path, id).await
    }
}

/// A body that dawdles, or ends in the middle as if nothing were.
fn hampered(fault: Fault, body: Bytes) -> BoxStream<'static, Result<Bytes>> {
    let half = body.len() / 2;
    let (begin, end) = (body.slice(..half), body.slice(half..));
    let begin = futures::stream::iter([Ok(begin)]);
    match fault {
        Fault::TruncatedBody => begin.boxed(),
        _ => begin.chain(tokio::time::sleep(HANG).map(|()| Ok(end)).into_stream()).boxed(),
    }
}

fn written(object: &ObjectMeta) -> Duration {
    Duration::from_millis(u64::try_from(object.last_modified.timestamp_millis()).unwrap_or(0))
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_written_as_a_seed_and_a_share() {
        let faults: Faults = "seed=7,share=0.25".parse().unwrap();
        assert_eq!((faults.seed, faults.share), (7, 0.25));
        let away: Faults = "away=/nowhere/away".parse().unwrap();
        assert!(away.next(Call::Read, "k").is_none(), "there is no such file");
        let away: Faults = "away=/".parse().unwrap();
        assert_eq!(away.next(Call::Read, "k"), Some(Fault::Unavailable));
        for wrong in
            ["", "7", "away=", "seed=7", "seed=x,share=0.1", "seed=7,share=1.5", "share=0.1,seed=7"]
        {
            assert!(wrong.parse::<Faults>().unwrap_err().contains("seed=NUMBER"), "{wrong}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_faults_and_every_kind_has_its_turn() {
        let draw = |seed| {
            let faults = Faults::new(seed, 0.3);
            (0..200).map(|_| faults.next(Call::Read, "k")).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        let faults: Vec<Fault> = draw(1).into_iter().flatten().collect();
        assert!((40..80).contains(&faults.len()), "{}", faults.len());
        let deck = [Call::Read.special(), &COMMON].concat();
        assert!(Call::Read.special().iter().all(|kind| faults[..2].contains(kind)), "{faults:?}");
        for round in faults.chunks_exact(deck.len()) {
            assert!(deck.iter().all(|kind| round.contains(kind)), "{round:?}");
        }
    }

    #[test]
    fn every_fault_can_happen_to_some_call() {
        let calls = [Call::Read, Call::Look, Call::Write, Call::List, Call::Delete, Call::Upload];
        assert_eq!(calls.len(), CALLS);
        let all = calls.iter().flat_map(|call| call.special()).chain(&COMMON);
        let all: Vec<&str> = all.map(|fault| fault.name()).collect();
        assert!(Faults::NAMES.iter().all(|name| all.contains(name)), "{all:?}");
    }
}
