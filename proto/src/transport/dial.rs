//! The way to a coordinator.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Error, Uri};
use tower::Service;

use super::{Credentials, Port};

/// How long an address, and then TLS, may take to answer.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// What a coordinator's URL stands for, if it is one: `https://HOST:PORT` for who has credentials,
/// `http://HOST:PORT` for who has none.
///
/// # Errors
/// What is wrong with the URL, and what to write.
pub fn endpoint(url: &str, secured: bool) -> Result<Endpoint, String> {
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|error| format!("{error}; write http://HOST:PORT, or https:// with --tls"))?;
    match (endpoint.uri().scheme_str(), secured) {
        (Some("http"), false) | (Some("https"), true) => {}
        (Some("https"), false) => {
            return Err("https:// takes credentials; say where they are with --tls DIR".into());
        }
        (Some("http"), true) => {
            return Err("with --tls, a coordinator's address begins with https://".into());
        }
        (scheme, _) => {
            let scheme = scheme.unwrap_or("missing");
            return Err(format!(
                "its scheme is {scheme}; write http://HOST:PORT, or https:// with --tls"
            ));
        }
    }
    match endpoint.uri().port_u16() {
        Some(_) if secured => Ok(within(endpoint.uri().clone())?),
        Some(_) => Ok(endpoint.tcp_nodelay(true)),
        None => Err("it has no port; a coordinator listens on 7400 unless told otherwise".into()),
    }
}

/// The endpoint of an https:// address. To connect there takes no TLS but that of [`dial`], so tonic, which
/// would add its own, is given the address as a plain one, and the real one for its requests.
fn within(address: Uri) -> Result<Endpoint, String> {
    let mut parts = address.clone().into_parts();
    parts.scheme = "http".parse().ok();
    let plain = Uri::from_parts(parts).map_err(|error| error.to_string())?;
    Ok(Endpoint::from(plain).origin(address))
}

/// Connects to a coordinator, once.
///
/// # Errors
/// What the network or TLS says.
pub async fn dial(
    endpoint: &Endpoint,
    credentials: Option<&Arc<Credentials>>,
) -> Result<Channel, Error> {
    let Some(credentials) = credentials else { return endpoint.connect().await };
    let credentials = Arc::clone(credentials);
    // Of a name with several addresses it takes the one that answers, as without TLS.
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIME));
    let connector = tower::service_fn(move |uri: Uri| {
        let (credentials, mut tcp) = (Arc::clone(&credentials), tcp.clone());
        async move {
            let stream = tcp.call(uri).await.map_err(io::Error::other)?.into_inner();
            let connecting = credentials.connect(stream, Port::Coordinator);
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer in TLS");
            timeout(CONNECT_TIME, connecting).await.map_err(late)?.map(TokioIo::new)
        }
    });
    endpoint.connect_with_connector(connector).await
}

/// The cause at the bottom of an error, for people: "connection refused" says more than "transport
/// error".
#[must_use]
pub fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    if let Some(source) = error.source() {
        return innermost(source);
    }
    let text = error.to_string();
    match text.contains("frame with invalid size") {
        // What HTTP/2 makes of the first bytes of TLS.
        true => format!("{text}: it may speak TLS, and then its address begins with https://"),
        false => text,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_url_fits_to_credentials_or_says_what_does_not() {
        assert!(endpoint("http://127.0.0.1:7400", false).is_ok());
        assert!(endpoint("https://[::1]:7400", true).is_ok());
        for (url, secured, remedy) in [
            ("http://a:1", true, "https://"),
            ("https://a:1", false, "--tls DIR"),
            ("ftp://a:1", false, "ftp"),
            ("a:1", true, "scheme"),
            ("http://a", false, "no port"),
            ("http://a b:1", false, "http://HOST:PORT"),
        ] {
            let error = endpoint(url, secured).unwrap_err();
            assert!(error.contains(remedy), "{url}: {error}");
        }
    }
}
