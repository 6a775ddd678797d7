//! Who may join, order and look, over real connections within TLS.
#![allow(clippy::unwrap_used)]

// Not all of it is used here.
#[allow(dead_code)]
mod fake;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Buf, BufMut, Bytes};
use fake::{Manner, PATIENCE, Session, join, reach, settings, spec, weights, work_in};
use looptrain_coordinator::http::{Access, Tokens};
use looptrain_coordinator::{RunEvent, Running, Started, start};
use looptrain_proto::transport::{
    Authority, Connection, Credentials, Identity, Issued, Port, Role,
};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{self, coordinator_message as down, worker_message as up};
use looptrain_proto::{Spec, Step};
use looptrain_storage::Store;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// An authority and what it signed.
struct Pki {
    authority: Authority,
    directory: TempDir,
}

impl Pki {
    fn new() -> Self {
        let authority = Authority::new("test", valid()).unwrap();
        Self { authority, directory: TempDir::new().unwrap() }
    }

    fn issue(&self, role: Role) -> Issued {
        let identity = Identity::new(role, "somebody").unwrap();
        self.authority.issue(&identity, &["localhost".to_owned()], valid()).unwrap()
    }

    fn credentials(&self, role: Role) -> Arc<Credentials> {
        let directory = self.path(role.name());
        self.issue(role).write(&directory, true).unwrap();
        Credentials::load(directory, &[role]).unwrap()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }
}

fn valid() -> std::ops::Range<SystemTime> {
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    now - hour..now + hour
}

/// A coordinator that shows a certificate, with a page.
async fn launch(spec: &Spec, store: &Store, pki: &Pki, tokens: Option<&Path>) -> Running {
    let credentials = Some(pki.credentials(Role::Coordinator));
    let mut settings = settings(spec, store, &CancellationToken::new());
    settings.dashboard = Some("127.0.0.1:0".parse().unwrap());
    settings.credentials = credentials.clone();
    let tokens = tokens.map(|path| Tokens::load(path).unwrap());
    settings.access = Access { credentials, tokens };
    settings.render_metrics = Some(Arc::new(|| "looptrain_up 1\n".into()));
    match start(settings).await.unwrap() {
        Started::Running(running) => running,
        Started::Finished(outcome) => panic!("the run is over already: {outcome:?}"),
    }
}

