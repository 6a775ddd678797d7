//! `looptrain drain`, `pause`, `resume` and `stop`: what an operator asks of a running coordinator.

use anyhow::{Context, Result, bail};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{DrainRequest, PauseRequest, ResumeRequest, StopRequest};
use tonic::transport::Channel;

use crate::cli::{Drain, Pause, Resume, Stop};

async fn connect(url: &str) -> Result<CoordinatorClient<Channel>> {
    CoordinatorClient::connect(url.to_owned())
        .await
        .with_context(|| format!("cannot reach a coordinator at {url}"))
}

/// What the coordinator answered, without the wrapping of the call.
fn answered<T>(answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T> {
    match answer {
        Ok(response) => Ok(response.into_inner()),
        Err(status) => bail!("{}", status.message()),
    }
}

pub(crate) async fn drain(args: Drain) -> Result<()> {
    let Drain { worker, coordinator, reason } = args;
    let request = DrainRequest { worker: worker.clone(), reason };
    answered(connect(&coordinator).await?.drain(request).await)?;
    println!("{worker} leaves after the step it computes");
    Ok(())
}

pub(crate) async fn pause(args: Pause) -> Result<()> {
    let Pause { coordinator, reason } = args;
    let reply = answered(connect(&coordinator).await?.pause(PauseRequest { reason }).await)?;
    println!("the run pauses after the step in flight; committed so far: {}", reply.step);
    Ok(())
}

pub(crate) async fn resume(args: Resume) -> Result<()> {
    let coordinator = connect(&args.coordinator).await;
    let reply = answered(coordinator?.resume(ResumeRequest {}).await)?;
    println!("the run goes on from step {}", reply.step);
    Ok(())
}

pub(crate) async fn stop(args: Stop) -> Result<()> {
    let Stop { coordinator, reason } = args;
    let reply = answered(connect(&coordinator).await?.stop(StopRequest { reason }).await)?;
    println!(
        "the run stops after the step in flight, with a checkpoint; committed so far: {}",
        reply.step
    );
    Ok(())
}
