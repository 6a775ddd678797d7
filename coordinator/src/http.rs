//! HTTP on a port of its own: the status page, and `/metrics` of any process.
//!
//! Who may read is an [`Access`]: everybody, or with TLS those with a certificate of an operator or
//! viewer, and in either case those with a token, when there are tokens. A browser shows its token once,
//! on a small page of its own, and gets a cookie for it, which holds as long as the token does.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::post;
use futures::StreamExt;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use looptrain_proto::transport::{Caller, Credentials, Port, Role};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::listen::introduced;

/// A request's head must be here within this time, the next one's on the same connection too.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);

/// Connections at a time; live readers of the page have their own limit below it.
const CONNECTIONS: usize = 512;

/// Longest token that is looked at, with what is around it.
const LONGEST_FORM: usize = 1024;

/// The file of tokens is looked at this often, when somebody shows one.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Fewer characters can be guessed.
const SHORTEST_TOKEN: usize = 16;

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
    /// letters, digits, `-`, `_`, `.` and `~`.
    pub fn load(path: impl Into<PathBuf>) -> Result<Arc<Self>, TokensError> {
        let path = path.into();
        let stamp = modified(&path);
        let cookies = read_tokens(&path)?;
        let state = Mutex::new(KnownTokens { cookies, stamp, looked: Instant::now() });
        Ok(Arc::new(Self { path, state }))
    }

    /// Whether a cookie stands for one of the tokens.
    fn know(&self, cookie: blake3::Hash) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= LOOK_AGAIN {
            state.looked = Instant::now();
            let stamp = modified(&self.path);
            if stamp != state.stamp {
                state.stamp = stamp;
                match read_tokens(&self.path) {
                    Ok(cookies) => state.cookies = cookies,
                    Err(error) => tracing::warn!("the old tokens stay in use: {error}"),
                }
            }
        }
        // Each comparison takes the same time, whatever is compared.
        state.cookies.iter().fold(false, |known, one| known | (*one == cookie))
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
            let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
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
                    "line {number}: a token is of letters, digits, `-`, `_`, `.` and `~`"
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
    let door = Door { access: access.clone(), port: listener.local_addr()?.port() };
    let app = app
        .layer(middleware::from_fn_with_state(door.clone(), admit))
        .route("/login", post(login).with_state(door).layer(DefaultBodyLimit::max(LONGEST_FORM)))
        .layer(middleware::map_response(harden));
    let incoming = introduced(listener, Port::Page, access.credentials);
    let mut incoming = std::pin::pin!(incoming);
    let mut serving = JoinSet::new();
    loop {
        let connection = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = serving.join_next() => continue,
            connection = incoming.next(), if serving.len() < CONNECTIONS => connection,
        };
        let Some(connection) = connection else { break };
        let app = app.clone().layer(axum::Extension(connection.connect_info()));
        let ending = shutdown.clone();
        serving.spawn(async move {
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
    serving.join_all().await;
    Ok(())
}

#[derive(Clone)]
struct Door {
    access: Access,
    /// Cookies know hosts and not ports, and another page may be on the same host.
    port: u16,
}

impl Door {
    fn cookie_name(&self) -> String {
        format!("looptrain-{}", self.port)
    }

    /// Whether somebody may read.
    fn lets_in(&self, caller: Option<&Caller>, headers: &HeaderMap) -> bool {
        let Access { credentials, tokens } = &self.access;
        if credentials.is_none() && tokens.is_none() {
            return true;
        }
        let identity = caller.and_then(|caller| caller.identity.as_ref());
        if identity.is_some_and(|who| matches!(who.role, Role::Operator | Role::Viewer)) {
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
        bearer.map(cookie_of).into_iter().chain(kept).any(|cookie| tokens.know(cookie))
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
    if door.lets_in(caller, request.headers()) {
        return next.run(request).await;
    }
    let from = caller.and_then(|caller| caller.address);
    tracing::debug!(?from, path = request.uri().path(), "a reader without a token");
    door.refuse(request.uri().path() == "/", true)
}

/// Takes a token from the page's form, and leaves a cookie for it.
async fn login(State(door): State<Door>, form: Bytes) -> Response {
    let Some(tokens) = &door.access.tokens else { return StatusCode::NOT_FOUND.into_response() };
    // Tokens have no characters that a form would write otherwise.
    let form = String::from_utf8_lossy(&form);
    let token = form.split('&').find_map(|pair| pair.strip_prefix("token="));
    let cookie = cookie_of(token.unwrap_or_default().trim());
    if !tokens.know(cookie) {
        tracing::warn!("somebody showed the page a token that is not known");
        return door.refuse(true, false);
    }
    let secure = if door.access.credentials.is_some() { "; Secure" } else { "" };
    let kept = format!(
        "{}={}; Path=/; Max-Age={COOKIE_SECONDS}; HttpOnly; SameSite=Strict{secure}",
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
