//! A worker of a run: computes slots, reduces gradients with its peers, and commits steps together
//! with them.
//!
//! [`run`] is the whole life of a worker. The parts, from the outside in:
//!
//! - `session`: the stream of directives and votes with the coordinator, and what each directive
//!   does;
//! - `feed` and `data`: from (step, slot) to tokens, read ahead; `audit`: what became of them; `waits`: a
//!   store that is away;
//! - `compute`: the thread that owns the model and the training state;
//! - [`reduce`]: fixed point, and the ring that sums it over ranks;
//! - `state`: the training state as the tensors of a checkpoint;
//! - `transfer`: the training state from peer to peer;
//! - [`bench`]: entrances for measurements.

mod audit;
pub mod bench;
mod compute;
mod data;
mod error;
mod feed;
#[cfg(feature = "cuda")]
mod health;
mod machine;
mod memory;
mod metrics;
mod moment;
pub mod reduce;
mod session;
mod settings;
mod state;
#[cfg(test)]
mod testing;
mod trace;
mod transfer;
mod waits;

use std::net::SocketAddr;
#[cfg(feature = "cuda")]
use std::sync::OnceLock;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use looptrain_model::{Device, Trainer};
use looptrain_proto::v1::{Join, Welcome};
use looptrain_proto::{Digest, Incarnation, PROTOCOL_VERSION, Spec};
use looptrain_storage::{Checkpoints, Store};
use tokio::time::Instant;

pub use compute::worker_bytes;
pub use data::DataError;
pub use error::WorkerError;
#[cfg(feature = "cuda")]
pub use health::gpu_health;
pub use machine::available_memory;
pub use moment::{Moment, Moments};
pub use settings::{BlockCache, Stop, WorkerSettings, host_name};
pub use trace::UNTRACED;

/// What [`take_part`] is put together from.
pub mod parts {
    pub use crate::memory::Memory;
    pub use crate::session::{Dial, Duties, Failure, Holding, Membership, Rendezvous};
    pub use crate::waits::Lasting;
}

use audit::Audit;
use compute::Compute;
use data::Data;
use feed::Feed;
use memory::Memory;
#[cfg(feature = "cuda")]
use reduce::NcclError;
#[cfg(feature = "cuda")]
use reduce::nccl::Nccl;
use reduce::tcp::PeerListener;
use session::{Dial, Duties, Link, Session, Tcp, Work};
use waits::Waits;

/// How a worker's part in a run ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// In the coordinator's words, or that the worker was told to stop.
    pub reason: String,
}

/// Joins a run and works in it until it is over, this worker is told to stop, or something fails
/// that a worker cannot mend. A worker that loses its coordinator keeps its state and joins the
/// next one at the same address. Needs a multi-threaded tokio runtime, so that heartbeats go out
/// while sums are added.
///
/// # Errors
/// One line that names the place and the remedy; see [`WorkerError`].
pub async fn run(settings: WorkerSettings) -> Result<Finished, WorkerError> {
    let credentials = settings.credentials.clone();
    let listener = PeerListener::bind(settings.peer_listen).await?.secured(credentials.clone());
    #[cfg(feature = "cuda")]
    let nccl = nccl_for(settings.device).await;
    #[cfg(feature = "cuda")]
    let nccl_version = nccl.as_ref().map_or(0, |library| library.version().0);
    #[cfg(not(feature = "cuda"))]
    let nccl_version = 0;
    #[cfg(feature = "cuda")]
    let in_use = Arc::new(OnceLock::new());
    #[cfg(feature = "cuda")]
    let used = Arc::clone(&in_use);
    let introduction = introduce(&settings, listener.address(), nccl_version);
    let furnish = |spec, welcome| async {
        let work = furnish(&settings, spec, welcome, listener).await?;
        #[cfg(feature = "cuda")]
        let work = match nccl {
            Some(library) => work.reducing_over(library).await?,
            None => work,
        };
        #[cfg(feature = "cuda")]
        work.nccl.iter().for_each(|nccl| drop(used.set(Arc::clone(nccl))));
        Ok(work)
    };
    let ended = take_part(&settings, &Tcp { credentials }, introduction, furnish).await;
    #[cfg(feature = "cuda")]
    if let Some(Err(error)) = resting(&in_use).await {
        tracing::warn!(%error, "ending all the same");
    }
    ended
}

/// How long the end of a worker waits for NCCL to let go of the device.
#[cfg(feature = "cuda")]
const REST: Duration = Duration::from_secs(5);

/// A process that ends while NCCL does may crash in both.
#[cfg(feature = "cuda")]
async fn resting(in_use: &OnceLock<Arc<Nccl>>) -> Option<Result<(), NcclError>> {
    Some(in_use.get()?.let_go(REST).await)
}

