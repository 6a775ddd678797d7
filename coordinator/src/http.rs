//! HTTP on a port of its own: the status page, and `/metrics` of any process.
//!
//! Who may read is an [`Access`]: everybody, or with TLS those with a certificate of an operator or
//! viewer, and in either case those with a token, when there are tokens. A browser shows its token once,
//! on a small page of its own, and gets a cookie for it, which holds as long as the token does.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::get;
use futures::StreamExt;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use looptrain_proto::transport::{Caller, Complaints, Credentials, Port, Refusal, Role};
#[cfg(target_os = "linux")]
use socket2::SockRef;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::listen::introduced;

/// A request's head must be here within this time, the next one's on the same connection too.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);

/// What a request says besides must be here within this time.
const BODY_PATIENCE: Duration = Duration::from_secs(5);

/// Who reads nothing of an answer for this long is hung up on.
const READ_PATIENCE: Duration = Duration::from_secs(30);

/// Connections at a time; live readers of the page have their own limit below it. Those behind
/// [`FOR_ANYBODY`] are for callers with a certificate.
const CONNECTIONS: usize = 512;

/// Connections at a time of callers who have yet to say who they are.
const FOR_ANYBODY: usize = 384;

/// Longest token that is looked at, with what is around it.
const LONGEST_FORM: usize = 1024;

/// The file of tokens is looked at this often, when somebody shows one.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Fewer characters can be guessed.
const SHORTEST_TOKEN: usize = 16;

/// How long readers get for their last answers.
const CLOSING_PATIENCE: Duration = Duration::from_secs(3);

/// A browser keeps its cookie for 30 days.
const COOKIE_SECONDS: u32 = 30 * 24 * 3600;

const LOGIN: &str = include_str!("dashboard/login.html");

/// Who may read.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// With them, HTTPS, for those with a certificate or a token.
    pub credentials: Option<Arc<Credentials>>,
    /// With them, those who know one.
    pub tokens: Option<Arc<Tokens>>,
}

/// A file of tokens, one a line; read again when it changes.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    state: Mutex<KnownTokens>,
}

#[derive(Debug)]
struct KnownTokens {
    cookies: Vec<blake3::Hash>,
    stamp: Option<SystemTime>,
    looked: Instant,
    /// That a newer file is no good.
    told: bool,
}

/// Why a file has no tokens.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}; `looptrain certs token` makes a file with one", path.display())]
pub struct TokensError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub reason: String,
}

impl Tokens {
    /// Reads a file; empty lines and those that begin with `#` are passed over.
    ///
    /// # Errors
    /// When it cannot be read, has no token, or one that is too short or has other characters than
    /// letters, digits, `-`, `_` and `.`.
    pub fn load(path: impl Into<PathBuf>) -> Result<Arc<Self>, TokensError> {
        let path = path.into();
        let stamp = modified(&path);
        let cookies = read_tokens(&path)?;
        let state = Mutex::new(KnownTokens { cookies, stamp, looked: Instant::now(), told: false });
        Ok(Arc::new(Self { path, state }))
    }

    /// Whether a cookie stands for one of the tokens.
    async fn know(self: &Arc<Self>, cookie: blake3::Hash) -> bool {
        let is_due = |state: &KnownTokens| state.looked.elapsed() >= LOOK_AGAIN;
        if is_due(&self.state()) {
            self.state().looked = Instant::now();
            let own = Arc::clone(self);
            // The file system may stand still, as a network's does; then what is known is good enough.
            let _ = timeout(LOOK_AGAIN, tokio::task::spawn_blocking(move || own.look())).await;
        }
        // Each comparison takes the same time, whatever is compared.
        self.state().cookies.iter().fold(false, |known, one| known | (*one == cookie))
    }

    fn state(&self) -> MutexGuard<'_, KnownTokens> {
        // Every change is an assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file, if it is another one than that in use.
    fn look(&self) {
        let stamp = modified(&self.path);
        if stamp == self.state().stamp {
            return;
        }
        match read_tokens(&self.path) {
            Ok(cookies) => {
                let mut state = self.state();
                (state.cookies, state.stamp, state.told) = (cookies, stamp, false);
            }
            Err(error) => {
                if !std::mem::replace(&mut self.state().told, true) {
                    tracing::warn!("the old tokens stay in use: {error}");
                }
            }
        }
    }
}

