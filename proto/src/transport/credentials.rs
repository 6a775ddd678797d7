//! A directory of credentials, and TLS with them.
//!
//! The files have the names of a Kubernetes secret of type `kubernetes.io/tls` as cert-manager makes it:
//! `ca.crt` (who may sign), `tls.crt` (the own certificate, and those between it and the authority behind
//! it) and `tls.key`, all PEM; a file `revoked` beside them may list certificates that have been withdrawn.
//! They are read again when they change, so that a run of months outlives its
//! certificates; what is there stays in use while the new files are not good.
//!
//! TLS 1.3 alone. Sessions are not resumed: each connection proves its certificate anew.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::connection::plainly;
use super::verify::{CallerOf, OwnerOf, Revoked, SharedRevoked, normal};
use super::{Certificate, Connection, Identity, NoIdentity, Port, Role};

/// The authority.
pub(super) const AUTHORITY: &str = "ca.crt";
/// The own certificate.
pub(super) const CERTIFICATE: &str = "tls.crt";
/// Its key.
pub(super) const KEY: &str = "tls.key";

/// Serials of certificates that are not to be taken any more, one a line; there need not be one.
const REVOKED: &str = "revoked";

/// The files are looked at this often, when there are connections.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Why a directory has no credentials to use.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error(
        "cannot read {}: {error}; `looptrain certs issue` writes {AUTHORITY}, {CERTIFICATE} and {KEY}",
        path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The certificate is of a role that does not do this.
    #[error(
        "{}: this is the certificate of {found}; needed is one of role {wanted} \
         (`looptrain certs issue --role {wanted}`)",
        path.display()
    )]
    Role {
        /// The certificate.
        path: PathBuf,
        /// Whose it is.
        found: Identity,
        /// Who may do it.
        wanted: Role,
    },
}

/// The credentials of a process; shared by all its connections.
#[derive(Debug)]
pub struct Credentials {
    directory: PathBuf,
    roles: Vec<Role>,
    loaded: Mutex<Arc<Loaded>>,
    /// Which certificates have been withdrawn, for the verifiers of all that was ever loaded.
    revoked: SharedRevoked,
    looking: tokio::sync::Mutex<Look>,
}

/// What was seen of the files.
#[derive(Debug)]
struct Look {
    at: Instant,
    /// Of those that are in use.
    stamp: Stamp,
    /// Why newer ones are not; told once.
    trouble: Option<String>,
}

/// Tells files from those that were there before: time of the change, place and size.
type Stamp = Vec<Option<(i64, i64, u64, u64)>>;

/// What the files make together.
#[derive(Debug)]
struct Loaded {
    identity: Identity,
    certificate: Certificate,
    coordinator: Arc<ServerConfig>,
    peers: Arc<ServerConfig>,
    page: Arc<ServerConfig>,
    to_coordinator: Arc<ClientConfig>,
    to_page: Arc<ClientConfig>,
    to_peers: Arc<ClientConfig>,
}

impl Credentials {
    /// Reads a directory.
    ///
    /// # Errors
    /// When a file is missing or not what it should be, when the certificate is not signed by the
    /// authority, has ended, does not belong to the key, or is of none of the `roles`.
    pub fn load(
        directory: impl Into<PathBuf>,
        roles: &[Role],
    ) -> Result<Arc<Self>, CredentialsError> {
        let directory = directory.into();
        let stamp = stamp(&directory);
        let revoked = SharedRevoked::default();
        revoked.set(read_revoked(&directory.join(REVOKED))?);
        let loaded = Arc::new(Loaded::read(&directory, roles, &revoked)?);
        let look = Look { at: Instant::now(), stamp, trouble: None };
        Ok(Arc::new(Self {
            directory,
            roles: roles.to_vec(),
            loaded: Mutex::new(loaded),
            revoked,
            looking: tokio::sync::Mutex::new(look),
        }))
    }

