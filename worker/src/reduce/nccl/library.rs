//! NCCL's functions, found at run time.
//!
//! The types are cudarc's; the functions are looked up here, since cudarc looks for a `libnccl.so`,
//! which only packages for developers bring, and panics when there is none.

use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use cudarc::nccl::sys;

use super::NcclError;

/// A call that goes on in the background.
pub(super) const IN_PROGRESS: c_uint = sys::ncclResult_t::ncclInProgress as c_uint;

const SUCCESS: c_uint = sys::ncclResult_t::ncclSuccess as c_uint;

/// What a configuration begins with, and a number that is not given, by NCCL's header.
const MAGIC: c_uint = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;

/// NCCL's type of a communicator.
pub(super) type Raw = sys::ncclComm_t;

/// What ranks find each other by.
pub(super) type UniqueId = [u8; size_of::<sys::ncclUniqueId>()];

/// A release of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NcclVersion(pub u32);

impl fmt::Display for NcclVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(code) = self;
        write!(f, "{}.{}.{}", code / 10_000, code / 100 % 100, code % 100)
    }
}

impl NcclVersion {
    /// Before it, an abort can wait for ever for ranks that are gone
    /// (<https://github.com/pytorch/pytorch/issues/149153>).
    const LEAST: Self = Self(2_26_02);

    /// Releases with which forming again within a process is known to fail, by what NVIDIA's resiliency
    /// extension warns of.
    const BAD: [std::ops::RangeInclusive<Self>; 1] = [Self(2_28_03)..=Self(2_28_08)];

    /// Whether workers may reduce with it.
    ///
    /// # Errors
    /// When the release is too old, or known to be bad.
    pub fn check(self) -> Result<(), NcclError> {
        if self < Self::LEAST {
            let found = self;
            return Err(NcclError::TooOld { found, least: Self::LEAST });
        }
        match Self::BAD.iter().find(|range| range.contains(&self)) {
            Some(range) => {
                Err(NcclError::Bad { found: self, first: *range.start(), last: *range.end() })
            }
            None => Ok(()),
        }
    }
}

/// Numbers that a collective adds up, or compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    /// Sums of 64-bit integers.
    Integers,
    /// Sums of f32.
    Floats,
    /// Sums of bf16.
    Bf16,
    /// The largest of unsigned 32-bit words.
    Largest,
}

impl Numbers {
    fn types(self) -> (sys::ncclDataType_t, sys::ncclRedOp_t) {
        use sys::{ncclDataType_t as Type, ncclRedOp_t as Operation};
        match self {
            Self::Integers => (Type::ncclInt64, Operation::ncclSum),
            Self::Floats => (Type::ncclFloat32, Operation::ncclSum),
            Self::Bf16 => (Type::ncclBfloat16, Operation::ncclSum),
            Self::Largest => (Type::ncclUint32, Operation::ncclMax),
        }
    }
}

// What a function returns is taken as a number: a newer library may know more results than the enum.
type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_uint;
type GetUniqueId = unsafe extern "C" fn(*mut sys::ncclUniqueId) -> c_uint;
type InitRankConfig = unsafe extern "C" fn(
    *mut Raw,
    c_int,
    sys::ncclUniqueId,
    c_int,
    *mut sys::ncclConfig_t,
) -> c_uint;
type GetAsyncError = unsafe extern "C" fn(Raw, *mut c_uint) -> c_uint;
type GetLastError = unsafe extern "C" fn(Raw) -> *const c_char;
type Abort = unsafe extern "C" fn(Raw) -> c_uint;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    sys::ncclDataType_t,
    sys::ncclRedOp_t,
    Raw,
    sys::cudaStream_t,
) -> c_uint;
type AllGather = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    sys::ncclDataType_t,
    Raw,
    sys::cudaStream_t,
) -> c_uint;

/// NCCL, loaded.
#[derive(Debug)]
pub(crate) struct Library {
    version: NcclVersion,
    get_unique_id: GetUniqueId,
    init_rank_config: InitRankConfig,
    get_async_error: GetAsyncError,
    get_last_error: GetLastError,
    abort: Abort,
    all_reduce: AllReduce,
    all_gather: AllGather,
    /// Keeps the functions; never unloaded, since threads of NCCL outlive what they were started for.
    _library: ManuallyDrop<libloading::Library>,
}

