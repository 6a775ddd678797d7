//! Which addresses a process may listen on, and what it shows and asks there.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use anyhow::Result;
use looptrain_coordinator::http::{Access, Tokens};
use looptrain_proto::metrics;
use looptrain_proto::transport::{Credentials, Role};

use crate::cli::{ListenArgs, TlsArgs};

/// A command line that asks for something that is not done; exit status 2.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Where the coordinator listens, and to whom.
pub(crate) struct Doors {
    /// For workers and operators.
    pub(crate) listen: SocketAddr,
    pub(crate) credentials: Option<Arc<Credentials>>,
    /// The status page.
    pub(crate) dashboard: Option<SocketAddr>,
    pub(crate) access: Access,
}

impl Doors {
    /// On this machine alone, without a page.
    pub(crate) fn local() -> Self {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self { listen, credentials: None, dashboard: None, access: Access::default() }
    }
}

impl ListenArgs {
    /// The credentials of a process that listens, which must be of this role.
    pub(crate) fn credentials(&self, role: Role) -> Result<Option<Arc<Credentials>>> {
        self.tls.credentials(&[role])
    }

    /// Who may read the page or `/metrics`.
    pub(crate) fn access(&self, credentials: Option<Arc<Credentials>>) -> Result<Access> {
        let tokens = self.page_tokens.as_ref().map(Tokens::load).transpose()?;
        Ok(Access { credentials, tokens })
    }

    /// Refuses an address at which others than this machine could call, unless there is TLS or the
    /// command line says that there need not be. `flag` names the address, `danger` what they could do.
    pub(crate) fn check(&self, flag: &str, address: SocketAddr, danger: &str) -> Result<(), Usage> {
        if address.ip().is_loopback() || self.tls.tls.is_some() || self.insecure {
            return Ok(());
        }
        Err(Usage(format!(
            "{flag} {address} can be reached from other machines, and without TLS anybody there could \
             {danger}: give certificates with --tls DIR (`looptrain certs` makes them), or say \
             --insecure on a network that you trust"
        )))
    }

    /// Refuses tokens of a page that is not there.
    pub(crate) fn check_tokens(&self, has_page: bool, flag: &str) -> Result<(), Usage> {
        if has_page || self.page_tokens.is_none() {
            return Ok(());
        }
        Err(Usage(format!("--page-tokens is for what {flag} serves, which is not given")))
    }
}

/// What callers of the coordinator's and the peers' port could do.
pub(crate) const TAKES_PART: &str = "take part in the run, read what is sent, and stop it";

/// What readers of the page could do.
pub(crate) const READS: &str = "read all about the run";

impl TlsArgs {
    /// The credentials of a process, which must be of one of these roles.
    pub(crate) fn credentials(&self, roles: &[Role]) -> Result<Option<Arc<Credentials>>> {
        let Some(directory) = &self.tls else { return Ok(None) };
        let credentials = Credentials::load(directory, roles)?;
        Ok(Some(credentials))
    }
}

/// Reports when the process's certificate ends, for as long as the process lives.
pub(crate) fn observe_expiry(credentials: &Arc<Credentials>) {
    let credentials = Arc::clone(credentials);
    metrics::TLS_CERTIFICATE_EXPIRY.observe(move || {
        let ends = credentials.certificate().ends.duration_since(UNIX_EPOCH);
        vec![(Vec::new(), ends.unwrap_or_default().as_secs_f64())]
    });
}