    /// Who this process is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.loaded().identity.clone()
    }

    /// What the own certificate says.
    #[must_use]
    pub fn certificate(&self) -> Certificate {
        self.loaded().certificate.clone()
    }

    fn loaded(&self) -> Arc<Loaded> {
        // Every change is an assignment of a whole value.
        Arc::clone(&self.loaded.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is in the files, or was when they were good. The file system may stand still, as a network's
    /// does; then what is known is good enough.
    async fn current(self: &Arc<Self>) -> Arc<Loaded> {
        if self.looking.try_lock().is_ok_and(|look| look.at.elapsed() >= LOOK_AGAIN) {
            let own = Arc::clone(self);
            let looked = tokio::task::spawn_blocking(move || own.look());
            // A look that takes longer ends when it can, for the next connection.
            let _ = timeout(LOOK_AGAIN, looked).await;
        }
        self.loaded()
    }

    /// Reads the files, if they are others than those in use.
    fn look(&self) {
        let Ok(mut look) = self.looking.try_lock() else { return };
        look.at = Instant::now();
        let stamp = stamp(&self.directory);
        if stamp == look.stamp {
            return;
        }
        let mut trouble = None;
        // Apart from the rest: a list holds whatever becomes of the own certificate.
        match read_revoked(&self.directory.join(REVOKED)) {
            Ok(revoked) => self.revoked.set(revoked),
            Err(error) => trouble = Some(error.to_string()),
        }
        match Loaded::read(&self.directory, &self.roles, &self.revoked) {
            Ok(loaded) => {
                let loaded = Arc::new(loaded);
                let mut there = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
                let before = std::mem::replace(&mut *there, Arc::clone(&loaded));
                drop(there);
                if before.certificate != loaded.certificate {
                    let serial = &loaded.certificate.serial;
                    tracing::info!(identity = %loaded.identity, serial, "a new certificate is in use");
                }
            }
            Err(error) => trouble = Some(error.to_string()),
        }
        match &trouble {
            // Looked at again with the next connection: what is wrong may be the clock, or an owner.
            Some(reason) if look.trouble != trouble => {
                tracing::warn!(
                    "new certificates are not used, what was good before stays: {reason}"
                );
            }
            Some(_) => {}
            None => look.stamp = stamp,
        }
        look.trouble = trouble;
    }

    /// Makes TLS of a connection that this process has opened to a port; the other end must be of the
    /// role whose port it is.
    ///
    /// # Errors
    /// What is wrong with the other end, or the connection.
    pub async fn connect(
        self: &Arc<Self>,
        stream: TcpStream,
        port: Port,
    ) -> io::Result<Connection> {
        let loaded = self.current().await;
        let config = match port {
            Port::Coordinator => &loaded.to_coordinator,
            Port::Page => &loaded.to_page,
            Port::Peers => &loaded.to_peers,
        };
        // Never sent, and nothing that certificates are compared with.
        let name = ServerName::try_from("looptrain").map_err(io::Error::other)?;
        let connecting = TlsConnector::from(Arc::clone(config)).connect(name, stream);
        let stream = connecting.await.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => io::Error::new(
                error.kind(),
                "it hung up in the handshake: it may not speak TLS, and then its address begins with \
                 http://",
            ),
            _ => plainly(error),
        })?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        // The handshake has looked at it already.
        let identity = identity(shown)?.ok_or_else(|| io::Error::other(NoIdentity::Missing))?;
        Ok(Connection::dialled(stream, identity))
    }

    /// Makes TLS of a connection that has come in at a port of this process. Whoever calls shows a
    /// certificate of the authority, at a worker's port that of a worker; at the page there may be none.
    ///
    /// # Errors
    /// What is wrong with the other end, or the connection.
    pub async fn accept(self: &Arc<Self>, stream: TcpStream, port: Port) -> io::Result<Connection> {
        let loaded = self.current().await;
        let config = match port {
            Port::Coordinator => &loaded.coordinator,
            Port::Peers => &loaded.peers,
            Port::Page => &loaded.page,
        };
        let accepting = TlsAcceptor::from(Arc::clone(config)).accept(stream);
        let stream = accepting.await.map_err(plainly)?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let identity = identity(shown)?;
        Ok(Connection::accepted(stream, identity))
    }
}

