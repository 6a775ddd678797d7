//! Whether addresses are free, and whether there is a coordinator.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use looptrain_proto::transport::{self, Credentials, innermost};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{StatusReply, StatusRequest};
use looptrain_proto::{PROTOCOL_VERSION, Spec};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tonic::{Code, Status};

use super::Finding;

/// How long a coordinator may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether this machine has the addresses and nobody listens there.
pub(super) async fn check_addresses(addresses: &[SocketAddr], is_secured: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    // All at a time: an address that is given twice is free only once.
    let mut bound = Vec::new();
    for address in addresses {
        let check = format!("listen on {address}");
        match TcpListener::bind(address).await {
            Ok(listener) => {
                bound.push(listener);
                findings.push(free(&check, *address, is_secured));
            }
            Err(error) => {
                let remedy = match error.kind() {
                    ErrorKind::AddrInUse => {
                        "choose another port, or end what listens there (`ss -ltnp` names it)"
                    }
                    ErrorKind::AddrNotAvailable => {
                        "write an address of this machine (`ip address` lists them), or 0.0.0.0 for all"
                    }
                    ErrorKind::PermissionDenied => "choose a port above 1023",
                    _ => "choose another address",
                };
                findings.push(Finding::problem(&check, error.to_string(), remedy));
            }
        }
    }
    findings
}

/// What is said of an address that is free.
fn free(check: &str, address: SocketAddr, is_secured: bool) -> Finding {
    if address.ip().is_loopback() || is_secured {
        return Finding::well(check, "it is free");
    }
    let remedy = "give certificates with --tls DIR (`looptrain certs` makes them), or --insecure to \
                  coordinator and worker on a network that you trust: without one of them they refuse it";
    Finding::warning(check, "it is free, and other machines can reach it without TLS", remedy)
}

/// What the coordinator says, and by how many seconds its clock is ahead.
pub(super) async fn ask(
    url: Option<&str>,
    credentials: Option<&Arc<Credentials>>,
    spec: Option<&Spec>,
) -> (Vec<Finding>, Option<f64>) {
    let Some(url) = url else {
        let why = "none is given; --coordinator URL asks one";
        return (vec![Finding::not_checked("coordinator", why)], None);
    };
    let remedy = "start `looptrain coordinator` there, with a --listen address that this machine \
                  reaches, and let its port through firewalls";
    let endpoint = match transport::endpoint(url, credentials.is_some()) {
        Ok(endpoint) => endpoint,
        Err(reason) => {
            let remedy =
                "write --coordinator http://HOST:PORT, or https://HOST:PORT with --tls DIR";
            let finding = Finding::problem("coordinator", format!("{url}: {reason}"), remedy);
            return (vec![finding], None);
        }
    };
    let asked = async {
        let channel = transport::dial(&endpoint, credentials).await;
        let channel = channel.map_err(|error| Status::unavailable(innermost(&error)))?;
        CoordinatorClient::new(channel).status(StatusRequest {}).await
    };
    let silent =
        || Err(Status::unavailable(format!("it says nothing for {} s", PATIENCE.as_secs())));
    match timeout(PATIENCE, asked).await.unwrap_or_else(|_| silent()) {
        Err(status) if status.code() == Code::PermissionDenied => {
            let found = format!("{url} is there; what it says is not for this certificate's role");
            (vec![Finding::well("coordinator", found)], None)
        }
        Err(status) => {
            let found = format!("{url} cannot be reached: {}", status.message());
            (vec![Finding::problem("coordinator", found, remedy)], None)
        }
        Ok(response) => {
            let date = response.metadata().get("date").and_then(|date| date.to_str().ok());
            let ahead = date.and_then(|date| ahead(date, SystemTime::now()));
            (judge(url, response.get_ref(), spec), ahead)
        }
    }
}

/// By how many seconds an HTTP date, of whole seconds, is ahead of a time.
fn ahead(date: &str, now: SystemTime) -> Option<f64> {
    let told = httpdate::parse_http_date(date).ok()?;
    Some(match told.duration_since(now) {
        Ok(ahead) => ahead.as_secs_f64(),
        // The date is cut to the second.
        Err(behind) => -(behind.duration().as_secs_f64() - 1.0).max(0.0),
    })
}

fn judge(url: &str, reply: &StatusReply, spec: Option<&Spec>) -> Vec<Finding> {
    let reached = Finding::well(
        "coordinator",
        format!(
            "{url} trains run `{}`: {}, step {} of {}",
            reply.run, reply.phase, reply.step, reply.total_steps
        ),
    );
    let remedy = "use the same release of looptrain on both machines";
    let versions = match reply.protocol_version {
        PROTOCOL_VERSION => {
            Finding::well("protocol", format!("version {PROTOCOL_VERSION} on both"))
        }
        0 => Finding::warning("protocol", "the coordinator does not say its version", remedy),
        theirs => Finding::problem(
            "protocol",
            format!("the coordinator speaks version {theirs}, this program {PROTOCOL_VERSION}"),
            remedy,
        ),
    };
    let mut findings = vec![reached, versions];
    if let Some(spec) = spec.filter(|spec| spec.run.name != reply.run) {
        let found =
            format!("the coordinator trains `{}`, the spec is of `{}`", reply.run, spec.run.name);
        let remedy = "ask the coordinator of that run, or give the spec of this one";
        findings.push(Finding::problem("run", found, remedy));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn a_date_is_compared_by_the_second() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_000_700);
        let ahead = |date| ahead(date, now).map(f64::round);
        assert_eq!(ahead("Sun, 09 Sep 2001 01:46:40 GMT"), Some(0.0));
        assert_eq!(ahead("Sun, 09 Sep 2001 01:47:40 GMT"), Some(59.0));
        assert_eq!(ahead("Sun, 09 Sep 2001 01:45:40 GMT"), Some(-60.0));
        assert_eq!(ahead("yesterday"), None);
    }

    #[test]
    fn another_version_of_the_protocol_is_a_problem_and_none_a_warning() {
        let verdict = |protocol_version| {
            let reply = StatusReply { protocol_version, ..StatusReply::default() };
            judge("http://there", &reply, None)[1].verdict
        };
        assert_eq!(verdict(PROTOCOL_VERSION), Verdict::Well);
        assert_eq!(verdict(0), Verdict::Warning);
        assert_eq!(verdict(PROTOCOL_VERSION + 1), Verdict::Problem);
    }

    #[tokio::test]
    async fn an_address_can_be_listened_on_once() {
        let free = TcpListener::bind("127.0.0.1:0").await.and_then(|it| it.local_addr());
        let free = free.unwrap_or_else(|error| panic!("{error}"));
        let elsewhere = SocketAddr::from(([192, 0, 2, 1], 7400));
        let findings = check_addresses(&[free, free, elsewhere], false).await;
        let verdicts: Vec<Verdict> = findings.iter().map(|finding| finding.verdict).collect();
        assert_eq!(verdicts, [Verdict::Well, Verdict::Problem, Verdict::Problem], "{findings:?}");
        let everywhere = SocketAddr::from(([0, 0, 0, 0], 7400));
        assert_eq!(super::free("listen", everywhere, false).verdict, Verdict::Warning);
        assert_eq!(super::free("listen", everywhere, true).verdict, Verdict::Well);
    }
}