fn modified(path: &std::path::Path) -> Option<SystemTime> {
    std::fs::metadata(path).ok()?.modified().ok()
}

fn read_tokens(path: &std::path::Path) -> Result<Vec<blake3::Hash>, TokensError> {
    let wrong = |reason: String| TokensError { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let lines = text.lines().map(str::trim).enumerate();
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let tokens: Result<Vec<_>, _> = lines
        .map(|(number, token)| {
            let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            let number = number + 1;
            if token.len() < SHORTEST_TOKEN || token.len() > LONGEST_FORM / 2 {
                return Err(wrong(format!(
                    "line {number}: a token has {SHORTEST_TOKEN} to {} characters",
                    LONGEST_FORM / 2
                )));
            }
            match token.bytes().all(usual) {
                true => Ok(cookie_of(token)),
                false => Err(wrong(format!(
                    "line {number}: a token is of letters, digits, `-`, `_` and `.`"
                ))),
            }
        })
        .collect();
    match tokens? {
        tokens if tokens.is_empty() => Err(wrong("there is no token in it".to_owned())),
        tokens => Ok(tokens),
    }
}

/// What stands for a token in a browser: who finds it there does not have the token.
fn cookie_of(token: &str) -> blake3::Hash {
    blake3::Hash::from(blake3::derive_key("looptrain status page cookie 1", token.as_bytes()))
}

/// Serves until `shutdown`; then requests under way are answered, and no new ones taken.
///
/// # Errors
/// When the listener's address cannot be had any more.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    access: Access,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let complaints = Arc::new(Mutex::new(Complaints::new(Port::Page)));
    let door = Door { access: access.clone(), port: listener.local_addr()?.port(), complaints };
    let app = app
        .layer(middleware::from_fn_with_state(door.clone(), admit))
        .route("/login", get(async || Redirect::to("/")).post(login).with_state(door))
        .layer(middleware::map_response(harden));
    let mut incoming = Box::pin(introduced(listener, Port::Page, access.credentials));
    let (mut serving, strangers) = (JoinSet::new(), Arc::new(()));
    loop {
        let connection = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = serving.join_next() => continue,
            connection = incoming.next() => connection,
        };
        let Some(connection) = connection else { break };
        let known = connection.identity().is_some_and(|who| may_read(who.role));
        // One is kept here.
        let room = known || Arc::strong_count(&strangers) <= FOR_ANYBODY;
        if !room || serving.len() >= CONNECTIONS {
            continue;
        }
        #[cfg(target_os = "linux")]
        // Without it, who reads nothing is hung up on when the system thinks so.
        let _ = SockRef::from(connection.tcp()).set_tcp_user_timeout(Some(READ_PATIENCE));
        let stranger = (!known).then(|| Arc::clone(&strangers));
        let app = app.clone().layer(axum::Extension(connection.connect_info()));
        let ending = shutdown.clone();
        serving.spawn(async move {
            let _stranger = stranger;
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEAD_PATIENCE);
            let service = TowerToHyperService::new(app);
            let serving = http.serve_connection(TokioIo::new(connection), service);
            let mut serving = std::pin::pin!(serving);
            let served = tokio::select! {
                served = serving.as_mut() => served,
                () = ending.cancelled() => {
                    serving.as_mut().graceful_shutdown();
                    serving.await
                }
            };
            if let Err(error) = served {
                tracing::debug!(%error, "a reader's connection broke");
            }
        });
    }
    // The port is free before the last answers are read.
    drop(incoming);
    let _ = timeout(CLOSING_PATIENCE, serving.join_all()).await;
    Ok(())
}

/// Whether the holder of a certificate of this role may read.
fn may_read(role: Role) -> bool {
    matches!(role, Role::Operator | Role::Viewer)
}

#[derive(Clone)]
struct Door {
    access: Access,
    /// Cookies know hosts and not ports, and another page may be on the same host.
    port: u16,
    complaints: Arc<Mutex<Complaints>>,
}

impl Door {
    fn cookie_name(&self) -> String {
        format!("looptrain-{}", self.port)
    }