/// What takes part in a run: everything of [`run`] but what listens to peers, computes and reduces.
/// `furnish` makes the one that does these things, once the coordinator's welcome says for which
/// run.
///
/// # Errors
/// As [`run`].
pub async fn take_part<W, F>(
    settings: &WorkerSettings,
    network: &impl Dial,
    introduction: impl Future<Output = Result<Join, WorkerError>>,
    furnish: impl FnOnce(Arc<Spec>, Welcome) -> F,
) -> Result<Finished, WorkerError>
where
    W: Duties,
    F: Future<Output = Result<W, WorkerError>>,
{
    let stop = &settings.stop;
    let joined = async {
        let introduction = introduction.await?;
        let (url, within) = (&settings.coordinator, settings.connect_timeout);
        let joined = Link::join(network, url, introduction.clone(), within).await?;
        Ok::<_, WorkerError>((introduction, joined))
    };
    let (introduction, (mut link, welcome)) = tokio::select! {
        biased;
        joined = joined => joined?,
        reason = stop.told() => {
            return Ok(Finished { reason: format!("{reason} before it had joined") });
        }
    };
    let furnished = async {
        let spec = Arc::new(spec_of(&welcome, &settings.coordinator)?);
        // From here on, so that opening the data does not look like death.
        link.beat_every(heartbeat(&spec));
        furnish(spec, welcome.clone()).await
    };
    let work = match furnished.await {
        Ok(work) => Arc::new(work),
        Err(error) => {
            session::decline(link, &error).await;
            return Err(error);
        }
    };
    tracing::info!(worker = welcome.worker_id, run = work.spec().run.name, "joined the run");
    let mut incarnation = Incarnation(welcome.incarnation);
    loop {
        let lost = match Session::new(link, Arc::clone(&work), incarnation).run(stop).await {
            Err(lost @ WorkerError::Broken { .. }) if !settings.reconnect_timeout.is_zero() => lost,
            ended => return ended,
        };
        tracing::warn!("{lost}; keeping the state and looking for a coordinator");
        let back = tokio::select! {
            biased;
            back = come_back(settings, network, &introduction, &*work, incarnation) => back,
            reason = stop.told() => {
                let saved = work.save_without_coordinator(incarnation).await;
                let reason = format!("{reason} while there was no coordinator; {saved}");
                return Ok(Finished { reason });
            }
        };
        (link, incarnation) = match back {
            Err(error) if error.may_pass() => {
                let saved = work.save_without_coordinator(incarnation).await;
                return Err(WorkerError::Orphaned { reason: error.to_string(), saved });
            }
            back => back?,
        };
        tracing::info!(%incarnation, "joined the run again");
    }
}

/// Pause between attempts to join again, when the coordinator answered but could not take this
/// worker.
const REJOIN_PAUSE: Duration = Duration::from_millis(100);

/// Joins the next coordinator with what this worker holds.
async fn come_back(
    settings: &WorkerSettings,
    network: &impl Dial,
    introduction: &Join,
    work: &impl Duties,
    known: Incarnation,
) -> Result<(Link, Incarnation), WorkerError> {
    let url = &settings.coordinator;
    // Whoever was fetching it is asked anew by the next coordinator.
    work.withdraw(false);
    // What it computes comes to its end first, and takes nothing from the time to look for one.
    session::brought(work).await?;
    let deadline = Instant::now() + settings.reconnect_timeout;
    // The last of several attempts has had but a moment; all of them together count.
    let in_all = |error| match error {
        WorkerError::Connect { url, reason, .. } => {
            WorkerError::Connect { url, seconds: settings.reconnect_timeout.as_secs_f64(), reason }
        }
        other => other,
    };
    loop {
        let join = Join { held: session::brought(work).await?, ..introduction.clone() };
        let left = deadline.saturating_duration_since(Instant::now());
        let error = match Link::join(network, url, join, left).await {
            Ok((mut link, welcome)) if welcome.incarnation >= known.0 => {
                let spec = spec_of(&welcome, url)?;
                if welcome.lineage != work.lineage() {
                    return Err(WorkerError::OtherRun { url: url.clone() });
                }
                link.beat_every(heartbeat(&spec));
                work.welcomed_back(&spec);
                return Ok((link, Incarnation(welcome.incarnation)));
            }
            Ok((link, _)) => link.protocol("has been replaced by another one that is not there"),
            Err(error) if error.may_pass() => error,
            Err(error) => return Err(error),
        };
        if Instant::now() + REJOIN_PAUSE >= deadline {
            return Err(in_all(error));
        }
        tokio::time::sleep(REJOIN_PAUSE).await;
    }
}

