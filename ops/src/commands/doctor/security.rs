//! Whether the certificates are good, and for how long.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use looptrain_proto::transport::{Certificate, Credentials, Role};

use super::Finding;
use crate::cli::TlsArgs;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate that ends sooner should be renewed now.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// The credentials, where there are good ones, and what was found.
pub(super) fn check(tls: &TlsArgs) -> (Option<Arc<Credentials>>, Vec<Finding>) {
    let Some(directory) = &tls.tls else {
        let why = "no certificates are given; --tls DIR checks some";
        return (None, vec![Finding::not_checked("certificate", why)]);
    };
    let credentials = match Credentials::load(directory, &Role::ALL) {
        Ok(credentials) => credentials,
        Err(error) => {
            let remedy = "have one made: `looptrain certs issue`, or whoever keeps the authority";
            return (None, vec![Finding::problem("certificate", error.to_string(), remedy)]);
        }
    };
    let findings = vec![
        lasts(&credentials.identity().to_string(), &credentials.certificate(), SystemTime::now()),
        key(&directory.join("tls.key")),
    ];
    (Some(credentials), findings)
}

fn lasts(identity: &str, certificate: &Certificate, now: SystemTime) -> Finding {
    let left = certificate.ends.duration_since(now).unwrap_or_default();
    let days = left.as_secs_f64() / DAY.as_secs_f64();
    let found = format!("{identity}, signed by the authority beside it, good for {days:.0} days");
    if left < SOON {
        let remedy = "renew it: new files are taken into use by themselves (`looptrain certs issue --renew`)";
        return Finding::warning("certificate", found, remedy);
    }
    Finding::well("certificate", found)
}

/// Who may read the key.
fn key(path: &Path) -> Finding {
    let check = "key";
    match std::fs::metadata(path).map(|it| it.permissions().mode()) {
        Ok(mode) if mode & 0o004 != 0 => {
            let found = format!("every user of this machine can read {}", path.display());
            Finding::warning(check, found, &format!("chmod 600 {}", path.display()))
        }
        Ok(_) => Finding::well(check, "not every user can read it"),
        Err(error) => Finding::not_checked(check, error.to_string()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::transport::{Authority, Identity};

    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn a_certificate_is_good_or_ends_soon_or_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let authority = Authority::new("here", now..now + 100 * DAY).unwrap();
        let directory = folder.path().join("tls");
        let identity = Identity::new(Role::Worker, "anna").unwrap();
        authority
            .issue(&identity, &[], now..now + 30 * DAY)
            .unwrap()
            .write(&directory, false)
            .unwrap();
        let (credentials, findings) = check(&TlsArgs { tls: Some(directory.clone()) });
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Well), "{findings:?}");
        let certificate = credentials.unwrap().certificate();
        let later = |days| lasts("anna", &certificate, now + days * DAY).verdict;
        assert_eq!([10, 20].map(later), [Verdict::Well, Verdict::Warning]);

        let path = directory.join("tls.key");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert_eq!(key(&path).verdict, Verdict::Warning);
        std::fs::write(&path, "no key").unwrap();
        let (credentials, findings) = check(&TlsArgs { tls: Some(directory) });
        assert!(credentials.is_none());
        assert_eq!(findings[0].verdict, Verdict::Problem);
        assert_eq!(check(&TlsArgs { tls: None }).1[0].verdict, Verdict::NotChecked);
    }
}
