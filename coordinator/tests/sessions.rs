//! The coordinator with fake workers over real gRPC sessions on loopback.
#![allow(clippy::unwrap_used)]

mod fake;

use std::sync::Arc;
use std::time::{Duration, Instant};

use fake::{Manner, PATIENCE, Session, launch, settings, spec, weights, work};
use looptrain_coordinator::{
    CoordinatorError, Moment, Outcome, RunEvent, Running, Started, StepRecord, start,
};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{self, coordinator_message as down, worker_message as up};
use looptrain_proto::{Digest, Spec, Step};
use looptrain_storage::{Checkpoints, Store, read_metrics, read_record};
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

fn crew(running: &Running, store: &Store, manners: &[Manner]) {
    for (index, manner) in manners.iter().copied().enumerate() {
        let (address, store) = (running.address, store.clone());
        tokio::spawn(async move { work(address, &format!("w{index}"), store, manner).await });
    }
}

async fn outcome(running: Running) -> Outcome {
    timeout(PATIENCE, running.wait()).await.unwrap().unwrap()
}

/// Events up to the end of the run.
async fn collect(mut events: Receiver<RunEvent>) -> Vec<RunEvent> {
    let mut all = Vec::new();
    while let Ok(event) = timeout(PATIENCE, events.recv()).await.unwrap() {
        all.push(event);
    }
    all
}

async fn steps(store: &Store, run: &str) -> Vec<StepRecord> {
    let lines = read_metrics(store, run).await.unwrap();
    lines.into_iter().map(|line| serde_json::from_value(line).unwrap()).collect()
}

