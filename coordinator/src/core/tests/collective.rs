//! What a generation reduces with: NCCL where all its members can, the ring of TCP connections elsewhere.

use super::*;

const NEWEST: u32 = 23_203;

/// A worker that can reduce over this version of NCCL.
fn join(rig: &mut Rig, name: &str, nccl_version: u32) -> WorkerId {
    rig.join_as(v1::Join { nccl_version, ..introduction(name) })
}

fn formed_over(versions: &[u32], overrides: &[&str]) -> (Rig, Vec<WorkerId>, v1::Collective) {
    let wanted = format!("cluster.workers={}", versions.len());
    let overrides: Vec<&str> = overrides.iter().copied().chain([wanted.as_str()]).collect();
    let mut rig = Rig::new(&overrides);
    let names = (0..versions.len()).map(|worker| format!("w{worker}"));
    let ids: Vec<WorkerId> =
        names.zip(versions).map(|(name, version)| join(&mut rig, &name, *version)).collect();
    let forms: Vec<v1::Collective> = ids.iter().map(|id| rig.form_of(*id).collective()).collect();
    assert!(forms.iter().all(|form| *form == forms[0]), "all members are told the same");
    let collective = forms[0];
    (rig, ids, collective)
}

#[test]
fn members_with_one_version_of_nccl_reduce_over_it_and_others_over_tcp() {
    for (versions, overrides, expected) in [
        (&[NEWEST, NEWEST][..], &[][..], v1::Collective::Nccl),
        (&[NEWEST, 0], &[], v1::Collective::Tcp),
        (&[NEWEST, 22_800], &[], v1::Collective::Tcp),
        (&[0, 0], &[], v1::Collective::Tcp),
        (&[NEWEST], &[], v1::Collective::Tcp),
        (&[NEWEST, NEWEST], &["cluster.collective=tcp"], v1::Collective::Tcp),
        (&[NEWEST, 22_800], &["cluster.collective=nccl"], v1::Collective::Nccl),
    ] {
        let (rig, _, collective) = formed_over(versions, overrides);
        assert_eq!(collective, expected, "{versions:?} {overrides:?}");
        let odd = versions.iter().any(|version| *version != versions[0]) && overrides.is_empty();
        assert_eq!(rig.core.reason.contains("over TCP"), odd, "{}", rig.core.reason);
    }
    let (rig, ..) = formed_over(&[NEWEST, 0], &[]);
    assert!(rig.core.reason.ends_with("over TCP, since w0 has NCCL 2.32.3 and w1 none"));
}

#[test]
fn a_run_that_demands_nccl_refuses_who_cannot() {
    let mut rig = Rig::new(&["cluster.collective=nccl"]);
    let refused = join(&mut rig, "w0", 0);
    let Directive::Refused(answer) = rig.last_sent(refused) else { panic!("let in") };
    assert!(answer.reason.contains("worker w0 cannot reduce over NCCL"), "{}", answer.reason);
    join(&mut rig, "w1", NEWEST);
    assert_eq!(rig.core.roster.len(), 1);
}

#[test]
fn what_rank_0_says_is_passed_on_to_the_others_of_its_generation() {
    let (mut rig, ids, _) = formed_over(&[NEWEST; 3], &[]);
    let said =
        |generation| Report::Communicator { generation: Generation(generation), id: vec![7] };
    rig.say(ids[0], said(1));
    for other in &ids[1..] {
        let Directive::Communicator(heard) = rig.last_sent(*other) else { panic!("not told") };
        assert_eq!((heard.generation, heard.id.as_slice()), (1, &[7][..]));
    }
    assert!(matches!(rig.last_sent(ids[0]), Directive::Form(_)), "it knows");
    // Nobody else has a say, nor in another generation, nor when nobody forms one.
    rig.say(ids[1], said(1));
    rig.say(ids[0], said(2));
    rig.ready_all();
    rig.say(ids[0], said(1));
    assert_eq!(rig.ignored.len(), 3, "{:?}", rig.ignored);
    let (mut rig, ids, _) = formed_over(&[NEWEST, 0], &[]);
    rig.say(ids[0], said(1));
    assert_eq!(rig.ignored.len(), 1);
}

#[test]
fn members_that_nccl_does_not_connect_go_on_over_tcp_until_one_of_them_is_gone() {
    let (mut rig, ids, _) = formed_over(&[NEWEST; 3], &[]);
    let fail = |rig: &mut Rig| {
        let worker = rig.members()[1];
        rig.failed(worker, Cause::Peer, "NCCL does not connect the 3 ranks within 30.0 s");
        rig.pass(1.5);
    };
    fail(&mut rig);
    assert_eq!(rig.form_of(ids[0]).collective(), v1::Collective::Nccl, "once more");
    fail(&mut rig);
    assert_eq!(rig.form_of(ids[0]).collective(), v1::Collective::Tcp);
    assert!(rig.core.reason.contains("NCCL did not connect them"), "{}", rig.core.reason);
    rig.ready_all();
    rig.run_to(1);
    // A ring that breaks later is no reason to try again.
    rig.failed(ids[2], Cause::Peer, "lost rank 1");
    rig.pass(1.5);
    assert_eq!(rig.form_of(ids[0]).collective(), v1::Collective::Tcp);
    rig.ready_all();
    rig.kill(ids[1]);
    assert_eq!(rig.form_of(ids[0]).collective(), v1::Collective::Nccl);
}

#[test]
fn a_run_that_demands_nccl_does_not_fall_back() {
    let (mut rig, ids, _) = formed_over(&[NEWEST; 2], &["cluster.collective=nccl"]);
    for _ in 0..5 {
        rig.failed(ids[1], Cause::Peer, "NCCL does not connect the 2 ranks within 30.0 s");
        rig.pass(1.5);
        if rig.result.is_some() {
            break;
        }
        assert_eq!(rig.form_of(ids[0]).collective(), v1::Collective::Nccl);
    }
}

#[test]
fn what_is_encrypted_stays_so_unless_the_spec_says_otherwise() {
    for (overrides, expected) in
        [(&[][..], v1::Collective::Tcp), (&["cluster.collective=nccl"], v1::Collective::Nccl)]
    {
        let mut rig = Rig::new(overrides);
        let secured =
            |name| v1::Join { nccl_version: NEWEST, encrypted: true, ..introduction(name) };
        rig.join_as(secured("w0"));
        let second = rig.join_as(secured("w1"));
        assert_eq!(rig.form_of(second).collective(), expected);
        let told = rig.core.reason.contains("NCCL does not encrypt");
        assert_eq!(told, expected == v1::Collective::Tcp, "{}", rig.core.reason);
    }
}
