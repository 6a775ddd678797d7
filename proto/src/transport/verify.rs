//! Whether the certificate of the other end is good, and of a role that belongs there.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use super::{Certificate, Identity, Role};

/// Why a good certificate does not belong at a port.
#[derive(Debug)]
pub(super) struct OtherRole {
    found: Identity,
    wanted: &'static [Role],
}

impl fmt::Display for OtherRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted: Vec<&str> = self.wanted.iter().map(|role| role.name()).collect();
        write!(f, "it is {}, and not of role {}", self.found, wanted.join(" or "))
    }
}

impl std::error::Error for OtherRole {}

/// A certificate that is not to be taken any more, though it is good.
#[derive(Debug, thiserror::Error)]
#[error("its certificate, serial {serial} of {identity}, has been withdrawn")]
struct Withdrawn {
    serial: String,
    identity: Identity,
}

/// Serials of certificates that have been withdrawn, in their [`normal`] form.
pub(super) type Revoked = BTreeSet<String>;

/// Those of a process, which may become more while it runs.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedRevoked(Arc<RwLock<Revoked>>);

impl SharedRevoked {
    pub(super) fn set(&self, revoked: Revoked) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = revoked;
    }

    fn has(&self, serial: &str) -> bool {
        let there = self.0.read().unwrap_or_else(PoisonError::into_inner);
        !there.is_empty() && normal(serial).is_some_and(|serial| there.contains(&serial))
    }
}

/// A serial in one spelling of the many that programs have: hexadecimal, without colons and without
/// zeros in front. Nothing when it is none.
pub(super) fn normal(serial: &str) -> Option<String> {
    let digits = serial.strip_prefix("serial=").unwrap_or(serial);
    let digits = digits.strip_prefix("0x").unwrap_or(digits).replace(':', "").to_lowercase();
    let digits = digits.trim_start_matches('0');
    let is_one = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_one.then(|| digits.to_owned())
}

/// Whether a certificate, signed by whom it should be, is one of these roles and not withdrawn.
fn of_role(
    certificate: &CertificateDer<'_>,
    wanted: &'static [Role],
    revoked: &SharedRevoked,
) -> Result<(), Error> {
    let read = Certificate::read(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let other = |error: Arc<dyn std::error::Error + Send + Sync>| {
        Error::from(CertificateError::Other(OtherError(error)))
    };
    let found = read.identity.map_err(|error| other(Arc::new(error)))?;
    if revoked.has(&read.serial) {
        return Err(other(Arc::new(Withdrawn { serial: read.serial, identity: found })));
    }
    match wanted.contains(&found.role) {
        true => Ok(()),
        false => Err(other(Arc::new(OtherRole { found, wanted }))),
    }
}

/// Whom this process dials. Host names are not compared: machines come and go, roles stay.
#[derive(Debug)]
pub(super) struct OwnerOf {
    authority: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    role: &'static [Role],
    revoked: SharedRevoked,
}

impl OwnerOf {
    pub(super) fn new(
        authority: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
        role: Role,
        revoked: SharedRevoked,
    ) -> Self {
        let role = match role {
            Role::Coordinator => &[Role::Coordinator],
            Role::Worker => &[Role::Worker],
            Role::Operator => &[Role::Operator],
            Role::Viewer => &[Role::Viewer],
        };
        Self { authority, provider, role, revoked }
    }
}

impl ServerCertVerifier for OwnerOf {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.authority,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        of_role(end_entity, self.role, &self.revoked)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Who calls this process.
#[derive(Debug)]
pub(super) struct CallerOf {
    signed: Arc<dyn ClientCertVerifier>,
    roles: &'static [Role],
    revoked: SharedRevoked,
}

impl CallerOf {
    /// `signed` looks at everything but the role, and whether it has been withdrawn.
    pub(super) fn new(
        signed: Arc<dyn ClientCertVerifier>,
        roles: &'static [Role],
        revoked: SharedRevoked,
    ) -> Self {
        Self { signed, roles, revoked }
    }
}

impl ClientCertVerifier for CallerOf {
    fn client_auth_mandatory(&self) -> bool {
        self.signed.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.signed.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.signed.verify_client_cert(end_entity, intermediates, now)?;
        of_role(end_entity, self.roles, &self.revoked)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}
