//! Preemption notices: a cloud that is about to take a machine away says so some time before, in the
//! metadata service of the machine. A worker that listens leaves after the step in flight, so that
//! nobody waits for it; one that does not is lost like any machine that dies.
//!
//! | source | what is asked, once a second | notice |
//! |---|---|---|
//! | `aws` | `/latest/meta-data/spot/instance-action`, with a session token | two minutes |
//! | `gcp` | `/computeMetadata/v1/instance/preempted` | 30 seconds |
//! | `azure` | `/metadata/scheduledevents`, events for this machine that end it | 30 seconds or more |
//! | `file:PATH` | whether the file is there: for hooks of other schedulers | theirs to say |

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use looptrain_worker::Stop;
use serde_json::Value;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::codegen::http::{Method, Request, StatusCode};

use crate::progress::print_line;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The service is on the machine; an answer that takes longer will not come.
const PATIENCE: Duration = Duration::from_secs(3);

/// Answers are short.
const MAX_ANSWER: usize = 1 << 20;

/// Seconds for which a session token of AWS is asked: the most there are.
const TOKEN_SECONDS: &str = "21600";

/// Who says that this machine is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Aws,
    Gcp,
    Azure,
    File(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "aws" => Ok(Self::Aws),
            "gcp" => Ok(Self::Gcp),
            "azure" => Ok(Self::Azure),
            _ => match text.strip_prefix("file:") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err("write aws, gcp, azure or file:PATH".into()),
            },
        }
    }
}

/// Looks for a notice from now on, and tells the worker to leave when there is one. `service` takes
/// the place of the metadata service's usual address.
///
/// # Errors
/// When `service` is no address.
pub(crate) fn watch(source: Source, service: Option<String>, stop: Stop) -> Result<()> {
    let service = service.unwrap_or_else(|| usual_address(&source).to_owned());
    if !service.starts_with("http://") {
        bail!("`{service}` is no metadata service: write http://HOST:PORT");
    }
    let client = Client::builder(TokioExecutor::new()).build_http();
    let mut lookout = Lookout { source, service, client, token: None, machine: None };
    tokio::spawn(async move {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut blind = false;
        loop {
            ticks.tick().await;
            match lookout.look().await {
                Ok(Some(notice)) => {
                    print_line(&format!("preemption notice: {notice}"));
                    return stop.tell(format!("preemption notice: {notice}"));
                }
                Ok(None) => blind = false,
                Err(error) => {
                    if !std::mem::replace(&mut blind, true) {
                        tracing::warn!("preemption notices may be missed: {error:#}");
                    }
                }
            }
        }
    });
    Ok(())
}

fn usual_address(source: &Source) -> &'static str {
    match source {
        Source::Gcp => "http://metadata.google.internal",
        Source::Aws | Source::Azure | Source::File(_) => "http://169.254.169.254",
    }
}

/// Where notices come from, and what is remembered between two looks.
struct Lookout {
    source: Source,
    service: String,
    client: Client<HttpConnector, Empty<Bytes>>,
    /// Of AWS.
    token: Option<String>,
    /// This machine's name in events of Azure.
    machine: Option<String>,
}

impl Lookout {
    /// The notice, if there is one.
    async fn look(&mut self) -> Result<Option<String>> {
        match self.source.clone() {
            Source::Aws => self.ask_aws().await,
            Source::Gcp => {
                let path = "/computeMetadata/v1/instance/preempted";
                let answer = self.get(path, &[("Metadata-Flavor", "Google")]).await?;
                of_gcp(&answer.found(path)?)
            }
            Source::Azure => self.ask_azure().await,
            Source::File(path) => match tokio::fs::read_to_string(&path).await {
                Ok(text) => Ok(Some(of_file(&path.display().to_string(), &text))),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
            },
        }
    }

    async fn ask_aws(&mut self) -> Result<Option<String>> {
        if self.token.is_none() {
            let header = [("X-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS)];
            let path = "/latest/api/token";
            let answer = self.request(Method::PUT, path, &header).await?;
            self.token = Some(answer.found(path)?);
        }
        let token = self.token.clone().unwrap_or_default();
        let path = "/latest/meta-data/spot/instance-action";
        let answer = self.get(path, &[("X-aws-ec2-metadata-token", &token)]).await?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(None),
            StatusCode::UNAUTHORIZED => {
                // It is over; the next look asks for another one.
                self.token = None;
                Ok(None)
            }
            _ => Ok(Some(of_aws(&answer.found(path)?))),
        }
    }

    async fn ask_azure(&mut self) -> Result<Option<String>> {
        let header = [("Metadata", "true")];
        let machine = match &self.machine {
            Some(machine) => machine.clone(),
            None => {
                let path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";
                let name = self.get(path, &header).await?.found(path)?;
                self.machine.insert(name.trim().to_owned()).clone()
            }
        };
        let path = "/metadata/scheduledevents?api-version=2020-07-01";
        of_azure(&self.get(path, &header).await?.found(path)?, &machine)
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        self.request(Method::GET, path, headers).await
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Answer> {
        let url = format!("{}{path}", self.service);
        let mut request = Request::builder().method(method).uri(&url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::new()).with_context(|| format!("cannot ask {url}"))?;
        let exchange = async {
            let response = self.client.request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|error| anyhow!(error))?.to_bytes();
            Ok::<_, anyhow::Error>(Answer { status, body: String::from_utf8_lossy(&body).into() })
        };
        let answer = timeout(PATIENCE, exchange).await;
        let answer = answer.unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}")));
        answer.with_context(|| format!("cannot ask {url}"))
    }
}

