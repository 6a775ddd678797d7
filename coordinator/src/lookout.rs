//! Looks whether the store answers this process, for a worker says that it does not answer there.

use std::time::Duration;

use looptrain_storage::Store;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::core::Event;
use crate::runtime::Input;

/// A store that takes longer than this to say that some object is not there does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where to look, and whom to tell.
pub(crate) struct Lookout {
    pub(crate) store: Store,
    pub(crate) inputs: mpsc::Sender<Input>,
}

impl Lookout {
    /// Looks in the background; what was seen comes as an event.
    pub(crate) fn look(&self) {
        let (store, inputs) = (self.store.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let seen = match timeout(PATIENCE, store.check_reachable()).await {
                // That it does not let this process look is an answer, too.
                Ok(Err(error)) if error.may_pass() => Err(error.to_string()),
                Ok(_) => Ok(()),
                Err(_) => Err(format!("{} has not answered for {PATIENCE:?}", store.url())),
            };
            // The runtime has gone away only if the process is ending.
            let _ = inputs.send(Input::Event(Event::StoreSeen(seen))).await;
        });
    }
}