/// Works in the run with a worker's certificate.
fn hire(running: &Running, store: &Store, pki: &Pki, name: &str, manner: Manner) {
    let (address, store, name) = (running.address, store.clone(), name.to_owned());
    let credentials = pki.credentials(Role::Worker);
    tokio::spawn(async move {
        let channel = reach(address, Some(&credentials)).await;
        let session = Session::over(channel, join(&name)).await.unwrap();
        work_in(session, store, manner).await
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_does_what_the_role_allows_and_nothing_else() {
    let (spec, store, pki) = (spec("roles", &[]), Store::open("memory://").unwrap(), Pki::new());
    let running = launch(&spec, &store, &pki, None).await;
    let address = running.address;
    let denied = |status: tonic::Status, role: Role| {
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        let named = format!("spiffe://looptrain/{role}/somebody may not");
        assert!(status.message().contains(&named), "{status}");
    };
    for role in Role::ALL {
        let credentials = pki.credentials(role);
        let channel = reach(address, Some(&credentials)).await;
        let mut client = CoordinatorClient::new(channel.clone());

        let seen = client.status(v1::StatusRequest {}).await;
        match role {
            Role::Viewer | Role::Operator => assert_eq!(seen.unwrap().into_inner().run, "roles"),
            _ => denied(seen.unwrap_err(), role),
        }
        let paused = client.pause(v1::PauseRequest { reason: String::new() }).await;
        let resumed = client.resume(v1::ResumeRequest {}).await;
        let saved = client.save(v1::SaveRequest {}).await;
        let drained = client.drain(v1::DrainRequest { worker: "w".into(), reason: "".into() });
        let drained = drained.await.unwrap_err();
        match role {
            Role::Operator => {
                assert!(paused.is_ok() && resumed.is_ok() && saved.is_ok());
                assert_eq!(drained.code(), Code::FailedPrecondition, "there is no such worker");
            }
            _ => {
                denied(paused.unwrap_err(), role);
                denied(resumed.unwrap_err(), role);
                denied(saved.unwrap_err(), role);
                denied(drained, role);
                let stopped = client.stop(v1::StopRequest { reason: String::new() }).await;
                denied(stopped.unwrap_err(), role);
            }
        }
        let joined = Session::over(channel, join("w")).await;
        match role {
            // It goes at once: nobody works in this run.
            Role::Worker => {
                let mut session = joined.unwrap();
                assert!(matches!(session.hear().await, Some(down::Kind::Welcome(_))));
            }
            _ => denied(joined.err().unwrap(), role),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_within_tls_ends_with_the_same_weights_and_a_join_sent_again_changes_nothing() {
    let (spec, store, pki) = (spec("again", &[]), Store::open("memory://").unwrap(), Pki::new());
    let mut running = launch(&spec, &store, &pki, None).await;
    hire(&running, &store, &pki, "w0", Manner::Well);
    // Whoever has a certificate may send another's join, word for word; it is taken for what it is.
    loop {
        let event = timeout(PATIENCE, running.events.recv()).await.unwrap().unwrap();
        if matches!(event, RunEvent::WorkerJoined { .. }) {
            break;
        }
    }
    for _ in 0..3 {
        let credentials = pki.credentials(Role::Worker);
        let channel = reach(running.address, Some(&credentials)).await;
        let mut session = Session::over(channel, join("w0")).await.unwrap();
        match session.hear().await {
            Some(down::Kind::Refused(refused)) => {
                assert!(refused.reason.contains("worker w0 already"), "{}", refused.reason);
            }
            other => panic!("it was answered with {other:?}"),
        }
    }
    hire(&running, &store, &pki, "w1", Manner::Well);
    let outcome = timeout(PATIENCE, running.wait()).await.unwrap().unwrap();
    assert_eq!((outcome.step, outcome.weights_digest), (Step(12), Some(weights(12))));
}

/// Sends bytes as they are, in the frames of gRPC.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, tonic::Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_too_large_or_of_no_sense_end_their_session_and_no_other() {
    let (spec, store, pki) = (spec("bad", &[]), Store::open("memory://").unwrap(), Pki::new());
    let running = launch(&spec, &store, &pki, None).await;
    let credentials = pki.credentials(Role::Worker);
    // As the first message, and as the second of one that has joined.
    let large = join(&"x".repeat(17 << 20));
    let channel = reach(running.address, Some(&credentials)).await;
    let ended = match Session::over(channel, large).await {
        Ok(mut session) => session.hear().await.is_none(),
        Err(status) => status.code() == Code::OutOfRange,
    };
    assert!(ended);
    let channel = reach(running.address, Some(&credentials)).await;
    let mut session = Session::over(channel, join("large")).await.unwrap();
    assert!(matches!(session.hear().await, Some(down::Kind::Welcome(_))));
    session.say(up::Kind::Leave(v1::Leave { reason: "x".repeat(17 << 20) })).await;
    assert!(session.hear().await.is_none());

    for bytes in [&b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"[..], b"\x0a\x7f", b"{}", b""] {
        let channel = reach(running.address, Some(&credentials)).await;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let messages = futures::stream::iter(vec![Bytes::from_static(bytes); 3]);
        let path = "/looptrain.v1.Coordinator/Session".parse().unwrap();
        let answer = client.streaming(tonic::Request::new(messages), path, Raw).await;
        // Told that a session starts with a join, or that this is no message, or hung up on.
        let heard = async {
            let Ok(answer) = answer else { return };
            let mut answer = answer.into_inner();
            while let Ok(Some(_)) = answer.message().await {}
        };
        timeout(PATIENCE, heard).await.unwrap();
    }
    for name in ["w0", "w1"] {
        hire(&running, &store, &pki, name, Manner::Well);
    }
    let outcome = timeout(PATIENCE, running.wait()).await.unwrap().unwrap();
    assert_eq!(outcome.weights_digest, Some(weights(12)));
}

/// One request to the page, over a connection that is there.
async fn ask(mut connection: Connection, request: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    let text = format!(
        "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\
         {headers}\r\n{body}"
    );
    connection.write_all(text.as_bytes()).await.unwrap();
    connection.flush().await.unwrap();
    let mut reply = String::new();
    timeout(PATIENCE, connection.read_to_string(&mut reply)).await.unwrap().unwrap();
    reply
}

fn status(reply: &str) -> u16 {
    reply.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_is_for_those_with_a_certificate_or_a_token() {
    let (spec, store, pki) = (spec("page", &[]), Store::open("memory://").unwrap(), Pki::new());
    let tokens = pki.path("tokens");
    std::fs::write(&tokens, "# ours\n\n0123456789abcdef0123\n").unwrap();
    let running = launch(&spec, &store, &pki, Some(&tokens)).await;
    let page = running.dashboard.unwrap();
    let paths = ["/", "/page.js", "/api/status", "/api/steps", "/metrics"];
    let others = ["/api/live", "/nothing", "/login/x"];
    for role in Role::ALL {
        let may = matches!(role, Role::Viewer | Role::Operator);
        for path in paths {
            let stream = TcpStream::connect(page).await.unwrap();
            let connection = pki.credentials(role).connect(stream, Port::Page).await;
            let reply = ask(connection.unwrap(), &format!("GET {path}"), "", "").await;
            assert_eq!(status(&reply), if may { 200 } else { 401 }, "{role} at {path}: {reply}");
            assert!(reply.contains("content-security-policy: default-src 'self'"), "{reply}");
        }
    }
    // A worker's certificate stands for a browser's, which has none that counts.
    let nobody = pki.credentials(Role::Worker);
    let visit = async |request: &str, headers: &str, body: &str| {
        let stream = TcpStream::connect(page).await.unwrap();
        let connection = nobody.connect(stream, Port::Page).await.unwrap();
        ask(connection, request, headers, body).await
    };
    for path in paths {
        let bearer = "Authorization: Bearer 0123456789abcdef0123\r\n";
        assert_eq!(status(&visit(&format!("GET {path}"), bearer, "").await), 200);
        for wrong in ["", "Authorization: Bearer 0123456789abcdef0124\r\n", "Cookie: a=b; c\r\n"] {
            let reply = visit(&format!("GET {path}"), wrong, "").await;
            assert_eq!(status(&reply), 401, "{path} with {wrong}");
            assert!(!reply.contains("\"run\"") && !reply.contains("looptrain_up"), "{reply}");
        }
    }
    for path in others {
        assert_eq!(status(&visit(&format!("GET {path}"), "", "").await), 401, "{path}");
    }
    for method in ["HEAD", "OPTIONS", "DELETE"] {
        assert_eq!(status(&visit(&format!("{method} /api/status"), "", "").await), 401);
    }
    assert_eq!(status(&visit("GET /login", "", "").await), 303);
    // Whoever announces more than he says, or says more than a form holds, is not waited for.
    let late = visit("POST /login", "Content-Type: text/plain\r\nX: y\r\n", "").await;
    assert_eq!(status(&late), 401);
    let form = visit("GET /", "", "").await;
    assert!(form.contains("<form method=\"post\" action=\"/login\">"), "{form}");
    let wrong = visit("POST /login", "", "token=0123456789abcdef0124").await;
    assert!(status(&wrong) == 401 && wrong.contains("not known") && !wrong.contains("set-cookie"));
    assert_eq!(status(&visit("POST /login", "", &"x".repeat(5000)).await), 401);
    let right = visit("POST /login", "", "token=0123456789abcdef0123").await;
    assert_eq!(status(&right), 303, "{right}");
    let cookie = right.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
    for word in ["HttpOnly", "SameSite=Lax", "Secure"] {
        assert!(cookie.contains(word), "{cookie}");
    }
    assert!(!cookie.contains("0123456789abcdef0123"), "the token itself stays with its holder");
    let kept = format!("Cookie: {}\r\n", cookie.split(';').next().unwrap());
    assert_eq!(status(&visit("GET /api/status", &kept, "").await), 200);
    // The cookie holds as long as the token.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    std::fs::write(&tokens, "another-token-0123456789\n").unwrap();
    assert_eq!(status(&visit("GET /api/status", &kept, "").await), 401);
    // What is no file of tokens changes nothing.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    std::fs::write(&tokens, "short\n").unwrap();
    let bearer = "Authorization: Bearer another-token-0123456789\r\n";
    assert_eq!(status(&visit("GET /api/status", bearer, "").await), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_who_never_ends_a_request_is_hung_up_on() {
    let (spec, store) = (spec("slow", &[]), Store::open("memory://").unwrap());
    let mut settings = settings(&spec, &store, &CancellationToken::new());
    settings.dashboard = Some("127.0.0.1:0".parse().unwrap());
    let Started::Running(running) = start(settings).await.unwrap() else { panic!() };
    let page: SocketAddr = running.dashboard.unwrap();
    let mut slow = TcpStream::connect(page).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let begin = Instant::now();
    let hung_up = async {
        // A header every now and then, for ever.
        loop {
            if slow.write_all(b"X-More: and more\r\n").await.is_err() {
                break;
            }
            let more = timeout(Duration::from_millis(500), slow.read(&mut [0; 512])).await;
            if matches!(more, Ok(Ok(0) | Err(_))) {
                break;
            }
        }
    };
    timeout(PATIENCE, hung_up).await.unwrap();
    // Nor is the rest of a form waited for, which never comes.
    let mut half = TcpStream::connect(page).await.unwrap();
    let form = "POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n";
    half.write_all(form.as_bytes()).await.unwrap();
    let mut reply = String::new();
    timeout(PATIENCE, half.read_to_string(&mut reply)).await.unwrap().unwrap();
    assert!(reply.contains("connection: close"), "{reply}");
    assert!(begin.elapsed() > Duration::from_secs(5), "not for what it said");
}

#[test]
fn a_file_of_tokens_that_is_none_is_refused_by_line_and_remedy() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("tokens");
    let refused = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Tokens::load(&path).unwrap_err().to_string()
    };
    assert!(refused("").contains("no token"));
    assert!(refused("# only words\n").contains("certs token"));
    assert!(refused("0123456789abcdef\nshort\n").contains("line 2"));
    assert!(refused("0123456789abcdef 0\n").contains("letters"));
    std::fs::remove_file(&path).unwrap();
    assert!(Tokens::load(&path).is_err());
}