/// What a certificate that TLS has found good says, if there is one.
fn identity(shown: Option<&CertificateDer<'_>>) -> io::Result<Option<Identity>> {
    let Some(certificate) = shown else { return Ok(None) };
    let certificate = Certificate::read(certificate).map_err(io::Error::other)?;
    certificate.identity.map(Some).map_err(io::Error::other)
}

fn stamp(directory: &Path) -> Stamp {
    let of = |name| {
        let metadata = std::fs::metadata(directory.join(name)).ok()?;
        Some((metadata.ctime(), metadata.ctime_nsec(), metadata.ino(), metadata.len()))
    };
    [AUTHORITY, CERTIFICATE, KEY, REVOKED].map(of).to_vec()
}

/// Whom a process believes.
#[derive(Clone)]
struct Trust {
    authority: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    revoked: SharedRevoked,
}

impl Trust {
    fn read(directory: &Path, revoked: &SharedRevoked) -> Result<Self, CredentialsError> {
        let path = directory.join(AUTHORITY);
        let mut authority = RootCertStore::empty();
        for certificate in certificates(&path)? {
            authority.add(certificate).map_err(|error| {
                let reason = format!("it is no authority: {error}");
                CredentialsError::Content { path: path.clone(), reason }
            })?;
        }
        Ok(Self {
            authority: Arc::new(authority),
            provider: Arc::new(aws_lc_rs::default_provider()),
            revoked: revoked.clone(),
        })
    }

    /// Those whom this process dials.
    fn owner_of(&self, role: Role) -> OwnerOf {
        let (authority, provider) = (Arc::clone(&self.authority), Arc::clone(&self.provider));
        OwnerOf::new(authority, provider, role, self.revoked.clone())
    }

    /// Those who call this process.
    fn callers(
        &self,
        roles: &'static [Role],
        also_nobody: bool,
    ) -> Result<Arc<dyn ClientCertVerifier>, VerifierBuilderError> {
        let (authority, provider) = (Arc::clone(&self.authority), Arc::clone(&self.provider));
        let signed = WebPkiClientVerifier::builder_with_provider(authority, provider);
        let signed = if also_nobody { signed.allow_unauthenticated() } else { signed };
        Ok(Arc::new(CallerOf::new(signed.build()?, roles, self.revoked.clone())))
    }

