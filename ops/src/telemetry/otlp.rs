//! Where signals leave to over OTLP: whether they leave, and over TLS, whom they trust there and what they
//! show. The names of the variables are those of the OpenTelemetry specification ("OpenTelemetry Protocol
//! Exporter"); the exporters themselves read the endpoint, headers, time-out and compression.

use anyhow::{Context, Result, ensure};
use opentelemetry_otlp::WithTonicConfig;
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};

const CANNOT: &str = "cannot set up the OTLP exporter; check the OTEL_EXPORTER_OTLP_* variables";

/// A variable of this process, unless it is empty.
fn of_process(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether a signal is to leave, and some endpoint is named for it.
pub(super) fn is_exported(signal: &str) -> bool {
    exports(signal, of_process)
}

fn exports(signal: &str, variable: impl Fn(&str) -> Option<String>) -> bool {
    let disabled = variable("OTEL_SDK_DISABLED").is_some_and(|it| it.eq_ignore_ascii_case("true"));
    let none = variable(&format!("OTEL_{signal}_EXPORTER")).is_some_and(|it| it == "none");
    !disabled && !none && of_signal(signal, "ENDPOINT", &variable).is_some()
}

/// The value of `OTEL_EXPORTER_OTLP_<signal>_<name>`, or of the variable for all signals.
fn of_signal(
    signal: &str,
    name: &str,
    variable: &impl Fn(&str) -> Option<String>,
) -> Option<(String, String)> {
    let own = format!("OTEL_EXPORTER_OTLP_{signal}_{name}");
    let general = format!("OTEL_EXPORTER_OTLP_{name}");
    [own, general].into_iter().find_map(|name| variable(&name).map(|value| (name, value)))
}

/// Makes a signal's exporter, with TLS where its endpoint asks for it.
///
/// # Errors
/// When a variable names a file that is not there or not what it should be, or has no sense.
pub(super) fn exporter<B: WithTonicConfig, E>(
    signal: &str,
    builder: B,
    build: impl FnOnce(B) -> Result<E, opentelemetry_otlp::ExporterBuildError>,
) -> Result<E> {
    let builder = match tls(signal, of_process)? {
        Some(tls) => builder.with_tls_config(tls),
        None => builder,
    };
    build(builder).context(CANNOT)
}

/// How a signal leaves over TLS; `None` when it leaves in the clear. An endpoint without a scheme is one
/// with TLS, unless `OTEL_EXPORTER_OTLP_INSECURE` is true.
fn tls(signal: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Option<ClientTlsConfig>> {
    let of = |name: &str| of_signal(signal, name, &variable);
    let (_, endpoint) = of("ENDPOINT").unwrap_or_default();
    let is_insecure = || of("INSECURE").is_some_and(|(_, it)| it.eq_ignore_ascii_case("true"));
    let in_the_clear = match endpoint.split_once("://") {
        Some((scheme, _)) => !scheme.eq_ignore_ascii_case("https"),
        None => is_insecure(),
    };
    if in_the_clear {
        return Ok(None);
    }
    let pem = |name: &str, what: &str| {
        of(name).map(|(name, path)| pem(&path, what).with_context(|| name)).transpose()
    };
    let tls = match pem("CERTIFICATE", "CERTIFICATE")? {
        Some(authorities) => {
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities))
        }
        None => ClientTlsConfig::new().with_enabled_roots(),
    };
    let certificate = pem("CLIENT_CERTIFICATE", "CERTIFICATE")?;
    Ok(Some(match (certificate, pem("CLIENT_KEY", "PRIVATE KEY")?) {
        (Some(certificate), Some(key)) => tls.identity(Identity::from_pem(certificate, key)),
        (None, None) => tls,
        (certificate, _) => {
            let [there, missing] = match certificate {
                Some(_) => ["CLIENT_CERTIFICATE", "CLIENT_KEY"],
                None => ["CLIENT_KEY", "CLIENT_CERTIFICATE"],
            };
            anyhow::bail!(
                "OTEL_EXPORTER_OTLP_{there} is of no use without OTEL_EXPORTER_OTLP_{missing}"
            )
        }
    }))
}

/// The text of a PEM file that has something of this kind.
fn pem(path: &str, what: &str) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let begins = text.lines().any(|line| {
        let line = line.trim();
        line.starts_with("-----BEGIN ") && line.ends_with(&format!("{what}-----"))
    });
    ensure!(begins, "{path} has no {} in PEM form", what.to_lowercase());
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn among(variables: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        |name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        }
    }

    #[test]
    fn a_signal_leaves_when_an_endpoint_is_named_for_it() {
        let with = |signal: &str, variables: &[(&str, &str)]| exports(signal, among(variables));
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317");
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4317");
        assert!(with("LOGS", &[all]) && with("TRACES", &[traces]));
        assert!(!with("LOGS", &[]) && !with("LOGS", &[traces]));
        assert!(!with("LOGS", &[all, ("OTEL_LOGS_EXPORTER", "none")]));
        assert!(!with("METRICS", &[all, ("OTEL_SDK_DISABLED", "TRUE")]));
    }

    #[test]
    fn what_leaves_is_encrypted_unless_its_endpoint_says_otherwise() {
        let encrypted =
            |variables: &[(&str, &str)]| tls("LOGS", among(variables)).unwrap().is_some();
        let all = |url: &'static str| ("OTEL_EXPORTER_OTLP_ENDPOINT", url);
        let plain = ("OTEL_EXPORTER_OTLP_INSECURE", "true");
        assert!(encrypted(&[all("https://collector:4317")]));
        assert!(encrypted(&[all("HTTPS://collector:4317"), plain]), "it says so itself");
        assert!(encrypted(&[all("collector:4317")]));
        assert!(!encrypted(&[all("collector:4317"), plain]));
        assert!(!encrypted(&[all("http://collector:4317")]));
        let own = ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://127.0.0.1:4317");
        assert!(!encrypted(&[all("https://collector:4317"), own]));
    }

    #[test]
    fn a_file_that_is_no_good_is_named_with_its_variable() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let certificate = file("a.crt", "-----BEGIN CERTIFICATE-----\n");
        let key = file("a.key", "-----BEGIN EC PRIVATE KEY-----\n");
        let said = |variables: &[(&str, &str)]| {
            let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector:4317");
            let found = tls("LOGS", among(&[&[endpoint], variables].concat()));
            found.map(|tls| assert!(tls.is_some())).map_err(|error| format!("{error:#}"))
        };
        let authority = "OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE";
        assert_eq!(said(&[(authority, &certificate)]), Ok(()));
        let none = said(&[(authority, "/nowhere/ca.crt")]).unwrap_err();
        assert!(none.starts_with(&format!("{authority}: cannot read /nowhere/ca.crt: ")), "{none}");
        let other = said(&[(authority, &key)]).unwrap_err();
        assert_eq!(other, format!("{authority}: {key} has no certificate in PEM form"));
        let [shown, secret] =
            ["OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_KEY"];
        assert_eq!(said(&[(shown, &certificate), (secret, &key)]), Ok(()));
        let half = said(&[(shown, &certificate)]).unwrap_err();
        assert_eq!(half, format!("{shown} is of no use without {secret}"));
        let half = said(&[(secret, &key)]).unwrap_err();
        assert_eq!(half, format!("{secret} is of no use without {shown}"));
    }
}