struct Answer {
    status: StatusCode,
    body: String,
}

impl Answer {
    /// The text of an answer that has one.
    fn found(self, path: &str) -> Result<String> {
        match self.status.is_success() {
            true => Ok(self.body),
            false => bail!("the metadata service answers {} to {path}", self.status),
        }
    }
}

/// What AWS answers when the instance is to be stopped, such as
/// `{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`. That it answers at all is the notice.
fn of_aws(answer: &str) -> String {
    let said = serde_json::from_str::<Value>(answer).unwrap_or_default();
    match (said["action"].as_str(), said["time"].as_str()) {
        (Some(action), Some(time)) => format!("AWS will {action} this machine at {time}"),
        _ => "AWS will stop this machine".into(),
    }
}

fn of_gcp(answer: &str) -> Result<Option<String>> {
    match answer.trim() {
        "TRUE" => Ok(Some("Google Cloud is stopping this machine".into())),
        "FALSE" => Ok(None),
        other => bail!("the metadata service says `{other}` for TRUE or FALSE"),
    }
}

/// What Azure answers: events, each with the machines it is for. A `Freeze` is over in seconds, and a
/// worker that is away for so long comes back.
fn of_azure(answer: &str, machine: &str) -> Result<Option<String>> {
    const ENDS: [&str; 4] = ["Preempt", "Terminate", "Redeploy", "Reboot"];
    let said: Value = serde_json::from_str(answer)
        .context("the metadata service does not answer with scheduled events")?;
    let events = said["Events"].as_array().context("there is no list of scheduled events")?;
    let for_us = |event: &&Value| {
        let machines = event["Resources"].as_array();
        machines.is_some_and(|all| all.iter().any(|it| it.as_str() == Some(machine)))
            && event["EventType"].as_str().is_some_and(|kind| ENDS.contains(&kind))
    };
    Ok(events.iter().find(for_us).map(|event| {
        let kind = event["EventType"].as_str().unwrap_or_default().to_lowercase();
        match event["NotBefore"].as_str().filter(|time| !time.is_empty()) {
            Some(time) => format!("Azure will {kind} this machine at {time}"),
            None => format!("Azure will {kind} this machine now"),
        }
    }))
}

/// Whether an answer is a notice of anybody's, for fuzzing.
#[cfg(feature = "fuzzing")]
pub(crate) fn any_notice(answer: &str) -> bool {
    let azure = of_azure(answer, "machine").is_ok_and(|notice| notice.is_some());
    let (aws, file) = (of_aws(answer), of_file("notice", answer));
    assert!(!aws.is_empty() && !file.is_empty());
    azure || of_gcp(answer).is_ok_and(|notice| notice.is_some())
}

fn of_file(path: &str, text: &str) -> String {
    match text.lines().next().map(str::trim).filter(|line| !line.is_empty()) {
        Some(line) => line.to_owned(),
        None => format!("{path} is there"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_cloud_or_a_file() {
        assert_eq!("aws".parse(), Ok(Source::Aws));
        assert_eq!("file:/run/leave".parse(), Ok(Source::File("/run/leave".into())));
        assert!("file:".parse::<Source>().unwrap_err().contains("file:PATH"));
        assert!("ibm".parse::<Source>().is_err());
    }

    #[test]
    fn aws_says_what_it_does_and_when() {
        let said = of_aws(r#"{"action": "terminate", "time": "2026-09-18T08:22:00Z"}"#);
        assert_eq!(said, "AWS will terminate this machine at 2026-09-18T08:22:00Z");
        assert_eq!(of_aws("soon"), "AWS will stop this machine");
    }

    #[test]
    fn google_says_true_or_false() {
        assert!(of_gcp("TRUE\n").unwrap().is_some());
        assert_eq!(of_gcp("FALSE").unwrap(), None);
        assert!(of_gcp("<html>").unwrap_err().to_string().contains("<html>"));
    }

    #[test]
    fn azure_names_machines_and_not_every_event_ends_one() {
        let events = |kind: &str, machine: &str| {
            format!(
                r#"{{"DocumentIncarnation": 1, "Events": [{{"EventId": "1", "EventType": "{kind}",
                "Resources": ["{machine}"], "NotBefore": "Mon, 19 Sep 2026 18:29:47 GMT"}}]}}"#
            )
        };
        let said = of_azure(&events("Preempt", "us"), "us").unwrap().unwrap();
        assert_eq!(said, "Azure will preempt this machine at Mon, 19 Sep 2026 18:29:47 GMT");
        assert_eq!(of_azure(&events("Preempt", "them"), "us").unwrap(), None);
        assert_eq!(of_azure(&events("Freeze", "us"), "us").unwrap(), None);
        assert_eq!(of_azure(r#"{"Events": []}"#, "us").unwrap(), None);
        assert!(of_azure("{}", "us").is_err());
    }

    #[test]
    fn a_file_may_say_why() {
        assert_eq!(of_file("/run/leave", "node drained for repair\n"), "node drained for repair");
        assert_eq!(of_file("/run/leave", "\n"), "/run/leave is there");
    }
}
