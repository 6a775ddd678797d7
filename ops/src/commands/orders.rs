//! `looptrain drain`, `pause`, `resume` and `stop`: what an operator asks of a running coordinator.

use std::error::Error;

use anyhow::{Result, bail};
use looptrain_proto::transport::{self, Role, innermost};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{DrainRequest, PauseRequest, ResumeRequest, StopRequest};
use tonic::transport::Channel;

use crate::cli::{Drain, Pause, Resume, Stop, TlsArgs};
use crate::security::Usage;

/// A client of the coordinator at `url`, with the certificate of one of these roles when there is one.
pub(super) async fn connect(
    url: &str,
    tls: &TlsArgs,
    roles: &[Role],
) -> Result<CoordinatorClient<Channel>> {
    let credentials = tls.credentials(roles)?;
    let endpoint = transport::endpoint(url, credentials.is_some())
        .map_err(|reason| Usage(format!("{url}: {reason}")))?;
    let channel = transport::dial(&endpoint, credentials.as_ref()).await;
    channel.map(CoordinatorClient::new).map_err(|error| {
        let reason = innermost(&error);
        anyhow::anyhow!("cannot reach a coordinator at {url}: {reason}")
    })
}

async fn as_operator(url: &str, tls: &TlsArgs) -> Result<CoordinatorClient<Channel>> {
    connect(url, tls, &[Role::Operator]).await
}

/// What the coordinator answered, without the wrapping of the call.
fn answered<T>(answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T> {
    match answer {
        Ok(response) => Ok(response.into_inner()),
        Err(status) if status.source().is_some() => bail!("{}", innermost(&status)),
        Err(status) => bail!("{}", status.message()),
    }
}

pub(crate) async fn drain(args: Drain) -> Result<()> {
    let Drain { worker, coordinator, tls, reason } = args;
    let request = DrainRequest { worker: worker.clone(), reason };
    answered(as_operator(&coordinator, &tls).await?.drain(request).await)?;
    println!("{worker} leaves after the step it computes");
    Ok(())
}

pub(crate) async fn pause(args: Pause) -> Result<()> {
    let Pause { coordinator, tls, reason } = args;
    let mut client = as_operator(&coordinator, &tls).await?;
    let reply = answered(client.pause(PauseRequest { reason }).await)?;
    println!("the run pauses after the step in flight; committed so far: {}", reply.step);
    Ok(())
}

pub(crate) async fn resume(args: Resume) -> Result<()> {
    let coordinator = as_operator(&args.coordinator, &args.tls).await;
    let reply = answered(coordinator?.resume(ResumeRequest {}).await)?;
    println!("the run goes on from step {}", reply.step);
    Ok(())
}

pub(crate) async fn stop(args: Stop) -> Result<()> {
    let Stop { coordinator, tls, reason } = args;
    let mut client = as_operator(&coordinator, &tls).await?;
    let reply = answered(client.stop(StopRequest { reason }).await)?;
    println!(
        "the run stops after the step in flight, with a checkpoint; committed so far: {}",
        reply.step
    );
    Ok(())
}