impl Library {
    /// Loads the library of this path, or of this name where the system looks for it.
    ///
    /// # Errors
    /// When it cannot be loaded, is no NCCL, or a release that does not work.
    pub(crate) fn open(path: &Path) -> Result<Self, NcclError> {
        // SAFETY: NCCL may be loaded at any time, from any thread.
        let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
            // What the system says stands behind the library's own words.
            let error = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            NcclError::Load { path: PathBuf::from(path), error }
        })?;
        // SAFETY: the functions have these types, by NCCL's header; results are C enums.
        let opened = unsafe {
            let get_version: GetVersion = function(&library, path, "ncclGetVersion")?;
            let mut version = 0;
            if get_version(&raw mut version) != SUCCESS {
                return Err(NcclError::NoVersion { path: PathBuf::from(path) });
            }
            Self {
                version: NcclVersion(u32::try_from(version).unwrap_or(0)),
                get_unique_id: function(&library, path, "ncclGetUniqueId")?,
                init_rank_config: function(&library, path, "ncclCommInitRankConfig")?,
                get_async_error: function(&library, path, "ncclCommGetAsyncError")?,
                get_last_error: function(&library, path, "ncclGetLastError")?,
                abort: function(&library, path, "ncclCommAbort")?,
                all_reduce: function(&library, path, "ncclAllReduce")?,
                all_gather: function(&library, path, "ncclAllGather")?,
                _library: ManuallyDrop::new(library),
            }
        };
        opened.version.check()?;
        Ok(opened)
    }

    pub(crate) fn version(&self) -> NcclVersion {
        self.version
    }

    /// Another way for ranks to find each other; whoever asks for it is where they meet, and has to be
    /// one of them.
    pub(super) fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = sys::ncclUniqueId { internal: [0; size_of::<UniqueId>()] };
        // SAFETY: the id is written to, and nothing else.
        let result = unsafe { (self.get_unique_id)(&raw mut id) };
        self.checked("ncclGetUniqueId", result)?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    /// Begins to make a communicator, which goes on in the background; `to` has it at once.
    ///
    /// # Safety
    /// `to` stays valid, and the device of the calling thread is the one to use.
    pub(super) unsafe fn init(
        &self,
        to: *mut Raw,
        id: UniqueId,
        rank: usize,
        world: usize,
    ) -> Result<(), NcclError> {
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as c_char) };
        let (ranks, rank) = (world as c_int, rank as c_int);
        // SAFETY: as the caller promises; a library reads no more of the configuration than its size,
        // and no newer fields than it knows.
        let result = unsafe {
            let mut config = self.configuration();
            (self.init_rank_config)(to, ranks, id, rank, &raw mut config)
        };
        self.checked("ncclCommInitRankConfig", result)
    }

    /// One that blocks in no call.
    fn configuration(&self) -> sys::ncclConfig_t {
        sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: MAGIC,
            // The newest that cudarc's type has the fields of.
            version: self.version.0.min(2_30_00),
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
            trafficClass: UNDEFINED,
            commName: std::ptr::null(),
            collnetEnable: UNDEFINED,
            CTAPolicy: UNDEFINED,
            shrinkShare: UNDEFINED,
            nvlsCTAs: UNDEFINED,
            nChannelsPerNetPeer: UNDEFINED,
            nvlinkCentricSched: UNDEFINED,
            graphUsageMode: UNDEFINED,
            numRmaCtx: UNDEFINED,
            maxP2pPeers: UNDEFINED,
        }
    }

    /// Whether what was begun is done.
    ///
    /// # Errors
    /// What went wrong in the background.
    ///
    /// # Safety
    /// The communicator has not been aborted.
    pub(super) unsafe fn is_settled(&self, comm: Raw) -> Result<bool, NcclError> {
        let mut state = SUCCESS;
        // SAFETY: as the caller promises.
        let asked = unsafe { (self.get_async_error)(comm, &raw mut state) };
        self.checked("ncclCommGetAsyncError", asked)?;
        self.checked("the background", state)?;
        Ok(state != IN_PROGRESS)
    }

    /// Queues an all-reduce in place.
    ///
    /// # Safety
    /// The communicator has not been aborted; so many numbers are at the address on its device, and
    /// nothing else uses them until the queue is done.
    pub(super) unsafe fn all_reduce(
        &self,
        comm: Raw,
        numbers: Numbers,
        (address, count): (u64, usize),
        queue: u64,
    ) -> Result<(), NcclError> {
        let (kind, operation) = numbers.types();
        let at = address as *mut c_void;
        // SAFETY: as the caller promises.
        let result = unsafe {
            (self.all_reduce)(at, at, count, kind, operation, comm, queue as sys::cudaStream_t)
        };
        self.checked("ncclAllReduce", result)
    }

    /// Queues that all ranks' words be put one after the other, in rank order.
    ///
    /// # Safety
    /// As for [`Library::all_reduce`], of both places.
    pub(super) unsafe fn all_gather(
        &self,
        comm: Raw,
        (from, count): (u64, usize),
        to: u64,
        queue: u64,
    ) -> Result<(), NcclError> {
        let kind = sys::ncclDataType_t::ncclUint32;
        let (from, to) = (from as *const c_void, to as *mut c_void);
        // SAFETY: as the caller promises.
        let result =
            unsafe { (self.all_gather)(from, to, count, kind, comm, queue as sys::cudaStream_t) };
        self.checked("ncclAllGather", result)
    }

    /// Ends a communicator, wherever it is.
    ///
    /// # Safety
    /// It has not been aborted, and nobody uses it from now on.
    pub(super) unsafe fn abort(&self, comm: Raw) -> Result<(), NcclError> {
        // SAFETY: as the caller promises.
        let result = unsafe { (self.abort)(comm) };
        self.checked("ncclCommAbort", result)
    }

    fn checked(&self, call: &'static str, result: c_uint) -> Result<(), NcclError> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: NCCL asks for no communicator here, and one that has just been aborted must not be shown; the
        // text is valid until the next call.
        let said = unsafe {
            let text = (self.get_last_error)(std::ptr::null_mut());
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().trim().to_owned())
        };
        let version = self.version;
        let said = said.filter(|said| !said.is_empty()).map(|said| format!(": {said}"));
        let detail = said.unwrap_or_default();
        Err(NcclError::Call { version, call, result: name(result), detail })
    }
}

