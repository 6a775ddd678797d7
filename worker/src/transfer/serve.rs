//! Answering joiners.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use looptrain_proto::Step;
use looptrain_proto::transport::Connection;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::shelf::Shelf;
use super::wire::{Item, Part, Reply, Request, send_digests, send_votes};
use crate::memory::Memory;
use crate::{Moment, Moments};

/// A joiner that asks nothing, or reads nothing, for this long is hung up on: longer than it may
/// wait for another source's digests.
const PATIENCE: Duration = Duration::from_secs(180);

/// Serves what is on the shelf, and what is remembered of it, to every joiner that connects, until no more
/// can.
pub(crate) async fn serve(
    mut joiners: mpsc::Receiver<Connection>,
    shelf: Shelf,
    memory: Memory,
    moments: Moments,
) {
    let mut served = JoinSet::new();
    while let Some(joiner) = joiners.recv().await {
        while served.try_join_next().is_some() {}
        let (shelf, memory, moments) = (shelf.clone(), memory.clone(), moments.clone());
        served.spawn(async move {
            if let Err(error) = serve_one(joiner, &shelf, &memory, &moments).await {
                tracing::debug!(%error, "a joiner was served no further");
            }
        });
    }
}

async fn serve_one(
    mut joiner: Connection,
    shelf: &Shelf,
    memory: &Memory,
    moments: &Moments,
) -> io::Result<()> {
    loop {
        let request = match timeout(PATIENCE, Request::receive(&mut joiner)).await? {
            // The joiner has all it wants.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            request => request?,
        };
        answer(&mut joiner, shelf, memory, request).await?;
        // TLS may hold back what the joiner waits for.
        timeout(PATIENCE, joiner.flush()).await??;
        if let Request { item: Item::State(step), part: Part::Chunk(_) } = request {
            moments.at(Moment::Serving(step));
        }
    }
}

async fn answer(
    joiner: &mut Connection,
    shelf: &Shelf,
    memory: &Memory,
    request: Request,
) -> io::Result<()> {
    let goods = match shelf.find(request.item) {
        Ok(goods) => goods,
        Err(lack) => return timeout(PATIENCE, Reply::Lacking(lack).send(joiner)).await?,
    };
    match request.part {
        Part::Digests => {
            let hashing = Arc::clone(&goods);
            tokio::task::spawn_blocking(move || hashing.digests().len()).await?;
            timeout(PATIENCE, send_digests(joiner, goods.digests())).await?
        }
        Part::Chunk(index) => {
            let chunk = goods.chunk(index).ok_or(io::ErrorKind::InvalidInput)?;
            let sent = async {
                Reply::Here { bytes: chunk.len() as u64 }.send(joiner).await?;
                joiner.write_all(chunk).await
            };
            timeout(PATIENCE, sent).await?
        }
        Part::Votes => {
            let steps = match request.item {
                Item::State(step) => Step(0)..=step,
                Item::Update(step) => step..=step,
            };
            timeout(PATIENCE, send_votes(joiner, memory.votes(steps))).await?
        }
    }
}
