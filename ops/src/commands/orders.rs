//! `looptrain drain`, `pause`, `resume`, `save` and `stop`: what an operator asks of a running coordinator.

use std::error::Error;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use looptrain_proto::transport::{self, Role, innermost};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{
    self, DrainRequest, PauseRequest, ResumeRequest, SaveRequest, StatusRequest, StopRequest,
};
use tonic::transport::Channel;

use crate::cli::{Drain, Pause, Resume, Save, Stop, TlsArgs};
use crate::progress::print_line;
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
    outln!("{worker} leaves after the step it computes");
    Ok(())
}

pub(crate) async fn pause(args: Pause) -> Result<()> {
    let Pause { coordinator, tls, reason } = args;
    let mut client = as_operator(&coordinator, &tls).await?;
    let reply = answered(client.pause(PauseRequest { reason }).await)?;
    outln!("the run pauses after the step in flight; committed so far: {}", reply.step);
    warn_unless_kept("paused", &reply.not_kept);
    Ok(())
}

/// A coordinator that takes over before the order is in the store does not know of it.
fn warn_unless_kept(how: &str, not_kept: &str) {
    if !not_kept.is_empty() {
        print_line(&format!(
            "that the run is {how} is not in the store yet, and lost if its coordinator dies now; it tries again \
             until it is: {not_kept}"
        ));
    }
}

pub(crate) async fn resume(args: Resume) -> Result<()> {
    let coordinator = as_operator(&args.coordinator, &args.tls).await;
    let reply = answered(coordinator?.resume(ResumeRequest {}).await)?;
    match reply.was_paused {
        true => outln!("the run goes on from step {}", reply.step),
        false => outln!("the run was not paused; committed so far: {}", reply.step),
    }
    warn_unless_kept("to go on", &reply.not_kept);
    Ok(())
}

/// How often somebody who waits for one is told why.
const REMIND_EVERY: Duration = Duration::from_secs(20);

/// How often it is looked whether a checkpoint is there.
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(crate) async fn save(args: Save) -> Result<()> {
    let mut client = as_operator(&args.coordinator, &args.tls).await?;
    let v1::SaveReply { step } = answered(client.save(SaveRequest {}).await)?;
    print_line(&format!("a checkpoint is saved at the next step; committed so far: {step}"));
    let mut said = Instant::now();
    loop {
        let status = answered(client.status(StatusRequest {}).await)?;
        if status.checkpoint_step >= step.max(1) {
            outln!("the checkpoint of step {} is saved", status.checkpoint_step);
            return Ok(());
        }
        if said.elapsed() >= REMIND_EVERY {
            said = Instant::now();
            print_line(&format!(
                "there is none yet; the run is {}: {}",
                status.phase, status.reason
            ));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

pub(crate) async fn stop(args: Stop) -> Result<()> {
    let Stop { coordinator, tls, reason } = args;
    let mut client = as_operator(&coordinator, &tls).await?;
    let reply = answered(client.stop(StopRequest { reason }).await)?;
    outln!(
        "the run stops after the step in flight, with a checkpoint; committed so far: {}",
        reply.step
    );
    Ok(())
}