/// The spec of a welcome, read as the coordinator reads it.
fn spec_of(welcome: &Welcome, url: &str) -> Result<Spec, WorkerError> {
    let spec = Spec::parse("the coordinator's spec", &welcome.spec, &[])?;
    match spec.trajectory_digest().to_vec() == welcome.trajectory {
        true => Ok(spec),
        false => Err(WorkerError::Protocol {
            url: url.to_owned(),
            what: "reads its run spec otherwise than this worker".into(),
        }),
    }
}

/// What is wrong with a device; `None` when nothing is known.
#[cfg(feature = "cuda")]
fn ailment_of(device: Device) -> Option<String> {
    health::ailment(&looptrain_model::gpu_uuid(device)?)
}

/// The CPU does not tell.
#[cfg(not(feature = "cuda"))]
fn ailment_of(_: Device) -> Option<String> {
    None
}

/// NCCL for a worker that computes on a device; without it that is no error, but slower.
#[cfg(feature = "cuda")]
async fn nccl_for(device: Device) -> Option<Arc<reduce::nccl::Library>> {
    if device == Device::Cpu {
        return None;
    }
    let opened = tokio::task::spawn_blocking(|| {
        let path = looptrain_model::nccl()?;
        reduce::nccl::Library::open(&path)
    });
    match opened.await.ok()? {
        Ok(library) => {
            tracing::info!(version = %library.version(), "NCCL is there");
            Some(Arc::new(library))
        }
        Err(error) => {
            tracing::warn!(%error, "this worker reduces over TCP, through the memory of its host");
            None
        }
    }
}

async fn introduce(
    settings: &WorkerSettings,
    peers: SocketAddr,
    nccl_version: u32,
) -> Result<Join, WorkerError> {
    let device = settings.device;
    let numerics = tokio::task::spawn_blocking(move || looptrain_model::numerics(device));
    let ailment = tokio::task::spawn_blocking(move || ailment_of(device).unwrap_or_default());
    Ok(Join {
        protocol_version: PROTOCOL_VERSION,
        name: settings.name.clone(),
        host: host_name(),
        process_id: std::process::id(),
        threads: u32::try_from(settings.threads).unwrap_or(u32::MAX),
        peer_address: settings::reachable(peers, &settings.coordinator)?.to_string(),
        numerics: numerics.await.map_err(|_| WorkerError::Compute)??,
        held: None,
        nccl_version,
        encrypted: settings.credentials.is_some(),
        ailment: ailment.await.map_err(|_| WorkerError::Compute)?,
    })
}

fn heartbeat(spec: &Spec) -> Duration {
    Duration::from_secs_f64(spec.cluster.worker_timeout / 4.0)
}

/// Opens everything that the spec of the welcome names.
async fn furnish(
    settings: &WorkerSettings,
    spec: Arc<Spec>,
    welcome: Welcome,
    listener: PeerListener,
) -> Result<Work, WorkerError> {
    let (peers, joiners) = listener.serve(Digest::of(spec.run.name.as_bytes()));
    let store = Store::open(&spec.run.store)?;
    let reading = settings.reading(&store);
    let data = Data::open(Arc::clone(&spec), &store, &reading).await?;
    metrics::observe(&reading);
    let moments = settings.moments.clone();
    let memory = machine::memory_of(settings.memory, &spec);
    let (device, threads, model) = (settings.device, settings.threads, spec.model.clone());
    let trainer = tokio::task::spawn_blocking(move || Trainer::new(device, &model, threads));
    let trainer = trainer.await.map_err(|_| WorkerError::Compute)??;
    #[cfg(feature = "cuda")]
    if let Some(uuid) = looptrain_model::gpu_uuid(device) {
        health::observe(&uuid);
        tokio::spawn(health::watch(uuid, settings.stop.clone()));
    }
    let compute = Compute::start(Arc::clone(&spec), trainer, memory, moments.clone())?;
    let (past, waits) = (Memory::default(), Waits::default());
    // Ends with the listener, which hands the joiners on.
    let shelf = compute.shelf().clone();
    tokio::spawn(transfer::serve(joiners, shelf, past.clone(), moments.clone()));
    Ok(Work {
        audit: Audit::new(&spec, &store, waits.clone()),
        feed: Feed::new(Arc::new(data), waits.clone()),
        waits,
        compute,
        sources: Mutex::default(),
        memory: past,
        lineage: welcome.lineage,
        moments,
        checkpoints: Checkpoints::new(&store, &spec.run.name),
        store,
        peers,
        streams: spec.cluster.streams.into(),
        evaluated: spec.evaluation.sequences.into(),
        #[cfg(feature = "cuda")]
        nccl: None,
        spec,
    })
}