    /// Whether a certificate is good at the ends of connections at which those of its role are: who
    /// only calls needs none that may be called, and a coordinator none that may call.
    fn check(&self, chain: &[CertificateDer<'_>], role: Role) -> Result<(), String> {
        let Some((own, between)) = chain.split_first() else { return Ok(()) };
        let now = UnixTime::now();
        let said = |error: rustls::Error| {
            let text = plainly(io::Error::other(error)).to_string();
            text.replace("its certificate", "the certificate")
        };
        if matches!(role, Role::Coordinator | Role::Worker) {
            let name = ServerName::from(IpAddr::from([127, 0, 0, 1]));
            let called = self.owner_of(role).verify_server_cert(own, between, &name, &[], now);
            called.map_err(said)?;
        }
        if role != Role::Coordinator {
            let callers = self.callers(&Role::ALL, false).map_err(|error| error.to_string())?;
            callers.verify_client_cert(own, between, now).map_err(said)?;
        }
        Ok(())
    }
}

impl Loaded {
    fn read(
        directory: &Path,
        roles: &[Role],
        revoked: &SharedRevoked,
    ) -> Result<Self, CredentialsError> {
        let path = |name| directory.join(name);
        let wrong = |name, reason| CredentialsError::Content { path: path(name), reason };
        let trust = Trust::read(directory, revoked)?;
        let chain = certificates(&path(CERTIFICATE))?;
        let certificate =
            Certificate::read(&chain[0]).map_err(|reason| wrong(CERTIFICATE, reason))?;
        let identity = certificate.identity.clone();
        let identity = identity.map_err(|error| wrong(CERTIFICATE, error.to_string()))?;
        if !roles.contains(&identity.role) {
            let wanted = roles.first().copied().unwrap_or(Role::Viewer);
            let path = path(CERTIFICATE);
            return Err(CredentialsError::Role { path, found: identity, wanted });
        }
        let key = PrivateKeyDer::from_pem_file(path(KEY)).map_err(|error| {
            wrong(KEY, format!("it holds no private key that can be read ({error})"))
        })?;
        // Whether it has been withdrawn is for others to say.
        let signed = Trust { revoked: SharedRevoked::default(), ..trust.clone() };
        signed.check(&chain, identity.role).map_err(|reason| {
            wrong(CERTIFICATE, format!("{reason}; `looptrain certs show` tells more"))
        })?;

        let tls = |error: rustls::Error| match error {
            rustls::Error::InconsistentKeys(_) => {
                wrong(KEY, format!("it is not the key of {CERTIFICATE}"))
            }
            error => wrong(KEY, error.to_string()),
        };
        let serving = |port: Port, roles: &'static [Role], also_nobody: bool| {
            let callers = trust.callers(roles, also_nobody);
            let callers = callers.map_err(|error| wrong(AUTHORITY, error.to_string()))?;
            let mut config = ServerConfig::builder_with_provider(Arc::clone(&trust.provider))
                .with_protocol_versions(&[&TLS13])
                .map_err(tls)?
                .with_client_cert_verifier(callers)
                .with_single_cert(chain.clone(), key.clone_key())
                .map_err(tls)?;
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            config.alpn_protocols = vec![port.language().to_vec()];
            Ok(Arc::new(config))
        };
        let dialling = |port: Port| {
            let mut config = ClientConfig::builder_with_provider(Arc::clone(&trust.provider))
                .with_protocol_versions(&[&TLS13])
                .map_err(tls)?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(trust.owner_of(port.owner())))
                .with_client_auth_cert(chain.clone(), key.clone_key())
                .map_err(tls)?;
            config.resumption = Resumption::disabled();
            config.enable_sni = false;
            config.alpn_protocols = vec![port.language().to_vec()];
            Ok(Arc::new(config))
        };
        Ok(Self {
            coordinator: serving(Port::Coordinator, &Role::ALL, false)?,
            peers: serving(Port::Peers, &[Role::Worker], false)?,
            page: serving(Port::Page, &Role::ALL, true)?,
            to_coordinator: dialling(Port::Coordinator)?,
            to_page: dialling(Port::Page)?,
            to_peers: dialling(Port::Peers)?,
            identity,
            certificate,
        })
    }
}

/// The serials of a file; none when it is not there. Empty lines and those that begin with `#` are
/// passed over.
fn read_revoked(path: &Path) -> Result<Revoked, CredentialsError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Revoked::new()),
        Err(error) => return Err(CredentialsError::Read { path: path.to_owned(), error }),
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let serials = lines.filter(|line| !line.starts_with('#')).map(|line| {
        normal(line).ok_or_else(|| CredentialsError::Content {
            path: path.to_owned(),
            reason: format!("`{line}` is no serial; `looptrain certs show` prints them"),
        })
    });
    serials.collect()
}

/// All certificates of a file, at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let wrong = |reason: String| CredentialsError::Content { path: path.to_owned(), reason };
    let bytes = std::fs::read(path)
        .map_err(|error| CredentialsError::Read { path: path.to_owned(), error })?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let all = all.map_err(|error| wrong(format!("it is no PEM file ({error})")))?;
    match all.is_empty() {
        true => Err(wrong("there is no certificate in it".to_owned())),
        false => Ok(all),
    }
}