/// A function of a library.
///
/// # Safety
/// It has this type.
unsafe fn function<F: Copy>(
    library: &libloading::Library,
    path: &Path,
    name: &'static str,
) -> Result<F, NcclError> {
    // SAFETY: as the caller promises.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|found| *found).map_err(|_| NcclError::NoFunction { path: path.to_owned(), name })
}

/// NCCL's name of a result.
fn name(result: c_uint) -> String {
    const NAMES: [&str; 9] = [
        "ncclSuccess",
        "ncclUnhandledCudaError",
        "ncclSystemError",
        "ncclInternalError",
        "ncclInvalidArgument",
        "ncclInvalidUsage",
        "ncclRemoteError",
        "ncclInProgress",
        "ncclTimeout",
    ];
    let name = usize::try_from(result).ok().and_then(|result| NAMES.get(result));
    name.map_or_else(|| format!("result {result}"), |name| (*name).to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn releases_that_do_not_work_are_refused_by_their_number() {
        assert_eq!(NcclVersion(23_203).to_string(), "2.32.3");
        for good in [22_602, 22_802, 22_809, 23_203] {
            assert!(NcclVersion(good).check().is_ok(), "{good}");
        }
        let told = |code| NcclVersion(code).check().unwrap_err().to_string();
        assert!(told(22_501).contains("2.25.1"), "{}", told(22_501));
        assert!(told(22_501).contains("2.26.2"), "{}", told(22_501));
        assert!(told(22_805).contains("2.28.3 to 2.28.8"), "{}", told(22_805));
    }

    #[test]
    fn what_is_not_there_or_no_nccl_is_named() {
        let error = Library::open(Path::new("/nowhere/libnccl.so.2")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/libnccl.so.2"), "{error}");
        let error = Library::open(Path::new("libc.so.6")).unwrap_err();
        assert!(error.to_string().contains("ncclGetVersion"), "{error}");
    }

    /// The real library tells its version and makes ids without a GPU, and names what is missing for
    /// more: `LOOPTRAIN_TEST_NCCL=.../libnccl.so.2 cargo test ... -- --ignored the_real_library`. Not in one
    /// process with tests of its stand-in, which has its name.
    #[test]
    #[ignore = "wants NCCL itself, of 300 MB, and a process of its own"]
    fn the_real_library_is_taken_for_what_it_is() {
        let path = std::env::var_os("LOOPTRAIN_TEST_NCCL").expect("the library's path");
        let library = Library::open(Path::new(&path)).unwrap();
        let [one, other] = [(); 2].map(|()| library.unique_id().unwrap());
        assert_ne!(one, other);
        let mut comm: Raw = std::ptr::null_mut();
        // SAFETY: the pointer outlives the call, which fails where there is no device.
        let begun = unsafe { library.init(&raw mut comm, one, 0, 1) };
        if let Err(error) = begun {
            assert!(error.to_string().contains("ncclCommInitRankConfig"), "{error}");
        }
    }
}