fn fresh(run: &str, overrides: &[&str]) -> (Spec, Store, CancellationToken) {
    (spec(run, overrides), Store::open("memory://").unwrap(), CancellationToken::new())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_goes_from_its_first_worker_to_its_finished_record() {
    let (spec, store, stop) = fresh("whole", &[]);
    let running = launch(&spec, &store, &stop).await;
    let events = collect(running.events.resubscribe());
    crew(&running, &store, &[Manner::Well; 2]);
    let (outcome, events) = tokio::join!(outcome(running), events);
    assert_eq!((outcome.step, outcome.tokens, outcome.stopped), (Step(12), 12 * 160, false));
    assert_eq!(outcome.weights_digest, Some(weights(12)));
    assert_eq!(outcome.evaluation.as_ref().unwrap().loss_per_loop, [6.0, 4.0]);

    let committed = events.iter().filter(|event| matches!(event, RunEvent::Committed(_)));
    assert_eq!(committed.count(), 12);
    let lines = steps(&store, "whole").await;
    assert_eq!(lines.iter().map(|line| line.step.0).collect::<Vec<_>>(), Vec::from_iter(1..=12));
    assert_eq!(lines[11].cursor.sequences, 120);

    let record = read_record(&store, "whole").await.unwrap().unwrap();
    assert_eq!(
        (record.last_checkpoint, record.numerics.as_deref()),
        (Some(Step(12)), Some("fake"))
    );
    assert_eq!(record.finished.unwrap().weights_digest, weights(12));
    let checkpoints = Checkpoints::new(&store, "whole");
    assert_eq!(checkpoints.list().await.unwrap(), [Step(10), Step(12)], "two are kept");
    assert_eq!(checkpoints.verify(Step(12)).await.unwrap().parts.len(), 2);

    let Started::Finished(again) = start(settings(&spec, &store, &stop)).await.unwrap() else {
        panic!("a finished run does not start again")
    };
    assert_eq!(again, outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_survivors_of_every_kind_of_loss_bring_the_run_to_its_end() {
    for manner in [Manner::DiesAt(4), Manner::FreezesAt(4), Manner::LeavesAt(4), Manner::WrongAt(4)]
    {
        let (spec, store, stop) = fresh("loss", &["cluster.workers=3"]);
        let running = launch(&spec, &store, &stop).await;
        let events = collect(running.events.resubscribe());
        crew(&running, &store, &[Manner::Well, manner, Manner::Well]);
        let (outcome, events) = tokio::join!(outcome(running), events);
        assert_eq!(outcome.weights_digest, Some(weights(12)), "{manner:?}");
        let lost = events.iter().find_map(|event| match event {
            RunEvent::WorkerLost { name, reason, .. } => Some((name.clone(), reason.clone())),
            _ => None,
        });
        let (name, reason) = lost.unwrap();
        assert_eq!(name, "w1");
        let expected = match manner {
            Manner::FreezesAt(_) => "silent for 4.0 s",
            Manner::LeavesAt(_) => "it left: SIGTERM",
            Manner::WrongAt(_) => "its reduced gradient of step 4 differs from the others'",
            _ => "it closed its session",
        };
        assert_eq!(reason, expected);
        let lines = steps(&store, "loss").await;
        assert_eq!(lines.len(), 12, "no step is lost or done twice");
        assert_eq!((lines[2].world, lines[3].world), (3, 2));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_stopped_half_way_goes_on_from_its_checkpoint() {
    let (spec, store, stop) = fresh("halves", &[]);
    let (mut told, stops) = (settings(&spec, &store, &stop), stop.clone());
    told.moments = Some(Arc::new(move |moment| {
        if moment == Moment::Planned(Step(4)) {
            stops.cancel();
        }
    }));
    let Started::Running(running) = start(told).await.unwrap() else { panic!("it is over") };
    crew(&running, &store, &[Manner::Well; 2]);
    let first = outcome(running).await;
    // The step in flight is brought to its end.
    assert_eq!((first.stopped, first.step), (true, Step(4)), "{first:?}");
    assert_eq!(first.weights_digest, Some(weights(4)));
    assert!(read_record(&store, "halves").await.unwrap().unwrap().finished.is_none());

    // Another number of workers, and the metrics go on where they ended.
    let other = spec_with_workers(&spec, 1);
    let running = launch(&other, &store, &CancellationToken::new()).await;
    assert_eq!(running.resumed_from, Some(first.step));
    crew(&running, &store, &[Manner::Well]);
    let second = outcome(running).await;
    assert_eq!((second.step, second.weights_digest), (Step(12), Some(weights(12))));
    let lines = steps(&store, "halves").await;
    assert_eq!(lines.iter().map(|line| line.step.0).collect::<Vec<_>>(), Vec::from_iter(1..=12));
    let record = read_record(&store, "halves").await.unwrap().unwrap();
    assert_eq!(record.incarnation.0, 2);
}

fn spec_with_workers(spec: &Spec, workers: u32) -> Spec {
    let mut other = spec.clone();
    other.cluster.workers = workers;
    other
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_everybody_dies_the_run_goes_on_from_its_newest_checkpoint() {
    let (spec, store, stop) = fresh("ashes", &["cluster.workers=1"]);
    let mut running = launch(&spec, &store, &stop).await;
    crew(&running, &store, &[Manner::DiesAt(8)]);
    while let Ok(event) = timeout(PATIENCE, running.events.recv()).await.unwrap() {
        if matches!(event, RunEvent::WorkerLost { .. }) {
            break;
        }
    }
    crew(&running, &store, &[Manner::Well]);
    let rewound = async {
        loop {
            if let RunEvent::Rewound { to, .. } = running.events.recv().await.unwrap() {
                break to;
            }
        }
    };
    assert_eq!(timeout(PATIENCE, rewound).await.unwrap(), Step(5));
    assert_eq!(outcome(running).await.weights_digest, Some(weights(12)));
    assert_eq!(steps(&store, "ashes").await.len(), 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_that_disagree_end_the_run_with_an_error_naming_both() {
    let (spec, store, stop) = fresh("split", &[]);
    let running = launch(&spec, &store, &stop).await;
    crew(&running, &store, &[Manner::Well, Manner::WrongAt(2)]);
    let error = timeout(PATIENCE, running.wait()).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("w0 holds") && error.contains("w1 holds"), "{error}");
}

#[tokio::test]
async fn an_address_that_is_taken_is_named_and_nothing_is_written() {
    let (spec, store, stop) = fresh("taken", &[]);
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap();
    let free = "127.0.0.1:0".parse().unwrap();
    for (listen, dashboard, what) in
        [(address, None, "workers"), (free, Some(address), "the dashboard")]
    {
        let mut settings = settings(&spec, &store, &stop);
        (settings.listen, settings.dashboard) = (listen, dashboard);
        let Err(error) = start(settings).await else { panic!("two listen on {address}") };
        let said = error.to_string();
        assert!(said.contains(what) && said.contains(&address.to_string()), "{said}");
        assert!(said.contains("choose another port"), "{said}");
    }
    assert!(read_record(&store, "taken").await.unwrap().is_none());
}

#[tokio::test]
async fn a_run_of_another_spec_is_left_alone() {
    let (spec, store, stop) = fresh("mine", &[]);
    stop.cancel();
    outcome(launch(&spec, &store, &stop).await).await;
    let other = fake::spec("mine", &["model.hidden_size=16"]);
    let Err(error) = start(settings(&other, &store, &stop)).await else {
        panic!("another model under the same name")
    };
    assert!(matches!(error, CoordinatorError::OtherSpec { .. }));
    assert!(error.to_string().contains("--fresh"), "{error}");
    assert_eq!(read_record(&store, "mine").await.unwrap().unwrap().incarnation.0, 1);
}

#[tokio::test]
async fn a_run_goes_on_with_the_data_it_began_with_and_no_other() {
    let (spec, store, _) = fresh("pinned", &[]);
    let stop = CancellationToken::new();
    stop.cancel();
    outcome(launch(&spec, &store, &stop).await).await;
    let record = read_record(&store, "pinned").await.unwrap().unwrap();
    assert_eq!(record.datasets["text"], Digest::of(b"tokens"));

    let mut other = settings(&spec, &store, &stop);
    other.datasets[0].1 = Digest::of(b"other tokens");
    let Err(error) = start(other).await else { panic!("other data under the same name") };
    assert!(matches!(error, CoordinatorError::OtherData { .. }), "{error}");
    let said = error.to_string();
    assert!(said.contains("`pinned`") && said.contains("`text`"), "{said}");
    assert_eq!(read_record(&store, "pinned").await.unwrap().unwrap(), record, "nothing is written");

    let mut anew = settings(&spec, &store, &stop);
    (anew.datasets[0].1, anew.fresh) = (Digest::of(b"other tokens"), true);
    let Started::Running(running) = start(anew).await.unwrap() else { panic!("it is over") };
    outcome(running).await;
    let record = read_record(&store, "pinned").await.unwrap().unwrap();
    assert_eq!(record.datasets["text"], Digest::of(b"other tokens"));
    assert_eq!(record.incarnation.0, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_start_fences_the_old_coordinator_and_leaves_nothing_of_its_run() {
    let (spec, store, stop) = fresh("anew", &["cluster.workers=1"]);
    let mut old = launch(&spec, &store, &stop).await;
    crew(&old, &store, &[Manner::FreezesAt(8)]);
    while let Ok(event) = timeout(PATIENCE, old.events.recv()).await.unwrap() {
        if matches!(event, RunEvent::WorkerLost { .. }) {
            break;
        }
    }
    // Its journal has written all it had, and is not in the middle of that.
    let written = async {
        while steps(&store, "anew").await.len() < 7 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, written).await.unwrap();
    let other = fake::spec("anew", &["cluster.workers=1", "model.hidden_size=16"]);
    let mut settings = settings(&other, &store, &CancellationToken::new());
    settings.fresh = true;
    let Started::Running(new) = start(settings).await.unwrap() else { panic!("it is over") };
    assert_eq!(new.resumed_from, None);
    let record = read_record(&store, "anew").await.unwrap().unwrap();
    assert_eq!((record.incarnation.0, record.last_checkpoint, record.numerics), (2, None, None));
    assert_eq!(record.begun, record.incarnation, "workers of the old run are told by it");
    assert_eq!(store.list("runs/anew/record").await.unwrap().len(), 4, "the chain is kept");
    for part in ["checkpoints", "metrics", "evaluations"] {
        assert!(store.list(&format!("runs/anew/{part}")).await.unwrap().is_empty(), "{part}");
    }
    // The old one has lost the run, whatever it does next.
    crew(&old, &store, &[Manner::Well]);
    let error = timeout(PATIENCE, old.wait()).await.unwrap().unwrap_err();
    assert!(matches!(error, CoordinatorError::Fenced { .. }), "{error}");
    assert!(Checkpoints::new(&store, "anew").list().await.unwrap().is_empty());
    crew(&new, &store, &[Manner::Well]);
    assert_eq!(outcome(new).await.step, Step(12));
}

#[tokio::test]
async fn a_fresh_start_whose_address_is_taken_leaves_the_old_run_whole() {
    let (spec, store, stop) = fresh("kept", &["cluster.workers=1"]);
    let running = launch(&spec, &store, &stop).await;
    crew(&running, &store, &[Manner::Well]);
    let before = outcome(running).await;
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut taken = settings(&spec, &store, &stop);
    (taken.fresh, taken.dashboard) = (true, Some(holder.local_addr().unwrap()));
    assert!(matches!(start(taken).await, Err(CoordinatorError::Listen { .. })));
    let Started::Finished(after) = start(settings(&spec, &store, &stop)).await.unwrap() else {
        panic!("the run is over")
    };
    assert_eq!(after, before);
}

#[tokio::test]
async fn a_coordinator_that_has_been_replaced_stops_at_its_next_note() {
    let (spec, store, stop) = fresh("fenced", &["cluster.workers=1"]);
    let old = launch(&spec, &store, &stop).await;
    let new_stop = CancellationToken::new();
    let new = launch(&spec, &store, &new_stop).await;
    crew(&old, &store, &[Manner::Well]);
    let error = timeout(PATIENCE, old.wait()).await.unwrap().unwrap_err();
    assert!(matches!(error, CoordinatorError::Fenced { .. }), "{error}");
    new_stop.cancel();
    assert!(outcome(new).await.stopped);
}

#[tokio::test]
async fn a_session_that_does_not_start_with_a_join_is_refused() {
    let (spec, store, stop) = fresh("rude", &[]);
    let running = launch(&spec, &store, &stop).await;
    let first = up::Kind::Heartbeat(v1::Heartbeat {});
    let mut session = Session::open(running.address, first).await;
    let Some(down::Kind::Refused(refused)) = session.hear().await else { panic!("let in") };
    assert!(refused.reason.contains("starts with a Join"));
    assert!(session.hear().await.is_none());
    stop.cancel();
    outcome(running).await;
}

#[tokio::test]
async fn a_malformed_message_ends_its_session_and_says_why() {
    let (spec, store, stop) = fresh("garbled", &[]);
    let mut running = launch(&spec, &store, &stop).await;
    let session = Session::open(running.address, fake::join("w0")).await;
    session
        .say(up::Kind::Ready(v1::Ready { weights_digest: vec![1], ..v1::Ready::default() }))
        .await;
    loop {
        let event = timeout(PATIENCE, running.events.recv()).await.unwrap().unwrap();
        if let RunEvent::WorkerLost { reason, .. } = event {
            assert!(reason.contains("weights_digest is no digest"), "{reason}");
            break;
        }
    }
    stop.cancel();
    outcome(running).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_tells_a_steps_tokens_from_the_runs() {
    let (spec, store, stop) = fresh("counted", &["cluster.workers=1"]);
    let mut running = launch(&spec, &store, &stop).await;
    crew(&running, &store, &[Manner::FreezesAt(4)]);
    while let Ok(event) = timeout(PATIENCE, running.events.recv()).await.unwrap() {
        if matches!(event, RunEvent::Committed(record) if record.step == Step(3)) {
            break;
        }
    }
    let mut client =
        CoordinatorClient::connect(format!("http://{}", running.address)).await.unwrap();
    let status = client.status(v1::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.step, status.tokens), (3, 3 * 160));
    assert_eq!(status.statistics.unwrap().tokens, 160);
    stop.cancel();
    outcome(running).await;
}

#[tokio::test]
async fn an_operator_asks_for_the_status_and_for_a_stop() {
    let (spec, store, stop) = fresh("asked", &[]);
    let running = launch(&spec, &store, &stop).await;
    let _session = Session::open(running.address, fake::join("w0")).await;
    let mut client =
        CoordinatorClient::connect(format!("http://{}", running.address)).await.unwrap();
    let begun = Instant::now();
    let status = loop {
        let status = client.status(v1::StatusRequest {}).await.unwrap().into_inner();
        if !status.workers.is_empty() || begun.elapsed() > PATIENCE {
            break status;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!((status.run.as_str(), status.phase.as_str()), ("asked", "waiting"));
    assert_eq!(status.reason, "waiting for 2 workers; only w0 is here");
    assert_eq!((status.workers[0].name.as_str(), status.workers[0].rank), ("w0", None));
    // The run may be over before the answer is on its way.
    let _ = client.stop(v1::StopRequest { reason: "enough".into() }).await;
    assert!(outcome(running).await.stopped);
}
