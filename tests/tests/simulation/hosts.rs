//! The programs of the simulated hosts: what a supervisor runs, and starts again when it ends.

use std::sync::Arc;
use std::time::Duration;

use looptrain_coordinator::{CoordinatorError, Settings, Started, start_on};
use looptrain_proto::v1::{Join, Welcome};
use looptrain_proto::{Digest, PROTOCOL_VERSION};
use looptrain_worker::{WorkerSettings, take_part};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::door::PEER_PORT;
use crate::mime::Mime;
use crate::network::{COORDINATOR_PORT, COORDINATOR_URL, Inlet, Outlet};
use crate::shared::{Shared, lock};

/// Who starts a program again that has ended takes this long.
const RESTART: Duration = Duration::from_millis(500);

/// A coordinator that ends is gone after a whole number of these.
const LEAVE: Duration = Duration::from_millis(250);

/// The program of a coordinator's host: started again when it fails, and given up when another one
/// has taken over.
pub(crate) async fn coordinate(shared: Arc<Shared>, host: &'static str) -> turmoil::Result {
    tokio::spawn(Arc::clone(&shared).run_clock(host));
    loop {
        let process = shared.begin(host).to_string();
        let settings = Settings {
            spec: shared.spec.clone(),
            store: shared.store(&process),
            datasets: vec![("text".into(), Digest::of(b"tokens"))],
            fresh: false,
            listen: ([0, 0, 0, 0], COORDINATOR_PORT).into(),
            credentials: None,
            dashboard: None,
            access: Default::default(),
            stop: CancellationToken::new(),
            until: None,
            render_metrics: None,
            moments: None,
        };
        let inlet = Inlet { host, shared: Arc::clone(&shared) };
        let error = match start_on(inlet, settings).await {
            Ok(Started::Finished(outcome)) => {
                shared.witness().note(&process, "finds that the run is over");
                lock(&shared.outcome).get_or_insert(outcome);
                return Ok(());
            }
            Ok(Started::Running(mut running)) => {
                if !running.skipped_checkpoints.is_empty() {
                    let left = running.resumed_from.unwrap_or_default();
                    shared.witness().passes_over(&process, left);
                }
                let (hearing, speaker) = (Arc::clone(&shared), process.clone());
                let mut events =
                    std::mem::replace(&mut running.events, tokio::sync::broadcast::channel(1).1);
                let heard = tokio::spawn(async move {
                    while let Ok(event) = events.recv().await {
                        hearing.witness().event(&speaker, &event);
                    }
                });
                // All that it had to say is there before anything else happens.
                heard.await?;
                let silent = Instant::now();
                let ended = running.wait().await;
                // tonic takes leave of its connections in an order that nobody can fix.
                let beats = silent.elapsed().as_millis() as u32 / LEAVE.as_millis() as u32 + 1;
                sleep_until(silent + LEAVE * beats).await;
                match ended {
                    Ok(outcome) => {
                        shared.witness().note(&process, format!("ends at step {}", outcome.step));
                        *lock(&shared.outcome) = Some(outcome);
                        return Ok(());
                    }
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        shared.witness().note(&process, format!("ends: {error}"));
        if matches!(error, CoordinatorError::Fenced { .. }) {
            shared.witness().fenced += 1;
            return Ok(());
        }
        sleep(RESTART).await;
        if *lock(&shared.current) != host {
            return Ok(());
        }
    }
}

/// The program of a worker's host: started again whenever it ends.
pub(crate) async fn work(shared: Arc<Shared>, host: &'static str) -> turmoil::Result {
    tokio::spawn(Arc::clone(&shared).run_clock(host));
    loop {
        let life = shared.begin(host);
        let mut settings = WorkerSettings::new(COORDINATOR_URL, host);
        settings.reconnect_timeout = Duration::from_secs(60);
        settings.connect_timeout = Duration::from_secs(60);
        lock(&shared.stops).insert(host, settings.stop.clone());
        let introduction = Join {
            protocol_version: PROTOCOL_VERSION,
            name: host.into(),
            host: host.into(),
            process_id: life.number as u32,
            threads: 1,
            peer_address: format!("{host}:{PEER_PORT}"),
            numerics: "simulated".into(),
            held: None,
            nccl_version: 0,
            ailment: String::new(),
            encrypted: false,
        };
        let outlet = Outlet { worker: host, shared: Arc::clone(&shared) };
        let furnish =
            |spec, welcome: Welcome| Mime::start(life, Arc::clone(&shared), spec, welcome.lineage);
        let ended = take_part(&settings, &outlet, async { Ok(introduction) }, furnish).await;
        let how = match ended {
            Ok(finished) => finished.reason,
            Err(error) => format!("{error}"),
        };
        shared.witness().note(life, format!("ends: {how}"));
        sleep(RESTART).await;
    }
}
