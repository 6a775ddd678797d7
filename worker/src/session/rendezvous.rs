//! How the ranks of a generation come to have one id of a communicator: rank 0 tells the coordinator, which
//! passes it on to the others.

use looptrain_proto::Generation;
use looptrain_proto::v1::worker_message::Kind;
use looptrain_proto::v1::{Communicator, WorkerMessage};
use tokio::sync::{mpsc, oneshot};

/// This rank's end of it, for one generation.
#[derive(Debug)]
pub struct Rendezvous {
    generation: Generation,
    outgoing: mpsc::Sender<WorkerMessage>,
    heard: oneshot::Receiver<Vec<u8>>,
}

impl Rendezvous {
    pub(crate) fn new(
        generation: Generation,
        outgoing: mpsc::Sender<WorkerMessage>,
        heard: oneshot::Receiver<Vec<u8>>,
    ) -> Self {
        Self { generation, outgoing, heard }
    }

    /// Passes rank 0's id on to all others; false when the session takes no more messages.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the ring needs no id"))]
    #[must_use]
    pub(crate) fn tell(&self, id: Vec<u8>) -> bool {
        let kind = Some(Kind::Communicator(Communicator { generation: self.generation.0, id }));
        self.outgoing.try_send(WorkerMessage { kind }).is_ok()
    }

    /// The id that rank 0 has passed on; `None` when it will not come any more.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the ring needs no id"))]
    pub(crate) async fn hear(&mut self) -> Option<Vec<u8>> {
        (&mut self.heard).await.ok()
    }
}
