//! The owner of a raw communicator: it is aborted once, by whoever comes first.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::NcclError;
use super::library::{Library, Raw, UniqueId};

/// How often it is looked whether somebody else has aborted it.
const LOOK: Duration = Duration::from_millis(1);

/// One communicator. Calls go through [`Communicator::call`], one at a time; the end may come from any
/// thread, also while a call is stuck.
#[derive(Debug)]
pub(super) struct Communicator {
    library: Arc<Library>,
    /// Set by NCCL as soon as it has begun to make it.
    comm: AtomicPtr<c_void>,
    /// It is about to be set: nobody but the thread that is within that call may end it.
    beginning: AtomicBool,
    /// Held while a thread is within a call.
    calling: Mutex<()>,
    /// Since when nobody wants it any more.
    abandoned: OnceLock<Instant>,
    /// It is being aborted: the pointer is not to be used again.
    ending: AtomicBool,
    /// It has been.
    ended: AtomicBool,
}

impl Communicator {
    pub(super) fn new(library: Arc<Library>) -> Self {
        Self {
            library,
            comm: AtomicPtr::new(null_mut()),
            beginning: AtomicBool::new(false),
            calling: Mutex::default(),
            abandoned: OnceLock::new(),
            ending: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        }
    }

    /// Begins to make it.
    pub(super) fn begin(&self, id: UniqueId, rank: usize, world: usize) -> Result<(), NcclError> {
        let _calling = self.calling.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_abandoned() {
            return Err(NcclError::Abandoned);
        }
        self.beginning.store(true, Ordering::Release);
        // SAFETY: the place lives as long as this does, and NCCL writes a pointer there; the caller's
        // thread has the device.
        let begun = unsafe { self.library.init(self.comm.as_ptr().cast(), id, rank, world) };
        self.beginning.store(false, Ordering::Release);
        begun
    }

    /// Calls a function of NCCL with the communicator.
    pub(super) fn call<R>(
        &self,
        call: impl FnOnce(&Library, Raw) -> Result<R, NcclError>,
    ) -> Result<R, NcclError> {
        let _calling = self.calling.lock().unwrap_or_else(PoisonError::into_inner);
        let comm = self.comm.load(Ordering::Acquire);
        if self.is_abandoned() || comm.is_null() {
            return Err(NcclError::Abandoned);
        }
        call(&self.library, comm.cast())
    }

    /// Whether what was begun is done.
    pub(super) fn is_settled(&self) -> Result<bool, NcclError> {
        // SAFETY: it has not been aborted, or this would not be called.
        self.call(|library, comm| unsafe { library.is_settled(comm) })
    }

    /// No more calls from now on.
    pub(super) fn abandon(&self) {
        self.abandoned.get_or_init(Instant::now);
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.get().is_some()
    }

    /// For how long it has been of no use to anybody.
    pub(super) fn abandoned_for(&self) -> Duration {
        self.abandoned.get().map_or(Duration::ZERO, Instant::elapsed)
    }

    /// Ends it, or waits until whoever does so has done it. Not to be called by two threads that both
    /// may be within a call: this is for the one that makes the calls.
    pub(super) fn abort(&self) {
        self.abandon();
        let calling = self.calling.lock().unwrap_or_else(PoisonError::into_inner);
        drop(calling);
        self.end();
    }

    /// Ends it from another thread than that which makes the calls, which may be stuck within one: that is
    /// what an abort is for. False when it is not to be ended yet, since NCCL has only begun to make it.
    pub(super) fn abort_from_outside(&self) -> bool {
        self.abandon();
        let calling = match self.calling.try_lock() {
            Ok(calling) => Some(calling),
            Err(TryLockError::Poisoned(calling)) => Some(calling.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if calling.is_none() && self.beginning.load(Ordering::Acquire) {
            return false;
        }
        drop(calling);
        self.end();
        true
    }

    /// Has been abandoned, so that no call begins any more.
    fn end(&self) {
        let comm = self.comm.load(Ordering::Acquire);
        if comm.is_null() {
            return;
        }
        if self.ending.swap(true, Ordering::AcqRel) {
            while !self.ended.load(Ordering::Acquire) {
                std::thread::sleep(LOOK);
            }
            return;
        }
        // SAFETY: this is the only abort, and no call begins any more. One that is stuck comes back with an
        // error, by NCCL's word, and its thread does not touch the communicator again.
        if let Err(error) = unsafe { self.library.abort(comm.cast()) } {
            tracing::warn!(%error, "a communicator did not end well");
        }
        self.ended.store(true, Ordering::Release);
    }
}
