//! Whole workers against a coordinator that is played by the test.
#![allow(clippy::unwrap_used)]

mod rig;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use looptrain_proto::v1::coordinator_message::Kind as Directive;
use looptrain_proto::v1::{self, failed::Cause, worker_message::Kind as Vote};
use looptrain_proto::{Cursor, Digest, Step};
use looptrain_storage::{CheckpointManifest, Checkpoints, PartEntry, Store};

use self::rig::{Guest, Rig, steps};
use crate::{Moment, Moments, WorkerError};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_worker_trains_saves_evaluates_and_finishes() {
    let mut rig = Rig::start().await;
    let worker = rig.worker("w0");
    let mut guest = rig.welcome().await;
    assert_eq!(guest.join.name, "w0");
    guest.form(1, 0, &[&guest.join.clone()], 0);
    let first = guest.ready().await;
    assert_eq!((first.generation, first.step), (1, 0));
    for step in 1..=2 {
        guest.plan(1, step, 0..4);
        let prepared = guest.prepared().await;
        assert_eq!((prepared.generation, prepared.step), (1, step));
        assert!(prepared.sections.unwrap().compute > 0.0);
        guest.commit(1, step);
    }
    guest.save(2, 0, 1);
    let saved = guest.saved().await;
    assert_eq!((saved.error.as_str(), saved.step, saved.parts), ("", 2, 1));
    assert!(saved.bytes > 0 && saved.tensors > 0 && saved.weights_digest.len() == 32);
    guest.evaluate(1, 2, 0..3);
    let evaluated = guest.evaluated().await;
    assert_eq!((evaluated.tokens, evaluated.sums.len()), (24, 6));
    guest.finish("all done");
    assert_eq!(worker.await.unwrap().unwrap().reason, "all done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_that_was_given_up_goes_when_the_next_one_comes() {
    let mut rig = Rig::start().await;
    let (compute, held) = std::sync::mpsc::channel::<()>();
    let held = Mutex::new(held);
    rig.moments = Moments::watched_by(move |moment| {
        if let Moment::Compute(_) = moment {
            // Until the sender is gone; the copies for the saves come behind it.
            let _ = held.lock().unwrap().recv_timeout(rig::PATIENCE);
        }
    });
    let (workers, mut guests) = rig.cluster(1).await;
    let guest = &mut guests[0];
    guest.plan(1, 1, 0..4);
    guest.save(0, 0, 1);
    guest.save(0, 0, 2);
    // It is busy, and says so when it has heard all that came before.
    guest.evaluate(1, 0, 0..3);
    assert!(guest.failed().await.detail.contains("still busy with step 1"));
    drop(compute);
    guest.prepared().await;
    guest.commit(1, 1);
    let saved = guest.saved().await;
    assert_eq!((saved.error.as_str(), saved.part, saved.parts), ("", 0, 2));
    guest.say(Directive::Drain(v1::Drain { reason: "enough".into() }));
    assert!(matches!(guest.hear().await, Some(Vote::Leave(_))));
    assert!(!guest.has_parts(), "nothing is told of the first one");
    for worker in workers {
        assert_eq!(worker.await.unwrap().unwrap().reason, "enough");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_workers_ends_at_the_same_weights() {
    let mut digests = Vec::new();
    for world in 1..=3 {
        let mut rig = Rig::start().await;
        let (_workers, mut guests) = rig.cluster(world).await;
        let seen = steps(&mut guests, 1, 1..=3).await;
        let ready = rig::reform(&mut guests, 2, 3).await;
        digests.push((seen, ready));
    }
    assert_eq!(digests[0], digests[1]);
    assert_eq!(digests[0], digests[2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_generation_interrupts_a_reduction_that_would_never_end() {
    let mut rig = Rig::start().await;
    let reducing = rig.reaches(Moment::Reduce(Step(1)));
    let (_workers, mut guests) = rig.cluster(2).await;
    let undisturbed = {
        let mut other = Rig::start().await;
        let (_workers, mut guests) = other.cluster(1).await;
        steps(&mut guests, 1, 1..=1).await
    };
    // Only one of the two is told to compute, so the ring waits.
    guests[0].plan(1, 1, 0..2);
    reducing.wait().await;
    let alone = guests[0].join.clone();
    guests[0].form(2, 0, &[&alone], 0);
    assert_eq!(guests[0].ready().await.generation, 2);
    let mut survivor = vec![guests.remove(0)];
    assert_eq!(steps(&mut survivor, 2, 1..=1).await, undisturbed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reduction_begins_while_the_last_slot_is_under_way() {
    let mut rig = Rig::start().await;
    let mut spec = (*rig.spec).clone();
    // Of several buckets.
    spec.model.vocab_size = 90_000;
    rig.spec = Arc::new(spec);
    let (sender, reducing) = std::sync::mpsc::channel();
    let (reducing, computed) = (Mutex::new(reducing), AtomicUsize::new(0));
    let overlapped = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&overlapped);
    rig.moments = Moments::watched_by(move |moment| match moment {
        // The second of two slots: it does not end before numbers are on their way.
        Moment::Compute(_) if computed.fetch_add(1, Ordering::Relaxed) == 1 => {
            let begun = reducing.lock().unwrap().recv_timeout(rig::PATIENCE / 2);
            seen.store(begun.is_ok(), Ordering::Relaxed);
        }
        Moment::Reduce(_) => drop(sender.send(())),
        _ => {}
    });
    let _watched = rig.worker("w0");
    let mut guests = vec![rig.welcome().await];
    rig.moments = Moments::default();
    let _other = rig.worker("w1");
    guests.push(rig.welcome().await);
    rig::reform(&mut guests, 1, 0).await;
    steps(&mut guests, 1, 1..=1).await;
    assert!(overlapped.load(Ordering::Relaxed));
}

/// A rig whose workers compute on emulated devices, with the stand-in for NCCL.
#[cfg(feature = "cuda")]
async fn on_devices(collective: v1::Collective) -> Rig {
    let mut rig = Rig::start().await;
    let mut spec = (*rig.spec).clone();
    (spec.model.hidden_size, spec.model.intermediate_size) = (32, 40);
    spec.model.vocab_size = 304;
    // Emulated kernels take their time.
    spec.cluster.worker_timeout = 20.0;
    rig.spec = Arc::new(spec);
    (rig.device, rig.collective) = (looptrain_model::Device::Emulated, collective);
    rig
}

#[cfg(feature = "cuda")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_nccl_any_number_of_workers_ends_at_the_weights_of_one() {
    let _stand_in = crate::reduce::nccl::StandIn::take();
    let mut weights = Vec::new();
    // Five workers share out four slots.
    for (world, collective) in [
        (1, v1::Collective::Tcp),
        (2, v1::Collective::Tcp),
        (3, v1::Collective::Nccl),
        (5, v1::Collective::Nccl),
    ] {
        let mut rig = on_devices(collective).await;
        let (_workers, mut guests) = rig.cluster(world).await;
        assert!(guests.iter().all(|guest| guest.join.nccl_version == 23_203));
        steps(&mut guests, 1, 1..=2).await;
        weights.push(rig::reform(&mut guests, 2, 2).await);
    }
    assert!(weights.iter().all(|digest| *digest == weights[0]), "{weights:?}");
}

#[cfg(feature = "cuda")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_nccl_too_a_new_generation_interrupts_a_reduction_that_would_never_end() {
    let stand_in = crate::reduce::nccl::StandIn::take();
    let undisturbed = {
        let mut rig = on_devices(v1::Collective::Tcp).await;
        let (_workers, mut guests) = rig.cluster(1).await;
        steps(&mut guests, 1, 1..=2).await;
        rig::reform(&mut guests, 2, 2).await
    };
    let mut rig = on_devices(v1::Collective::Nccl).await;
    let (mut workers, mut guests) = rig.cluster(3).await;
    steps(&mut guests, 1, 1..=1).await;
    // One of the three is never told to compute, so the others wait for it, and then it is gone.
    stand_in.calls();
    guests[0].plan(1, 2, 0..2);
    guests[1].plan(1, 2, 2..4);
    let sums = stand_in.until_called("ncclAllReduce", 2).await;
    assert!(sums >= 2, "both have begun");
    workers.remove(2).abort();
    drop(guests.remove(2));
    rig::reform(&mut guests, 2, 1).await;
    steps(&mut guests, 2, 2..=2).await;
    assert_eq!(rig::reform(&mut guests, 3, 2).await, undisturbed);
}

#[cfg(feature = "cuda")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_alone_after_an_abort_has_the_device_to_itself() {
    let stand_in = crate::reduce::nccl::StandIn::take();
    let undisturbed = {
        let mut rig = on_devices(v1::Collective::Tcp).await;
        let (_workers, mut guests) = rig.cluster(1).await;
        steps(&mut guests, 1, 1..=1).await;
        rig::reform(&mut guests, 2, 1).await
    };
    let mut rig = on_devices(v1::Collective::Nccl).await;
    let (mut workers, mut guests) = rig.cluster(2).await;
    stand_in.calls();
    // Rank 1 agrees to the step, and its sums never come; until rank 0 has aborted, which takes it a second,
    // there is nonsense in the place of its own.
    stand_in.fail("ncclAllReduce", 1, 2, -2);
    stand_in.fail("ncclCommAbort", 0, 1, -2);
    guests[0].plan(1, 1, 0..2);
    guests[1].plan(1, 1, 2..4);
    assert!(stand_in.until_called("ncclAllReduce", 6).await >= 6, "all sums are queued");
    workers.remove(1).abort();
    drop(guests.remove(1));
    let begin = std::time::Instant::now();
    rig::reform(&mut guests, 2, 0).await;
    assert!(begin.elapsed() > Duration::from_millis(900), "it waited for the abort");
    steps(&mut guests, 2, 1..=1).await;
    assert_eq!(rig::reform(&mut guests, 3, 1).await, undisturbed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_neighbour_that_dies_is_reported_by_name() {
    let mut rig = Rig::start().await;
    let (mut workers, mut guests) = rig.cluster(2).await;
    guests[0].plan(1, 1, 0..2);
    workers.remove(1).abort();
    let failed = guests[0].failed().await;
    assert_eq!(failed.cause(), Cause::Peer);
    assert!(failed.detail.contains("lost rank 1 (w1"), "{}", failed.detail);
    guests[0].finish("enough");
    assert!(workers.remove(0).await.unwrap().is_ok(), "a neighbour's fault is no failure");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_step_is_committed_by_a_generation_that_starts_from_it() {
    let mut rig = Rig::start().await;
    let (_workers, mut guests) = rig.cluster(1).await;
    guests[0].plan(1, 1, 0..4);
    guests[0].prepared().await;
    let committed = rig::reform(&mut guests, 2, 1).await;

    let mut other = Rig::start().await;
    let (_workers, mut guests) = other.cluster(1).await;
    steps(&mut guests, 1, 1..=1).await;
    assert_eq!(rig::reform(&mut guests, 2, 1).await, committed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_step_is_redone_by_a_generation_that_starts_before_it() {
    let mut rig = Rig::start().await;
    let (_workers, mut guests) = rig.cluster(1).await;
    guests[0].plan(1, 1, 0..4);
    let first = guests[0].prepared().await.digest;
    rig::reform(&mut guests, 2, 0).await;
    assert_eq!(steps(&mut guests, 2, 1..=1).await, [first]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_fetches_the_state_while_the_members_train_and_catches_up_with_them() {
    let mut other = Rig::start().await;
    let (_workers, mut guests) = other.cluster(1).await;
    let undisturbed = steps(&mut guests, 1, 1..=4).await;
    let weights = rig::reform(&mut guests, 2, 4).await;

    // There is no checkpoint in the store: whatever the joiner holds came from the members.
    let mut rig = Rig::start().await;
    let (_workers, mut guests) = rig.cluster(2).await;
    let mut seen = steps(&mut guests, 1, 1..=1).await;
    let _joiner = rig.worker("w2");
    let mut joiner = rig.welcome().await;
    guests.iter().for_each(|guest| guest.offer(1, 1));
    let sources: Vec<v1::Join> = guests.iter().map(|guest| guest.join.clone()).collect();
    joiner.fetch(1, &sources.iter().collect::<Vec<_>>());
    let fetched = joiner.fetched().await;
    assert_eq!((fetched.error.as_str(), fetched.step), ("", 1));
    // Two more commits before the coordinator lets it in.
    seen.extend(steps(&mut guests, 1, 2..=3).await);
    guests.push(joiner);
    rig::reform(&mut guests, 2, 3).await;
    seen.extend(steps(&mut guests, 2, 4..=4).await);
    assert_eq!(seen, undisturbed);
    assert_eq!(rig::reform(&mut guests, 3, 4).await, weights);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_warm_spare_follows_the_updates_says_where_it_is_when_they_end_and_takes_over() {
    let mut other = Rig::start().await;
    let (_workers, mut guests) = other.cluster(1).await;
    let undisturbed = steps(&mut guests, 1, 1..=4).await;

    let mut rig = Rig::start().await;
    let (mut workers, mut guests) = rig.cluster(1).await;
    let mut seen = steps(&mut guests, 1, 1..=1).await;
    let followed = rig.reaches(Moment::Followed(Step(3)));
    let _spare = rig.worker("w1");
    let mut spare = rig.welcome().await;
    guests[0].offer(1, 1);
    spare.fetch(1, &[&guests[0].join.clone()]);
    assert_eq!(spare.fetched().await.error, "");
    guests[0].withdraw(true);
    seen.extend(steps(&mut guests, 1, 2..=3).await);
    // The last update has to reach the spare before its source dies.
    followed.wait().await;
    workers.remove(0).abort();
    drop(guests);
    let lost = spare.fetched().await;
    assert_eq!(lost.step, 3, "{}", lost.error);
    assert!(lost.error.contains("no peer has the update to step 4"), "{}", lost.error);
    let mut guests = vec![spare];
    rig::reform(&mut guests, 2, 3).await;
    seen.extend(steps(&mut guests, 2, 4..=4).await);
    assert_eq!(seen, undisturbed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_watches_a_worker_is_told_of_each_moment() {
    let mut rig = Rig::start().await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&seen);
    rig.moments = Moments::watched_by(move |moment| note.lock().unwrap().push(moment));
    let (_workers, mut guests) = rig.cluster(2).await;
    steps(&mut guests, 1, 1..=1).await;
    let _joiner = rig.worker("w2");
    let mut joiner = rig.welcome().await;
    guests.iter().for_each(|guest| guest.offer(1, 1));
    let sources: Vec<v1::Join> = guests.iter().map(|guest| guest.join.clone()).collect();
    joiner.fetch(1, &sources.iter().collect::<Vec<_>>());
    assert_eq!(joiner.fetched().await.error, "");

    let seen = seen.lock().unwrap();
    let count = |moment| seen.iter().filter(|seen| **seen == moment).count();
    let step = Step(1);
    assert_eq!(count(Moment::Compute(step)), 4, "one a slot");
    for once_a_rank in [Moment::Reduce(step), Moment::Prepared(step), Moment::Commit(step)] {
        assert_eq!(count(once_a_rank), 2, "{once_a_rank:?}");
    }
    assert!((1..=3).contains(&count(Moment::Serving(step))), "one a chunk that was in time");
    assert_eq!(count(Moment::Fetched(step)), 1);
    assert!(seen.iter().all(|moment| Moment::NAMES.contains(&moment.name())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_whose_sources_are_gone_says_so_and_stays() {
    let mut rig = Rig::start().await;
    let (mut workers, mut guests) = rig.cluster(1).await;
    let _joiner = rig.worker("w1");
    let mut joiner = rig.welcome().await;
    workers.remove(0).abort();
    let gone = guests.remove(0).join;
    joiner.fetch(1, &[&gone]);
    let fetched = joiner.fetched().await;
    assert!(fetched.error.contains("no peer has the state of step 1"), "{}", fetched.error);
    let alone = joiner.join.clone();
    joiner.form(1, 0, &[&alone], 0);
    assert_eq!(joiner.ready().await.step, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_worker_goes_on_from_a_checkpoint_with_the_same_bits() {
    let mut rig = Rig::start().await;
    let (_workers, mut guests) = rig.cluster(2).await;
    steps(&mut guests, 1, 1..=2).await;
    for (part, guest) in guests.iter_mut().enumerate() {
        guest.save(2, part as u32, 2);
    }
    // The next step goes on while the parts are uploaded.
    let undisturbed = steps(&mut guests, 1, 3..=3).await;
    let mut parts = Vec::new();
    for guest in &mut guests {
        parts.push(guest.saved().await);
    }
    rig.commit_checkpoint(2, &parts).await;
    drop(guests);

    let _fresh = rig.worker("fresh");
    let mut guests = vec![rig.welcome().await];
    let ready = rig::reform(&mut guests, 1, 2).await;
    assert_eq!(ready, parts[0].weights_digest);
    assert_eq!(steps(&mut guests, 1, 3..=3).await, undisturbed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_is_not_there_is_reported_and_ends_the_worker_in_an_error() {
    let mut rig = Rig::start().await;
    let worker = rig.worker("w0");
    let mut guest = rig.welcome().await;
    guest.form(1, 0, &[&guest.join.clone()], 3);
    let failed = guest.failed().await;
    assert_eq!((failed.cause(), failed.step), (Cause::Store, 3));
    guest.finish("you are of no use");
    let error = worker.await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Dropped { .. }), "{error}");
    assert!(error.to_string().contains("you are of no use"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn senseless_directives_are_answered_and_survived() {
    let mut rig = Rig::start().await;
    let worker = rig.worker("w0");
    let mut guest = rig.welcome().await;
    let complains = async |guest: &mut Guest, what: &str| {
        let failed = guest.failed().await;
        assert_eq!(failed.cause(), Cause::Internal);
        assert!(failed.detail.contains(what), "{}", failed.detail);
    };
    guest.plan(0, 1, 0..4);
    complains(&mut guest, "has no ring").await;
    guest.form(1, 5, &[&guest.join.clone()], 0);
    complains(&mut guest, "rank 5 is no rank").await;
    guest.form(2, 0, &[&guest.join.clone()], 0);
    guest.ready().await;
    guest.plan(2, 1, 3..9);
    complains(&mut guest, "slots 3..9 of step 1 are not among its 4").await;
    guest.plan(2, 99, 0..1);
    complains(&mut guest, "step 99 is no step").await;
    guest.commit(2, 1);
    complains(&mut guest, "cannot commit step 1").await;
    guest.plan(1, 1, 0..4); // of an old generation: silently ignored
    guest.form(2, 0, &[], 0); // not a new one: ignored
    guest.say_nothing();
    guest.save(0, 4, 2);
    assert!(!guest.saved().await.error.is_empty());
    // And it still works.
    guest.form(3, 0, &[&guest.join.clone()], 0);
    guest.ready().await;
    guest.plan(3, 1, 0..4);
    guest.prepared().await;
    guest.finish("done");
    assert!(worker.await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_told_to_stop_leaves_after_the_commit_it_owes() {
    let mut rig = Rig::start().await;
    let computing = rig.reaches(Moment::Compute(Step(1)));
    let worker = rig.worker("w0");
    let mut guest = rig.welcome().await;
    guest.form(1, 0, &[&guest.join.clone()], 0);
    guest.ready().await;
    guest.plan(1, 1, 0..4);
    computing.wait().await;
    rig.stop.tell("told to stop");
    guest.is_leaving().await;
    guest.drain("told to stop");
    guest.prepared().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!worker.is_finished(), "others may need this worker to commit");
    guest.commit(1, 1);
    assert!(matches!(guest.hear().await, Some(Vote::Leave(_))));
    drop(guest);
    assert_eq!(worker.await.unwrap().unwrap().reason, "told to stop");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_worker_leaves_after_its_commit_and_its_save() {
    let mut rig = Rig::start().await;
    let (mut workers, mut guests) = rig.cluster(1).await;
    let guest = &mut guests[0];
    guest.save(0, 0, 1);
    guest.plan(1, 1, 0..4);
    guest.drain("maintenance");
    guest.prepared().await;
    guest.commit(1, 1);
    assert!(
        matches!(guest.hear().await, Some(Vote::Leave(leave)) if leave.reason == "maintenance")
    );
    assert_eq!(guest.saved().await.error, "", "it was heard before the farewell");
    drop(guests);
    assert_eq!(workers.remove(0).await.unwrap().unwrap().reason, "maintenance");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_worker_told_to_stop_leaves_as_soon_as_it_may() {
    let mut rig = Rig::start().await;
    let worker = rig.worker("w0");
    let mut guest = rig.welcome().await;
    guest.beat().await;
    rig.stop.tell("told to stop");
    guest.is_leaving().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!worker.is_finished(), "what it holds may have to be saved");
    guest.drain("told to stop");
    assert!(matches!(guest.hear().await, Some(Vote::Leave(_))));
    assert!(guest.hear().await.is_none(), "the stream ends after the farewell");
    drop(guest);
    assert!(worker.await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_session_ends_the_worker() {
    let mut rig = Rig::start().await;
    let worker = rig.worker("w0");
    let guest = rig.welcome().await;
    drop(guest);
    let error = worker.await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Broken { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_session_ends_a_worker_that_waits_for_its_neighbours() {
    let mut rig = Rig::start().await;
    let reducing = rig.reaches(Moment::Reduce(Step(1)));
    let (mut workers, mut guests) = rig.cluster(2).await;
    guests[0].plan(1, 1, 0..2);
    // The slots are computed, and the ring waits for the other rank.
    reducing.wait().await;
    drop(guests.remove(0));
    let ended = tokio::time::timeout(rig::PATIENCE, workers.remove(0)).await;
    assert!(matches!(ended.unwrap().unwrap(), Err(WorkerError::Broken { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_lose_their_coordinator_bring_the_next_one_what_they_hold() {
    let mut other = Rig::start().await;
    let (_workers, mut guests) = other.cluster(1).await;
    let undisturbed = steps(&mut guests, 1, 1..=4).await;

    let mut rig = Rig::start().await;
    rig.reconnect = Duration::from_secs(20);
    let (_workers, mut guests) = rig.cluster(2).await;
    let mut seen = steps(&mut guests, 1, 1..=1).await;
    // Both prepare step 2, and only one hears of its commit before the coordinator dies.
    guests.iter().zip([0..2, 2..4]).for_each(|(guest, slots)| guest.plan(1, 2, slots));
    for guest in &mut guests {
        seen.push(guest.prepared().await.digest);
    }
    assert_eq!(seen.pop(), seen.last().cloned());
    guests[0].commit(1, 2);
    // Its answer shows that it has read the commit.
    guests[0].save(2, 0, 1);
    assert_eq!(guests[0].saved().await.error, "");
    drop(guests);

    let mut guests = vec![rig.guest().await, rig.guest().await];
    guests.sort_by(|a, b| a.join.name.cmp(&b.join.name));
    let held: Vec<v1::Held> = guests.iter().map(|guest| guest.join.held.clone().unwrap()).collect();
    let brought: Vec<_> = held.iter().map(|held| (held.step, held.prepared)).collect();
    assert_eq!(brought, [(2, None), (1, Some(2))]);
    for held in &held {
        assert_eq!((held.generation, held.world), (1, 2));
        assert_eq!(held.recent.iter().map(|vote| vote.step).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(held.recent[1].digest, seen[1]);
        assert_eq!(held.lineage, b"one");
    }
    guests.iter().for_each(|guest| guest.welcome_as(2, &rig.spec));
    // Generations of another incarnation count anew.
    rig::reform(&mut guests, 1, 2).await;
    seen.extend(steps(&mut guests, 1, 3..=4).await);
    assert_eq!(seen, undisturbed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_that_loses_its_coordinator_says_who_else_holds_what_it_fetched_and_how_it_came_to_be()
 {
    let mut rig = Rig::start().await;
    rig.reconnect = Duration::from_secs(20);
    let (_workers, mut guests) = rig.cluster(2).await;
    let mut seen = steps(&mut guests, 1, 1..=2).await;
    let followed = rig.reaches(Moment::Followed(Step(3)));
    let _joiner = rig.worker("w2");
    let mut joiner = rig.welcome().await;
    guests.iter().for_each(|guest| guest.offer(1, 2));
    let sources: Vec<v1::Join> = guests.iter().map(|guest| guest.join.clone()).collect();
    joiner.fetch(2, &sources.iter().collect::<Vec<_>>());
    assert_eq!(joiner.fetched().await.error, "");
    seen.extend(steps(&mut guests, 1, 3..=3).await);
    followed.wait().await;
    drop(joiner);
    let held = rig.guest().await.join.held.unwrap();
    assert_eq!((held.step, held.world), (3, 2));
    // It never voted, and a coordinator that has no other log can write one from what it was told.
    assert_eq!(held.recent.iter().map(|vote| vote.step).collect::<Vec<_>>(), [1, 2, 3]);
    let digests: Vec<_> = held.recent.into_iter().map(|vote| vote.digest).collect();
    assert_eq!(digests, seen);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_does_not_bring_its_state_and_data_into_a_run_that_was_begun_anew() {
    let mut rig = Rig::start().await;
    rig.reconnect = Duration::from_secs(20);
    let worker = rig.worker("w0");
    drop(rig.welcome().await);
    rig.guest().await.welcome_to(2, b"anew", &rig.spec);
    let error = worker.await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::OtherRun { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_reads_the_spec_otherwise_than_its_coordinator_takes_no_part() {
    let mut rig = Rig::start().await;
    let worker = rig.worker("w0");
    let mut guest = rig.guest().await;
    guest.say(Directive::Welcome(v1::Welcome {
        worker_id: 1,
        incarnation: 1,
        spec: rig.spec.to_toml(),
        lineage: b"one".to_vec(),
        trajectory: Digest::of(b"what another build makes of it").to_vec(),
    }));
    let error = worker.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("reads its run spec otherwise than this worker"), "{error}");
    assert!(error.ends_with("worker and coordinator must be of one build"), "{error}");
    // It says so instead of just going away.
    assert!(matches!(guest.hear().await, Some(Vote::Failed(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_takes_no_orders_from_a_coordinator_that_was_replaced() {
    let mut rig = Rig::start().await;
    rig.reconnect = Duration::from_secs(20);
    let _worker = rig.worker("w0");
    let mut guest = rig.guest().await;
    guest.welcome_as(5, &rig.spec);
    let alone = guest.join.clone();
    guest.form(1, 0, &[&alone], 0);
    guest.ready().await;
    drop(guest);
    let mut old = rig.guest().await;
    old.welcome_as(4, &rig.spec);
    assert!(old.hear().await.is_none(), "it hangs up");
    let mut new = rig.guest().await;
    new.welcome_as(6, &rig.spec);
    new.form(1, 0, &[&alone], 0);
    assert_eq!(new.ready().await.step, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_comes_back_evaluates_as_much_as_its_new_coordinator_says() {
    let mut rig = Rig::start().await;
    rig.reconnect = Duration::from_secs(20);
    let many = 3;
    Arc::make_mut(&mut rig.spec).evaluation.sequences = many;
    let (_workers, mut guests) = rig.cluster(1).await;
    guests[0].evaluate(1, 0, 0..many + 2);
    assert_eq!(guests[0].evaluated().await.tokens, 8 * many);
    drop(guests);
    let mut guest = rig.guest().await;
    let mut spec = (*rig.spec).clone();
    spec.evaluation.sequences = many + 2;
    guest.welcome_as(2, &spec);
    let alone = guest.join.clone();
    guest.form(1, 0, &[&alone], 0);
    guest.ready().await;
    guest.evaluate(1, 0, 0..many + 2);
    assert_eq!(guest.evaluated().await.tokens, 8 * (many + 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_coordinator_does_not_come_back_gives_up() {
    let mut rig = Rig::start().await;
    rig.reconnect = Duration::from_millis(300);
    let worker = rig.worker("w0");
    drop(rig.welcome().await);
    rig.hang_up();
    let error = worker.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("no coordinator answers at"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_whose_coordinator_does_not_come_back_leave_one_checkpoint_of_the_newest_step() {
    let mut rig = Rig::start().await;
    rig.reconnect = Duration::from_millis(300);
    rig.claim_run().await;
    let (workers, mut guests) = rig.cluster(2).await;
    steps(&mut guests, 1, 1..=3).await;
    rig.hang_up();
    drop(guests);
    let mut ends = Vec::new();
    for worker in workers {
        ends.push(worker.await.unwrap().unwrap_err().to_string());
    }
    assert!(ends[0].ends_with("; saved the state of step 3 as a checkpoint"), "{ends:?}");
    assert!(ends[1].ends_with("; the state of step 3 is saved as a checkpoint"), "{ends:?}");
    let checkpoints = rig.checkpoints();
    assert_eq!(checkpoints.list().await.unwrap(), [Step(3)]);
    let (manifest, _) = checkpoints.load(Step(3)).await.unwrap();
    assert_eq!(manifest.trajectory, rig.spec.trajectory_digest());
    let memory = checkpoints.memory(Step(3)).await.unwrap().unwrap();
    let held = v1::Held::from_bytes(&memory).unwrap();
    assert_eq!(held.recent.iter().map(|vote| vote.step).collect::<Vec<_>>(), [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_of_a_run_that_was_begun_anew_leave_nothing_in_it() {
    let mut rig = Rig::start().await;
    rig.reconnect = Duration::from_millis(300);
    // The second claim begins the run anew, while the workers know incarnation 1.
    rig.claim_run().await;
    rig.claim_run().await;
    let (mut workers, mut guests) = rig.cluster(1).await;
    steps(&mut guests, 1, 1..=1).await;
    rig.hang_up();
    drop(guests);
    let end = workers.remove(0).await.unwrap().unwrap_err().to_string();
    assert!(end.ends_with("begun anew, so that the state is of no use"), "{end}");
    assert_eq!(rig.checkpoints().list().await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_worker_says_why() {
    let mut rig = Rig::start().await;
    let worker = rig.worker("w0");
    let guest = rig.guest().await;
    guest.say(v1::coordinator_message::Kind::Refused(v1::Refused {
        reason: "too late".into(),
        for_now: false,
    }));
    let error = worker.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the coordinator refused this worker: too late");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_data_is_told_to_the_coordinator_before_the_worker_ends() {
    let mut rig = Rig::start().await;
    let worker = rig.worker("w0");
    let mut guest = rig.guest().await;
    let mut spec = (*rig.spec).clone();
    spec.run.store = "memory://an-empty-store".into();
    guest.welcome(&spec);
    let failed = guest.failed().await;
    assert_eq!(failed.cause(), Cause::Store);
    assert!(failed.detail.contains("no dataset `text`"), "{}", failed.detail);
    guest.form(4, 0, &[&guest.join.clone()], 0);
    assert_eq!(guest.failed().await.generation, 4, "the generation must not wait for this worker");
    guest.finish("go");
    drop(guest);
    assert!(matches!(worker.await.unwrap(), Err(WorkerError::Data(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_worker_still_beats() {
    let mut rig = Rig::start().await;
    let (_workers, mut guests) = rig.cluster(2).await;
    guests[0].plan(1, 1, 0..4); // waits in the ring for ever
    for _ in 0..3 {
        guests[0].beat().await;
    }
}

#[tokio::test]
async fn nobody_at_the_address_is_said_after_the_time_given() {
    // Nobody else gets a port that is bound, and nobody listens on it.
    let nobody = tokio::net::TcpSocket::new_v4().unwrap();
    nobody.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    let mut settings = crate::WorkerSettings::new(url.clone(), "w0");
    settings.connect_timeout = Duration::from_millis(300);
    let error = crate::run(settings).await.unwrap_err();
    assert!(matches!(error, WorkerError::Connect { .. }), "{error}");
    assert!(error.to_string().contains(&url), "{error}");
    for url in ["no url at all", "https://example.invalid:1", "localhost:80"] {
        let error = crate::run(crate::WorkerSettings::new(url, "w0")).await.unwrap_err();
        assert!(matches!(error, WorkerError::Url { .. }), "{url}: {error}");
    }
}

impl Rig {
    /// What a coordinator does once all parts are there.
    async fn commit_checkpoint(&self, step: u64, parts: &[v1::PartSaved]) {
        let entry = |part: &v1::PartSaved| PartEntry {
            file: part.file.clone(),
            bytes: part.bytes,
            digest: Digest::from_bytes(&part.digest).unwrap(),
            tensors: part.tensors,
        };
        let manifest = CheckpointManifest {
            version: CheckpointManifest::VERSION,
            run: self.spec.run.name.clone(),
            step: Step(step),
            cursor: Cursor::default(),
            trajectory: self.spec.trajectory_digest(),
            generation: looptrain_proto::Generation(1),
            weights_digest: Digest::from_bytes(&parts[0].weights_digest).unwrap(),
            parts: parts.iter().map(entry).collect(),
            trend: None,
        };
        let store = Store::open(&self.spec.run.store).unwrap();
        Checkpoints::new(&store, &self.spec.run.name).commit(&manifest).await.unwrap();
    }
}
