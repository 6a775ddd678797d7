//! Small runs for the tests of this crate.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use looptrain_proto::spec::Source;
use looptrain_proto::transport::{Authority, Credentials, Identity, Role};
use looptrain_proto::{Digest, Generation, Incarnation, Rank, Spec};
use looptrain_storage::Store;

use crate::reduce::Collective;
use crate::reduce::tcp::{Peer, PeerListener, Ring, RingId};

/// A spec that trains in milliseconds; its dataset is to be made with [`tiny_dataset`].
pub(crate) fn tiny_spec(store: &str) -> Spec {
    let text = format!(
        r#"
        [run]
        name = "tiny"
        store = "{store}"
        seed = 7
        [cluster]
        worker_timeout = 0.4
        [model]
        hidden_size = 16
        num_hidden_layers = 1
        num_attention_heads = 2
        intermediate_size = 24
        vocab_size = 300
        [[datasets]]
        name = "text"
        [[stages]]
        name = "only"
        steps = 4
        sequence_length = 8
        slots = 4
        slot_sequences = 2
        loops = 2
        entropy_weight = 0.05
        learning_rate = {{ peak = 1e-2 }}
        "#
    );
    Spec::parse("tiny.toml", &text, &[]).expect("the spec above is consistent")
}

/// Makes the dataset of [`tiny_spec`] in its store, from words that repeat enough to be learnt.
pub(crate) async fn tiny_dataset(store: &Store) {
    let texts = tempfile::tempdir().expect("a temporary directory");
    for document in 0..60u32 {
        let line = |line: u32| format!("let x{} = y{} + {};\n", line % 7, document % 5, line);
        let text: String = (0..20).map(line).collect();
        let path = texts.path().join(format!("text-{document}.rs"));
        std::fs::write(path, text).expect("a temporary file");
    }
    let source = Source {
        paths: vec![texts.path().display().to_string()],
        tokenizer_vocabulary: 300,
        validation_fraction: 0.2,
        ..Source::default()
    };
    let made = looptrain_storage::prepare(store, "text", &source, &|_| {}).await;
    made.expect("the dataset can be made");
}

/// A store of its own with the dataset in it.
pub(crate) async fn tiny_store() -> (Arc<Spec>, Store) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let url = format!("memory://worker-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let store = Store::open(&url).expect("a store in memory");
    tiny_dataset(&store).await;
    (Arc::new(tiny_spec(&url)), store)
}

/// Credentials of a role, signed by `authority`.
pub(crate) fn credentials(authority: &Authority, role: Role) -> Arc<Credentials> {
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    let identity = Identity::new(role, "test").expect("a name");
    let issued = authority.issue(&identity, &[], now - hour..now + hour).expect("a certificate");
    let directory = tempfile::tempdir().expect("a directory");
    issued.write(directory.path(), false).expect("it can be written");
    Credentials::load(directory.path(), &[role]).expect("they are good")
}

/// An authority of the next hour.
pub(crate) fn authority() -> Authority {
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    Authority::new("test", now - hour..now + hour).expect("an authority")
}

/// A ring whose ranks are all here.
pub(crate) async fn ring(world: u32) -> Vec<Collective> {
    let id = RingId { incarnation: Incarnation(1), generation: Generation(1) };
    let (mut peers, mut members) = (Vec::new(), Vec::new());
    for rank in (0..world).map(Rank) {
        let address = ([127, 0, 0, 1], 0).into();
        let listener = PeerListener::bind(address).await.expect("a port is free");
        let address = listener.address().to_string();
        members.push(Peer { rank, name: format!("w{rank}"), address });
        peers.push((rank, listener.serve(Digest::of(b"run")).0));
    }
    let formed = peers.iter().map(|(rank, peers)| {
        // Nothing here takes nearly this long, however busy the machine is.
        Ring::form(peers, id, *rank, &members, 2, Duration::from_secs(45))
    });
    futures::future::try_join_all(formed).await.expect("the loopback connects")
}
