//! How processes of a run reach each other: TCP, with mutual TLS when they have credentials.
//!
//! A process with [`Credentials`] shows its certificate on every connection and asks for one. What a
//! certificate says is an [`Identity`]: a role and a name. Between processes of a run host names say
//! nothing (machines come and go), so roles are compared instead: whoever dials a coordinator or a
//! worker wants a certificate of that role, signed by the authority of the credentials.
//!
//! Strangers cost little. A [`Gate`] takes connections in and has each of them introduce itself within
//! seconds; the number of those that have not is bounded, and the address with the most of them gives
//! way, so that silent connections, however many, do not keep others out.

mod authority;
mod certificate;
mod connection;
mod credentials;
mod dial;
mod gate;
mod identity;
mod verify;

pub use authority::{Authority, AuthorityError, Issued};
pub use certificate::Certificate;
pub use connection::{Caller, Connection};
pub use credentials::{Credentials, CredentialsError};
pub use dial::{dial, endpoint, innermost};
pub use gate::{Complaints, Gate, Refusal};
pub use identity::{Identity, NoIdentity, Role};

#[cfg(test)]
mod tests;

/// A port of a process, by what is spoken there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The coordinator's gRPC, for workers and operators.
    Coordinator,
    /// A worker's, for other workers.
    Peers,
    /// HTTP: the status page and `/metrics`.
    Page,
}

impl Port {
    /// As metrics and logs call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Peers => "peers",
            Self::Page => "page",
        }
    }

    /// Whose port it is, where only one role may have it.
    fn owner(self) -> Role {
        match self {
            Self::Coordinator | Self::Page => Role::Coordinator,
            Self::Peers => Role::Worker,
        }
    }

    /// What is spoken within TLS, as both sides say it (ALPN).
    fn language(self) -> &'static [u8] {
        match self {
            Self::Coordinator => b"h2",
            Self::Peers => b"looptrain",
            Self::Page => b"http/1.1",
        }
    }
}
