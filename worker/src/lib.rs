//! A worker of a run: computes slots, reduces gradients with its peers, and commits steps together
//! with them.
//!
//! [`run`] is the whole life of a worker. The parts, from the outside in:
//!
//! - `session`: the stream of directives and votes with the coordinator, and what each directive
//!   does;
//! - `feed` and `data`: from (step, slot) to tokens, read ahead;
//! - `compute`: the thread that owns the model and the training state;
//! - [`reduce`]: fixed point, and the ring that sums it over ranks;
//! - `state`: the training state as the tensors of a checkpoint.

mod compute;
mod data;
mod error;
mod feed;
pub mod reduce;
mod session;
mod settings;
mod state;
#[cfg(test)]
mod testing;

use std::sync::Arc;
use std::time::Duration;

use looptrain_proto::v1::{Join, Welcome};
use looptrain_proto::{Digest, Incarnation, PROTOCOL_VERSION, Spec};
use looptrain_storage::{Checkpoints, Store};

pub use data::DataError;
pub use error::WorkerError;
pub use settings::WorkerSettings;

use compute::Compute;
use data::Data;
use feed::Feed;
use reduce::tcp::PeerListener;
use session::{Link, Session, Work};

/// How a worker's part in a run ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// In the coordinator's words, or that the worker was told to stop.
    pub reason: String,
}

/// Joins a run and works in it until it is over, this worker is told to stop, or something fails
/// that a worker cannot mend. Needs a multi-threaded tokio runtime, so that heartbeats go out while
/// sums are added.
///
/// # Errors
/// One line that names the place and the remedy; see [`WorkerError`].
pub async fn run(settings: WorkerSettings) -> Result<Finished, WorkerError> {
    let stop = settings.stop.clone();
    let joined = tokio::select! {
        joined = join(&settings) => joined?,
        () = stop.cancelled() => {
            return Ok(Finished { reason: "told to stop before it had joined".into() });
        }
    };
    let (mut link, welcome, listener) = joined;
    let worker = welcome.worker_id;
    let incarnation = Incarnation(welcome.incarnation);
    match furnish(&settings, &mut link, &welcome, listener).await {
        Ok(work) => {
            tracing::info!(worker, run = work.spec.run.name, "joined the run");
            Session::new(link, Arc::new(work), incarnation).run(&stop).await
        }
        Err(error) => {
            session::decline(link, &error).await;
            Err(error)
        }
    }
}

async fn join(settings: &WorkerSettings) -> Result<(Link, Welcome, PeerListener), WorkerError> {
    let listener = PeerListener::bind(settings.peer_listen).await?;
    let numerics = tokio::task::spawn_blocking(looptrain_model::numerics);
    let join = Join {
        protocol_version: PROTOCOL_VERSION,
        name: settings.name.clone(),
        host: settings::host_name(),
        process_id: std::process::id(),
        threads: u32::try_from(settings.threads).unwrap_or(u32::MAX),
        peer_address: settings::reachable(listener.address(), &settings.coordinator).to_string(),
        numerics: numerics.await.map_err(|_| WorkerError::Compute)?,
    };
    let (link, welcome) = Link::join(&settings.coordinator, join, settings.connect_timeout).await?;
    Ok((link, welcome, listener))
}

/// Opens everything that the spec of the welcome names.
async fn furnish(
    settings: &WorkerSettings,
    link: &mut Link,
    welcome: &Welcome,
    listener: PeerListener,
) -> Result<Work, WorkerError> {
    let spec = Spec::parse("the coordinator's spec", &welcome.spec, &[])?;
    let spec = Arc::new(spec);
    // From here on, so that opening the data does not look like death.
    link.beat_every(Duration::from_secs_f64(spec.cluster.worker_timeout / 4.0));
    let peers = listener.serve(Digest::of(spec.run.name.as_bytes()));
    let store = Store::open(&spec.run.store)?;
    let data = Data::open(Arc::clone(&spec), &store).await?;
    Ok(Work {
        feed: Feed::new(Arc::new(data)),
        compute: Compute::start(Arc::clone(&spec), settings.threads)?,
        checkpoints: Checkpoints::new(&store, &spec.run.name),
        peers,
        spec,
    })
}
