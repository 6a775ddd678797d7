//! The stand-in in this process, told what to do by a test.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, MutexGuard};

use super::compile;
use crate::reduce::nccl::Library;

/// The stand-in, whose faults and notes are of the whole process: one test at a time.
pub(crate) struct StandIn {
    library: Arc<Library>,
    control: libloading::Library,
    _turn: MutexGuard<'static, ()>,
}

impl StandIn {
    pub(crate) fn take() -> Self {
        static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
        static PATH: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
            let folder = tempfile::tempdir().unwrap();
            let path = compile(folder.path());
            (folder, path)
        });
        let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let path = &PATH.1;
        // SAFETY: the stand-in has just been made, and runs nothing when loaded.
        let control = unsafe { libloading::Library::new(path) }.unwrap();
        let new = Self { library: Arc::new(Library::open(path).unwrap()), control, _turn: turn };
        // What an earlier test has left.
        // SAFETY: the function has this type.
        unsafe { new.control.get::<unsafe extern "C" fn()>(b"stand_in_forget\0").unwrap()() };
        new.calls();
        new
    }

    pub(crate) fn library(&self) -> Arc<Library> {
        Arc::clone(&self.library)
    }

    /// Waits until a function has been called so often since the calls were last asked for; how often it has.
    pub(crate) async fn until_called(&self, call: &str, least: usize) -> usize {
        let mut seen = 0;
        for _ in 0..4_000 {
            seen += self.calls().get(call).copied().unwrap_or(0);
            if seen >= least {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        seen
    }

    /// The `after`-th such call of a rank goes wrong.
    pub(crate) fn fail(&self, call: &str, rank: i32, after: i32, result: i32) {
        type Fail = unsafe extern "C" fn(*const c_char, c_int, c_int, c_int);
        let call = CString::new(call).unwrap();
        // SAFETY: the function has this type.
        unsafe {
            let fail = self.control.get::<Fail>(b"stand_in_fail\0").unwrap();
            fail(call.as_ptr(), rank, after, result);
        }
    }

    /// How often each function was called since this was last asked, by any rank.
    pub(crate) fn calls(&self) -> BTreeMap<String, usize> {
        type Calls = unsafe extern "C" fn(*mut c_char, usize) -> usize;
        let mut bytes = vec![0u8; 1 << 20];
        // SAFETY: the function has this type, and writes no more than there is room.
        let length = unsafe {
            let calls = self.control.get::<Calls>(b"stand_in_calls\0").unwrap();
            calls(bytes.as_mut_ptr().cast(), bytes.len())
        };
        let mut counts = BTreeMap::new();
        for line in std::str::from_utf8(&bytes[..length]).unwrap().lines() {
            let (_, call) = line.split_once(' ').unwrap();
            *counts.entry(call.to_owned()).or_default() += 1;
        }
        counts
    }
}
