//! Who gets through, and what the others are told. All certificates are real ones.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::verify::{OwnerOf, SharedRevoked};
use super::*;

/// Nothing here takes nearly this long, however busy the machine is.
const SOON: Duration = Duration::from_secs(45);

const HOUR: Duration = Duration::from_secs(3600);

fn now() -> Range<SystemTime> {
    SystemTime::now() - HOUR..SystemTime::now() + HOUR
}

fn past() -> Range<SystemTime> {
    SystemTime::now() - 2 * HOUR..SystemTime::now() - HOUR
}

fn authority() -> Authority {
    // All of one name: only their keys tell them apart.
    Authority::new("test", now()).unwrap()
}

fn of(role: Role) -> Identity {
    Identity::new(role, format!("the-{role}")).unwrap()
}

/// A directory with a certificate of a role.
fn issued(authority: &Authority, role: Role) -> TempDir {
    let directory = TempDir::new().unwrap();
    let issued = authority.issue(&of(role), &["localhost".to_owned()], now()).unwrap();
    issued.write(directory.path(), false).unwrap();
    directory
}

fn credentials(authority: &Authority, role: Role) -> Arc<Credentials> {
    Credentials::load(issued(authority, role).path(), &[role]).unwrap()
}

/// A client that looks at nothing itself: it shows a certificate that is not for showing, or none.
async fn call_with(
    shown: Option<(&Authority, Range<SystemTime>)>,
    stream: TcpStream,
    port: Port,
    owner: &Authority,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let directory = TempDir::new().unwrap();
    owner.write(directory.path()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(directory.path().join("ca.crt")).unwrap()).unwrap();
    let verifier = OwnerOf::new(
        Arc::new(roots),
        Arc::clone(&provider),
        port.owner(),
        SharedRevoked::default(),
    );
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match shown {
        None => builder.with_no_client_auth(),
        Some((authority, valid)) => {
            let directory = TempDir::new().unwrap();
            let issued = authority.issue(&of(Role::Worker), &[], valid).unwrap();
            issued.write(directory.path(), false).unwrap();
            let path = |name| directory.path().join(name);
            let chain = vec![CertificateDer::from_pem_file(path("tls.crt")).unwrap()];
            let key = PrivateKeyDer::from_pem_file(path("tls.key")).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = vec![port.language().to_vec()];
    let name = ServerName::try_from("looptrain").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// Both ends of a connection on this machine.
async fn wire() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

/// What both sides say of a connection between two processes.
async fn meet(
    caller: &Arc<Credentials>,
    owner: &Arc<Credentials>,
    port: Port,
) -> (std::io::Result<Connection>, std::io::Result<Connection>) {
    let (near, far) = wire().await;
    tokio::join!(caller.connect(near, port), owner.accept(far, port))
}

#[tokio::test]
async fn both_ends_know_who_the_other_is_and_what_is_sent_arrives() {
    let authority = authority();
    let worker = credentials(&authority, Role::Worker);
    let coordinator = credentials(&authority, Role::Coordinator);
    let (near, far) = meet(&worker, &coordinator, Port::Coordinator).await;
    let (mut near, mut far) = (near.unwrap(), far.unwrap());
    assert_eq!(near.identity(), Some(&of(Role::Coordinator)));
    assert_eq!(far.identity(), Some(&of(Role::Worker)));
    let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let sending = async {
        near.write_all(&sent).await.unwrap();
        near.flush().await.unwrap();
    };
    let mut got = vec![0; sent.len()];
    let (_, read) = tokio::join!(sending, far.read_exact(&mut got));
    assert!(read.is_ok() && got == sent);
    // Whoever is killed says no farewell: that is an end like any other.
    let peeking = std::future::poll_fn(|cx| far.poll_peek(cx));
    assert!(timeout(Duration::from_millis(20), peeking).await.is_err(), "there is nothing");
    drop(near);
    assert_eq!(std::future::poll_fn(|cx| far.poll_peek(cx)).await.unwrap(), 0);
    assert_eq!(far.read(&mut [0; 8]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_port_takes_those_whose_place_it_is() {
    let authority = authority();
    let all: Vec<_> = Role::ALL.map(|role| credentials(&authority, role)).into();
    let [coordinator, worker, operator, viewer] = all.as_slice() else { panic!() };
    for caller in [worker, operator, viewer] {
        let (near, far) = meet(caller, coordinator, Port::Coordinator).await;
        assert!(near.is_ok() && far.is_ok());
    }
    assert!(meet(worker, worker, Port::Peers).await.1.is_ok());
    for caller in [coordinator, operator, viewer] {
        let error = meet(caller, worker, Port::Peers).await.1.unwrap_err().to_string();
        assert!(error.contains("and not of role worker"), "{error}");
    }
    // Nobody can pass for the coordinator, nor for a worker.
    for owner in [worker, operator, viewer] {
        let error = meet(worker, owner, Port::Coordinator).await.0.unwrap_err().to_string();
        assert!(error.contains("and not of role coordinator"), "{error}");
        assert!(meet(operator, owner, Port::Coordinator).await.0.is_err());
    }
    assert!(meet(worker, coordinator, Port::Peers).await.0.is_err());
}

#[tokio::test]
async fn a_certificate_that_is_not_good_is_refused_and_both_sides_are_told_why() {
    let (ours, theirs) = (authority(), authority());
    let coordinator = credentials(&ours, Role::Coordinator);
    for (shown, told) in [
        (None, "no certificate"),
        (Some((&theirs, now())), "another authority"),
        (Some((&ours, past())), "expired"),
        (Some((&ours, SystemTime::now() + HOUR..SystemTime::now() + 2 * HOUR)), "not valid yet"),
    ] {
        let (near, far) = wire().await;
        let calling = async {
            let mut stream = call_with(shown, near, Port::Coordinator, &ours).await?;
            // A client of TLS 1.3 hears of it when it reads.
            stream.read(&mut [0]).await
        };
        let (called, accepted) = tokio::join!(calling, coordinator.accept(far, Port::Coordinator));
        let error = accepted.unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
        assert!(called.is_err());
    }
    // Whose own authority is another one does not talk to this coordinator, whatever its name is.
    let theirs = Authority::new("another", now()).unwrap();
    let stranger = credentials(&theirs, Role::Worker);
    let (near, far) = meet(&stranger, &coordinator, Port::Coordinator).await;
    let error = near.unwrap_err().to_string();
    assert!(error.contains("another authority than ours"), "{error}");
    let error = far.unwrap_err().to_string();
    assert!(error.contains("another authority"), "{error}");
}

#[tokio::test]
async fn a_page_is_shown_to_who_has_no_certificate_and_not_to_who_has_a_bad_one() {
    let (ours, theirs) = (authority(), authority());
    let coordinator = credentials(&ours, Role::Coordinator);
    let (near, far) = wire().await;
    let (called, accepted) =
        tokio::join!(call_with(None, near, Port::Page, &ours), coordinator.accept(far, Port::Page));
    assert!(called.is_ok());
    assert_eq!(accepted.unwrap().identity(), None);
    let (near, far) = wire().await;
    let shown = Some((&theirs, now()));
    let (_, accepted) = tokio::join!(
        call_with(shown, near, Port::Page, &ours),
        coordinator.accept(far, Port::Page)
    );
    assert!(accepted.unwrap_err().to_string().contains("another authority"));
}

#[tokio::test]
async fn plain_words_and_tls_do_not_mix_and_say_so() {
    let authority = authority();
    let coordinator = credentials(&authority, Role::Coordinator);
    let (mut near, far) = wire().await;
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let error = coordinator.accept(far, Port::Coordinator).await.unwrap_err().to_string();
    assert!(error.contains("does not speak TLS"), "{error}");
    let (near, mut far) = wire().await;
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let worker = credentials(&authority, Role::Worker);
    let error = worker.connect(near, Port::Coordinator).await.unwrap_err().to_string();
    assert!(error.contains("does not speak TLS"), "{error}");
}

#[tokio::test]
async fn who_opens_a_port_and_closes_it_again_is_no_stranger() {
    let coordinator = credentials(&authority(), Role::Coordinator);
    let (near, far) = wire().await;
    drop(near);
    let refusal = Refusal::unless_it_speaks(&far).await.unwrap_err();
    assert!(matches!(refusal, Refusal::HungUp));
    let (mut near, far) = wire().await;
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    Refusal::unless_it_speaks(&far).await.unwrap();
    let error = coordinator.accept(far, Port::Coordinator).await.unwrap_err();
    assert!(matches!(Refusal::in_tls(error), Refusal::Certificate(_)));
}

#[tokio::test]
async fn renewed_certificates_are_taken_into_use_and_bad_ones_are_not() {
    let authority = authority();
    let directory = issued(&authority, Role::Coordinator);
    let coordinator = Credentials::load(directory.path(), &[Role::Coordinator]).unwrap();
    let worker = credentials(&authority, Role::Worker);
    let shown = async || {
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let (near, far) = meet(&worker, &coordinator, Port::Coordinator).await;
        assert!(far.is_ok());
        near.unwrap().identity().unwrap().name.clone()
    };
    assert_eq!(shown().await, "the-coordinator");
    let renew = |role, name: &str| {
        let identity = Identity::new(role, name).unwrap();
        authority.issue(&identity, &[], now()).unwrap().write(directory.path(), true).unwrap();
    };
    renew(Role::Coordinator, "renewed");
    assert_eq!(shown().await, "renewed");
    // One that may not do this, half a file, none: the old one stays.
    renew(Role::Viewer, "viewer");
    assert_eq!(shown().await, "renewed");
    std::fs::write(directory.path().join("tls.crt"), "-----BEGIN CERTIFICATE-----\nMIIB").unwrap();
    assert_eq!(shown().await, "renewed");
    std::fs::remove_file(directory.path().join("tls.key")).unwrap();
    assert_eq!(shown().await, "renewed");
    renew(Role::Coordinator, "again");
    assert_eq!(shown().await, "again");
}

#[tokio::test]
async fn a_certificate_that_has_been_withdrawn_is_refused_from_then_on() {
    let authority = authority();
    let directory = issued(&authority, Role::Coordinator);
    let coordinator = Credentials::load(directory.path(), &[Role::Coordinator]).unwrap();
    let (lost, kept) =
        (credentials(&authority, Role::Worker), credentials(&authority, Role::Worker));
    assert!(meet(&lost, &coordinator, Port::Coordinator).await.1.is_ok());
    // In the spellings of other programs; and the own one, which is for others to refuse.
    let serial = lost.certificate().serial;
    let plain = serial.replace(':', "").trim_start_matches('0').to_uppercase();
    let own = coordinator.certificate().serial;
    let revoked = directory.path().join("revoked");
    for spelled in [serial.clone(), format!("serial={plain}")] {
        std::fs::write(&revoked, format!("# a machine that was sold\n{spelled}\n{own}\n")).unwrap();
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let error = meet(&lost, &coordinator, Port::Coordinator).await.1.unwrap_err().to_string();
        assert!(error.contains(&serial) && error.contains("withdrawn"), "{error}");
        assert!(meet(&kept, &coordinator, Port::Coordinator).await.1.is_ok());
    }
    // Nor does the list fall with an own certificate that is no good, or a bad line after it.
    std::fs::remove_file(directory.path().join("tls.key")).unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(meet(&lost, &coordinator, Port::Coordinator).await.1.is_err());
    std::fs::write(&revoked, "all of them\n").unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(meet(&lost, &coordinator, Port::Coordinator).await.1.is_err());
    let error = refused(directory.path(), Role::Coordinator);
    assert!(error.contains("revoked") && error.contains("no serial"), "{error}");
}

/// What a directory is refused with.
fn refused(directory: &Path, role: Role) -> String {
    Credentials::load(directory, &[role]).unwrap_err().to_string()
}

#[test]
fn a_directory_without_good_credentials_is_refused_by_name_and_remedy() {
    let (ours, theirs) = (authority(), authority());
    let nothing = TempDir::new().unwrap();
    let error = refused(nothing.path(), Role::Worker);
    assert!(error.contains("ca.crt") && error.contains("certs issue"), "{error}");

    let directory = issued(&ours, Role::Worker);
    let error = refused(directory.path(), Role::Coordinator);
    assert!(error.contains("worker/the-worker") && error.contains("--role coordinator"), "{error}");

    let path = |name: &str| directory.path().join(name);
    let other = issued(&theirs, Role::Worker);
    let take = |name: &str| std::fs::copy(other.path().join(name), path(name)).unwrap();
    take("tls.key");
    let error = refused(directory.path(), Role::Worker);
    assert!(error.contains("tls.key") && error.contains("not the key of"), "{error}");
    take("tls.crt");
    let error = refused(directory.path(), Role::Worker);
    assert!(error.contains("tls.crt") && error.contains("another authority"), "{error}");
    std::fs::write(path("ca.crt"), "nothing\n").unwrap();
    let error = refused(directory.path(), Role::Worker);
    assert!(error.contains("ca.crt") && error.contains("no certificate"), "{error}");

    let ended = TempDir::new().unwrap();
    let issued = ours.issue(&of(Role::Worker), &[], past()).unwrap();
    issued.write(ended.path(), false).unwrap();
    let error = refused(ended.path(), Role::Worker);
    assert!(error.contains("tls.crt") && error.contains("expired"), "{error}");
}

#[test]
fn nothing_that_is_there_is_written_over_and_keys_are_for_their_owner() {
    use std::os::unix::fs::PermissionsExt;

    let authority = authority();
    let directory = TempDir::new().unwrap();
    authority.write(directory.path()).unwrap();
    assert!(authority.write(directory.path()).unwrap_err().to_string().contains("already"));
    let issued = authority.issue(&of(Role::Viewer), &[], now()).unwrap();
    let error = issued.write(directory.path(), false).unwrap_err().to_string();
    assert!(error.contains("of an authority"), "{error}");
    let process = TempDir::new().unwrap();
    issued.write(process.path(), false).unwrap();
    let error = issued.write(process.path(), false).unwrap_err().to_string();
    assert!(error.contains("--renew"), "{error}");
    let mode =
        |path: std::path::PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(directory.path().join("ca.key")), 0o600);
    let key = process.path().join("tls.key");
    assert_eq!(mode(key.clone()), 0o600);
    // A group that was let in stays let in.
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    issued.write(process.path(), true).unwrap();
    assert_eq!(mode(key), 0o640);
    assert!(Authority::load(directory.path()).is_ok());
    let mut left = std::fs::read_dir(directory.path()).unwrap();
    assert!(left.all(|entry| !entry.unwrap().file_name().to_string_lossy().contains("key.")));
    let error = authority.issue(&of(Role::Viewer), &["a b\u{e4}".to_owned()], now()).unwrap_err();
    assert!(error.to_string().contains("a b"), "{error}");
}

/// A gate at which whoever sends `x` is let in.
async fn gate() -> (SocketAddr, mpsc::Receiver<TcpStream>, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = mpsc::channel(16);
    let greet = move |mut stream: TcpStream, _| {
        let sender = sender.clone();
        async move {
            let first = stream.read_u8().await;
            match first {
                Ok(b'x') => sender.send(stream).await.map_err(|_| Refusal::Silent),
                _ => Err(Refusal::Stranger("it did not say x".to_owned())),
            }
        }
    };
    let keeping = Gate::new(Port::Peers).keep(listener, greet);
    (address, receiver, tokio::spawn(keeping))
}

#[tokio::test]
async fn a_thousand_silent_connections_keep_nobody_out() {
    let (address, mut arrived, keeping) = gate().await;
    let gone = Arc::new(AtomicUsize::new(0));
    let mut silent = Vec::new();
    for number in 0..1000 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        if number % 10 == 9 {
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        }
        let gone = Arc::clone(&gone);
        silent.push(tokio::spawn(async move {
            let _ = stream.read(&mut [0]).await;
            gone.fetch_add(1, Ordering::SeqCst);
        }));
        if number % 100 == 50 {
            let mut one_of_us = TcpStream::connect(address).await.unwrap();
            one_of_us.write_all(b"x").await.unwrap();
            timeout(Duration::from_secs(4), arrived.recv()).await.unwrap().unwrap();
        }
    }
    // All are hung up on: the older ones for newer ones, the last when their time is over.
    timeout(SOON, async {
        for one in silent {
            one.await.unwrap();
        }
    })
    .await
    .unwrap();
    assert_eq!(gone.load(Ordering::SeqCst), 1000);
    keeping.abort();
}