    /// Whether somebody may read.
    async fn lets_in(&self, caller: Option<&Caller>, headers: &HeaderMap) -> bool {
        let Access { credentials, tokens } = &self.access;
        if credentials.is_none() && tokens.is_none() {
            return true;
        }
        let identity = caller.and_then(|caller| caller.identity.as_ref());
        if identity.is_some_and(|who| may_read(who.role)) {
            return true;
        }
        let Some(tokens) = tokens else { return false };
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let bearer = text(header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
        let cookies = text(header::COOKIE).unwrap_or_default().split(';');
        let name = self.cookie_name();
        let kept = cookies
            .filter_map(|cookie| cookie.trim().split_once('='))
            .filter(|(key, _)| *key == name)
            .filter_map(|(_, value)| blake3::Hash::from_hex(value).ok());
        for cookie in bearer.map(cookie_of).into_iter().chain(kept) {
            if tokens.know(cookie).await {
                return true;
            }
        }
        false
    }

    /// What a stranger is told.
    fn refuse(&self, page: bool, known: bool) -> Response {
        let note = match known {
            true => "",
            false => "<p role=\"alert\">This token is not known here.</p>",
        };
        let with_tokens = self.access.tokens.is_some();
        let mut response = match (page, with_tokens) {
            (true, true) => {
                (StatusCode::UNAUTHORIZED, Html(LOGIN.replace("<!--note-->", note))).into_response()
            }
            (_, true) => (
                StatusCode::UNAUTHORIZED,
                "show a token (Authorization: Bearer TOKEN) or the certificate of a viewer\n",
            )
                .into_response(),
            (_, false) => (
                StatusCode::UNAUTHORIZED,
                "show the certificate of a viewer or operator; tokens take --page-tokens\n",
            )
                .into_response(),
        };
        let scheme = HeaderValue::from_static("Bearer");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        // What a stranger sends besides is not read.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    }
}

async fn admit(
    State(door): State<Door>,
    caller: Option<axum::Extension<Caller>>,
    request: Request,
    next: Next,
) -> Response {
    let caller = caller.as_deref();
    if door.lets_in(caller, request.headers()).await {
        return next.run(request).await;
    }
    let from = caller.and_then(|caller| caller.address);
    tracing::debug!(?from, path = request.uri().path(), "a reader without a token");
    door.refuse(request.uri().path() == "/", true)
}

/// Takes a token from the page's form, and leaves a cookie for it.
async fn login(
    State(door): State<Door>,
    caller: Option<axum::Extension<Caller>>,
    request: Request,
) -> Response {
    let Some(tokens) = &door.access.tokens else { return door.refuse(true, true) };
    let reading = axum::body::to_bytes(request.into_body(), LONGEST_FORM);
    let Ok(Ok(form)) = timeout(BODY_PATIENCE, reading).await else {
        return door.refuse(true, false);
    };
    // Tokens have no characters that a form would write otherwise.
    let form = String::from_utf8_lossy(&form);
    let token = form.split('&').find_map(|pair| pair.strip_prefix("token="));
    let cookie = cookie_of(token.unwrap_or_default().trim());
    if !tokens.know(cookie).await {
        if let Some(from) = caller.and_then(|caller| caller.address) {
            let mut complaints = door.complaints.lock().unwrap_or_else(PoisonError::into_inner);
            complaints.note(from, &Refusal::Token);
        }
        return door.refuse(true, false);
    }
    let secure = if door.access.credentials.is_some() { "; Secure" } else { "" };
    let kept = format!(
        "{}={}; Path=/; Max-Age={COOKIE_SECONDS}; HttpOnly; SameSite=Lax{secure}",
        door.cookie_name(),
        cookie.to_hex()
    );
    (StatusCode::SEE_OTHER, [(header::LOCATION, "/".to_owned()), (header::SET_COOKIE, kept)])
        .into_response()
}

/// What browsers are told of every answer: nothing from elsewhere, in nobody else's frame, and nothing
/// that stays behind.
async fn harden(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
             base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

/// Binds an address for [`serve`]; port 0 is any free one.
///
/// # Errors
/// When the address cannot be had.
pub async fn bind(address: SocketAddr) -> io::Result<(SocketAddr, TcpListener)> {
    let listener = TcpListener::bind(address).await?;
    Ok((listener.local_addr()?, listener))
}
