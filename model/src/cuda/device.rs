//! A CUDA device: its kernels, products by cuBLASLt, memory copied beside the work.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::{result, sys};
use rayon::prelude::*;

use super::driver::{
    Address, Argument, DeviceError, Driver, Launch, MARKS, Mark, Product, ProductKind,
};
use super::kernels::{NAMES, Sizes, Target};
use super::{compiler, libraries};
use crate::Gpu;

/// What products may use beside their matrices, in bytes. It decides how they are summed, so it is
/// part of what fixes the bits.
const WORKSPACE: usize = 64 << 20;

/// Bytes on their way to the host at a time; there are two such buffers.
const STAGE: usize = 32 << 20;

/// The least compute capability: bf16 matrices and asynchronous copies.
const LEAST: (i32, i32) = (8, 0);

/// How a product is done: fixed once for its shape.
struct Plan {
    description: lt_sys::cublasLtMatmulDesc_t,
    layouts: [lt_sys::cublasLtMatrixLayout_t; 3],
    algorithm: lt_sys::cublasLtMatmulAlgo_t,
}

/// Memory of the host that the device copies to. What runs under its lock must not copy from the
/// device itself, nor must anything that a thread of the pool may take up meanwhile: no `on_slot` does.
struct Stage {
    memory: [*mut u8; 2],
    /// When each has been filled.
    filled: [sys::CUevent; 2],
}

/// One device, and what is compiled for it.
pub(super) struct Device {
    name: String,
    /// Names what decides the bits beside the kernels' source.
    arithmetic: String,
    /// Bytes that were free when nothing was allocated yet.
    memory: u64,
    context: sys::CUcontext,
    queue: sys::CUstream,
    /// Beside the queue: copies to the host.
    copies: sys::CUstream,
    /// And what collectives do.
    lane: sys::CUstream,
    /// With the bytes of shared memory of their blocks.
    functions: HashMap<&'static str, (sys::CUfunction, u32)>,
    products: lt_sys::cublasLtHandle_t,
    workspace: Address,
    /// The least alignment of rows, in bytes.
    alignment: u32,
    plans: Mutex<HashMap<Product, Plan>>,
    marks: Mutex<(usize, Vec<sys::CUevent>)>,
    stage: Mutex<Stage>,
    /// Bytes of each allocation, and the most that there were of all.
    allocated: Mutex<(HashMap<u64, u64>, u64)>,
    /// Whether each kernel and product is waited for, to take its time.
    measuring: AtomicBool,
    times: Mutex<BTreeMap<&'static str, Duration>>,
}

// SAFETY: handles of the driver and of cuBLASLt may be used from any thread, once the thread has the
// context, which every method sees to; what is not safe to share is behind a mutex.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What went wrong in a call of the driver.
fn told(device: &str, what: &str, error: result::DriverError) -> DeviceError {
    let words = error.error_string().ok().and_then(|text| text.to_str().ok()).unwrap_or("");
    DeviceError(format!("{device}: {what}: {words} ({:?})", error.0))
}

/// The UUID of a GPU, as other tools of its maker write it; `None` when the worker computes elsewhere, or
/// there is no driver that tells.
#[must_use]
pub fn gpu_uuid(device: crate::Device) -> Option<String> {
    let crate::Device::Cuda(gpu) = device else { return None };
    libraries::load().ok()?;
    result::init().ok()?;
    match gpu {
        Gpu::Number(number) => uuid_of(i32::try_from(number).ok()?).map(|uuid| uuid.to_string()),
        Gpu::Uuid(_) => Some(gpu.to_string()),
    }
}

/// The UUID of the device of that number.
fn uuid_of(number: i32) -> Option<Gpu> {
    let device = result::device::get(number).ok()?;
    let uuid = result::device::get_uuid(device).ok()?;
    Some(Gpu::Uuid(uuid.bytes.map(|byte| byte as u8)))
}

/// The number of a GPU among those that the driver, which has been started, shows this process, and how many
/// there are.
fn number_of(gpu: Gpu) -> Result<(i32, usize), DeviceError> {
    let label = format!("cuda:{gpu}");
    let counted = result::device::get_count();
    let count = counted.map_err(|error| told(&label, "cannot count devices", error))?.max(0);
    let found = match gpu {
        Gpu::Number(number) => i32::try_from(number).ok().filter(|number| *number < count),
        Gpu::Uuid(_) => (0..count).find(|number| uuid_of(*number) == Some(gpu)),
    };
    let shown = count as usize;
    found.map(|number| (number, shown)).ok_or_else(|| missing(&label, shown))
}

/// What a GPU is, before anything is compiled for it.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuFacts {
    /// As its maker calls it.
    pub name: String,
    /// As [`gpu_uuid`].
    pub uuid: Option<String>,
    /// The newest version of CUDA that its driver knows, such as 13.0.
    pub driver: String,
    /// NVRTC's version, such as 13.0.
    pub compiler: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Whether that is enough.
    pub is_new_enough: bool,
    /// Bytes of its memory.
    pub memory: u64,
    /// How many GPUs the driver shows this process.
    pub count: usize,
}

/// Asks the driver about a GPU. It makes no context, so it takes no memory there.
///
/// # Errors
/// When there is no driver, no library that is needed, or no such GPU.
pub fn gpu_facts(gpu: Gpu) -> Result<GpuFacts, DeviceError> {
    libraries::load()?;
    let fail = |what: &'static str| move |error| told(&format!("cuda:{gpu}"), what, error);
    result::init().map_err(fail("cannot start the driver"))?;
    let (number, count) = number_of(gpu)?;
    let device = result::device::get(number).map_err(fail("cannot open the device"))?;
    let capability = capability(device).map_err(fail("cannot read its compute capability"))?;
    let mut version = 0;
    // SAFETY: the number is written to, and nothing else; the device is one that the driver named.
    let memory = unsafe {
        sys::cuDriverGetVersion(&mut version)
            .result()
            .map_err(fail("does not tell its version"))?;
        result::device::total_mem(device).map_err(fail("does not tell its memory"))?
    };
    Ok(GpuFacts {
        name: result::device::get_name(device).map_err(fail("cannot read its name"))?,
        uuid: uuid_of(number).map(|uuid| uuid.to_string()),
        driver: format!("{}.{}", version / 1000, version % 1000 / 10),
        compiler: compiler::version()?,
        capability,
        is_new_enough: capability >= LEAST,
        memory: memory as u64,
        count,
    })
}

fn missing(label: &str, count: usize) -> DeviceError {
    DeviceError(format!(
        "{label} does not exist: the driver shows {count} devices (CUDA_VISIBLE_DEVICES narrows that)"
    ))
}

/// Compute capability of a device that the driver named.
fn capability(device: sys::CUdevice) -> Result<(i32, i32), result::DriverError> {
    use sys::CUdevice_attribute as Attribute;
    // SAFETY: the device is one that the driver named.
    let read = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    Ok((
        read(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        read(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

impl Device {
    /// A device, with kernels compiled for a model of these sizes.
    ///
    /// # Errors
    /// When there is no driver, no such device, no library that is needed, or a device that is too old.
    pub(super) fn new(gpu: Gpu, sizes: &Sizes) -> Result<Self, DeviceError> {
        libraries::load()?;
        let label = format!("cuda:{gpu}");
        let fail = |what: &'static str| move |error| told(&format!("cuda:{gpu}"), what, error);
        result::init().map_err(fail("cannot start the driver"))?;
        let (number, _) = number_of(gpu)?;
        let device = result::device::get(number).map_err(fail("cannot open the device"))?;
        let model_name = result::device::get_name(device).map_err(fail("cannot read its name"))?;
        let name = format!("{label} ({model_name})");
        use sys::CUdevice_attribute as Attribute;
        let (major, minor) =
            capability(device).map_err(fail("cannot read its compute capability"))?;
        if (major, minor) < LEAST {
            return Err(DeviceError(format!(
                "{name} has compute capability {major}.{minor}; bf16 needs 8.0 or more"
            )));
        }
        let room = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        // SAFETY: the device is one that the driver named.
        let room = unsafe { result::device::get_attribute(device, room) };
        let room = room.map_err(fail("cannot read the size of its shared memory"))?;
        let architecture = major * 10 + minor;
        let target = compiler::target(*sizes, architecture);
        let needed = NAMES.map(|kernel| target.shared(kernel)).into_iter().max().unwrap_or(0);
        if i64::from(room) < needed as i64 {
            return Err(DeviceError(format!(
                "{name} gives a block {} KiB of shared memory; attention with heads of {} takes {} KiB",
                room >> 10,
                sizes.head_dim,
                needed >> 10
            )));
        }
        // SAFETY: as above; the context is current on this thread from here on.
        let context = unsafe {
            let context = result::primary_ctx::retain(device).map_err(fail("has no context"))?;
            result::ctx::set_current(context).map_err(fail("has no context"))?;
            context
        };
        let (free, _) = result::mem_get_info().map_err(fail("does not tell its memory"))?;
        let image = compiler::kernels(&target, architecture)?;
        // SAFETY: the image is one that NVRTC has made, and stays loaded.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(fail("cannot load the kernels"))?;
        let functions = functions(&name, module, &target)?;
        use result::stream::{StreamKind, create_with_priority, get_priority_range};
        let (least, greatest) =
            get_priority_range().map_err(fail("does not tell the priorities of its streams"))?;
        let stream = |priority| {
            create_with_priority(StreamKind::NonBlocking, priority)
                .map_err(fail("cannot make a stream"))
        };
        let event = || {
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(fail("cannot make an event"))
        };
        let pinned = || {
            // SAFETY: the memory is written to before it is read.
            unsafe { result::malloc_host(STAGE, 0) }
                .map(|memory| memory.cast::<u8>())
                .map_err(fail("cannot lock memory of the host"))
        };
        let products = lt::create_handle()
            .map_err(|error| DeviceError(format!("{name}: cuBLASLt does not start: {error}")))?;
        let row = (sizes.hidden * size_of::<u16>()) as u32;
        // cuBLAS chooses how it sums by the very device.
        let (compiler, kind) = (compiler::version()?, model_name.replace(' ', "-"));
        // SAFETY: takes nothing and changes nothing.
        let library = unsafe { lt_sys::cublasLtGetVersion() };
        Ok(Self {
            arithmetic: format!("sm{architecture}-{kind}-cublas{library}-nvrtc{compiler}"),
            memory: free.saturating_sub(WORKSPACE) as u64,
            context,
            queue: stream(least)?,
            copies: stream(least)?,
            // Others wait for what is reduced there, and its blocks are few: they go before those of a
            // product that would fill the device first.
            lane: stream(greatest)?,
            functions,
            products,
            // SAFETY: given back when this is dropped; nothing reads it before it is written.
            workspace: unsafe { result::malloc_sync(WORKSPACE) }
                .map(Address)
                .map_err(fail("has no memory for products"))?,
            alignment: 1 << row.trailing_zeros().min(8),
            plans: Mutex::default(),
            marks: Mutex::new((0, (0..MARKS).map(|_| event()).collect::<Result<_, _>>()?)),
            stage: Mutex::new(Stage {
                memory: [pinned()?, pinned()?],
                filled: [event()?, event()?],
            }),
            allocated: Mutex::default(),
            measuring: AtomicBool::new(false),
            times: Mutex::default(),
            name,
        })
    }

    /// Makes the context this thread's, and tells what a failed call was about.
    fn call<R>(
        &self,
        what: &str,
        call: impl FnOnce() -> Result<R, result::DriverError>,
    ) -> Result<R, DeviceError> {
        // SAFETY: the context lives as long as the process.
        unsafe { result::ctx::set_current(self.context) }
            .and_then(|()| call())
            .map_err(|error| told(&self.name, what, error))
    }

    /// Waits for what has just been queued, if times are taken; a fault is then told by its name.
    fn measured(&self, name: &'static str, start: Instant) -> Result<(), DeviceError> {
        if self.measuring.load(Ordering::Relaxed) {
            // SAFETY: the stream lives as long as the device.
            self.call(name, || unsafe { result::stream::synchronize(self.queue) })?;
            let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
            *times.entry(name).or_default() += start.elapsed();
        }
        Ok(())
    }

    fn plan(&self, product: Product) -> Result<Plan, lt::CublasError> {
        use lt_sys::cublasLtMatmulDescAttributes_t as Description;
        use lt_sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let Product { kind, rows, outputs, inputs, single } = product;
        // cuBLAS counts by columns: our rows are its columns, so the sides change places.
        let (transposed, [m, n], a, b) = match kind {
            ProductKind::Forward => ([1, 0], [outputs, rows], [inputs, outputs], [inputs, rows]),
            ProductKind::Input => ([0, 0], [inputs, rows], [inputs, outputs], [outputs, rows]),
            ProductKind::Weight => ([0, 1], [inputs, outputs], [inputs, rows], [outputs, rows]),
        };
        let half = lt_sys::cudaDataType::CUDA_R_16BF;
        let float = lt_sys::cudaDataType::CUDA_R_32F;
        let to = if single || kind == ProductKind::Weight { float } else { half };
        let layout = |of, [rows, columns]: [usize; 2]| {
            lt::create_matrix_layout(of, rows as u64, columns as u64, rows as i64)
        };
        let layouts = [layout(half, a)?, layout(half, b)?, layout(to, [m, n])?];
        let description =
            lt::create_matmul_desc(lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float)?;
        let preference = lt::create_matmul_pref()?;
        let bytes = WORKSPACE;
        // SAFETY: the attributes have the types of the values that are given for them.
        let found = unsafe {
            for (attribute, value) in [
                (Description::CUBLASLT_MATMUL_DESC_TRANSA, transposed[0]),
                (Description::CUBLASLT_MATMUL_DESC_TRANSB, transposed[1]),
            ] {
                let value: i32 = value;
                let at = std::ptr::from_ref(&value).cast::<c_void>();
                lt::set_matmul_desc_attribute(description, attribute, at, size_of::<i32>())?;
            }
            let at = std::ptr::from_ref(&bytes).cast::<c_void>();
            let attribute = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_pref_attribute(preference, attribute, at, size_of::<usize>())?;
            for attribute in [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                let at = std::ptr::from_ref(&self.alignment).cast::<c_void>();
                lt::set_matmul_pref_attribute(preference, attribute, at, size_of::<u32>())?;
            }
            let [a, b, c] = layouts;
            let handle = self.products;
            let found = lt::get_matmul_algo_heuristic(handle, description, a, b, c, c, preference);
            lt::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Plan { description, layouts, algorithm: found.algo })
    }
}

fn functions(
    device: &str,
    module: sys::CUmodule,
    target: &Target,
) -> Result<HashMap<&'static str, (sys::CUfunction, u32)>, DeviceError> {
    use sys::CUfunction_attribute_enum as Attribute;
    let function = |name: &'static str| {
        let shared = target.shared(name) as u32;
        // SAFETY: the module is loaded and stays so.
        let found = unsafe {
            let name = CString::new(name).expect("a name has no zero byte");
            result::module::get_function(module, name).and_then(|function| {
                let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                if shared > 0 {
                    result::function::set_function_attribute(function, attribute, shared as i32)?;
                }
                Ok(function)
            })
        };
        let found = found.map_err(|error| told(device, &format!("no kernel `{name}`"), error))?;
        Ok((name, (found, shared)))
    };
    NAMES.into_iter().map(function).collect()
}

impl Driver for Device {
    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        // SAFETY: nothing reads the memory before it is written, as the engine sees to.
        let allocated = self.call("", || Ok(unsafe { result::malloc_sync(bytes) }))?;
        let address = allocated.map_err(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return told(&self.name, "cannot allocate memory", error);
            }
            let free = result::mem_get_info().map_or(0, |(free, _)| free);
            let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
            DeviceError(format!(
                "{}: no memory for {:.2} GiB more, {:.2} GiB are free; make slots smaller \
                 (stages.N.slot_sequences), set compute.recompute to layer, or end other programs there",
                self.name,
                gib(bytes),
                gib(free)
            ))
        })?;
        let mut allocated = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, peak) = &mut *allocated;
        all.insert(address, bytes as u64);
        *peak = (*peak).max(all.values().sum());
        Ok(Address(address))
    }

    fn free(&self, address: Address) {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner).0.remove(&address.0);
        // SAFETY: the engine gives back what it was given, once.
        let freed = self.call("cannot free memory", || unsafe { result::free_sync(address.0) });
        // A device that cannot do that has failed, which the next call tells.
        drop(freed);
    }

    fn zero(&self, to: Address, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the engine names memory that it has.
        self.call("cannot clear memory", || unsafe {
            result::memset_d8_async(to.0, 0, bytes, self.queue)
        })
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: as in `zero`.
        self.call("cannot copy memory", || unsafe {
            result::memcpy_dtod_async(to.0, from.0, bytes, self.queue)
        })
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: as in `zero`; the bytes are read by the time this returns.
        self.call("cannot copy to the device", || unsafe {
            result::memcpy_htod_async(to.0, bytes, self.queue)?;
            result::stream::synchronize(self.queue)
        })
    }

    fn launch(&self, launch: Launch, arguments: &[Argument]) -> Result<(), DeviceError> {
        let (function, shared) = self.functions[launch.kernel];
        let mut words: Vec<u64> = arguments.iter().map(Argument::word).collect();
        let mut pointers: Vec<*mut c_void> =
            words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let [x, y, z] = launch.grid;
        let start = Instant::now();
        // SAFETY: the arguments are those that the kernel is declared with, which the tests see to on the
        // CPU; they name memory of the engine.
        let launched = self.call(launch.kernel, || unsafe {
            let block = (launch.threads, 1, 1);
            result::launch_kernel(function, (x, y, z), block, shared, self.queue, &mut pointers)
        });
        launched.and_then(|()| self.measured(launch.kernel, start))
    }

    fn product(
        &self,
        product: Product,
        left: Address,
        right: Address,
        out: Address,
    ) -> Result<(), DeviceError> {
        let failed = |error: lt::CublasError| {
            DeviceError(format!("{}: cuBLASLt fails on {product:?}: {error}", self.name))
        };
        self.call("has no context", || Ok(()))?;
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(product) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.plan(product).map_err(failed)?)
            }
        };
        let start = Instant::now();
        let add = if product.kind == ProductKind::Weight { 1f32 } else { 0.0 };
        let [a, b, c] = plan.layouts;
        let pointer = |address: Address| address.0 as *mut c_void;
        // SAFETY: the plan is for these shapes, and the engine names memory that it has.
        unsafe {
            lt::matmul(
                self.products,
                plan.description,
                std::ptr::from_ref(&1f32).cast(),
                std::ptr::from_ref(&add).cast(),
                pointer(right),
                a,
                pointer(left),
                b,
                pointer(out),
                c,
                pointer(out),
                c,
                &plan.algorithm,
                pointer(self.workspace),
                WORKSPACE,
                self.queue.cast(),
            )
        }
        .map_err(failed)?;
        let name = match product.kind {
            ProductKind::Forward => "product",
            ProductKind::Input => "product of inputs' gradients",
            ProductKind::Weight => "product of weights' gradients",
        };
        self.measured(name, start)
    }

    fn measure(&self, on: bool) {
        self.measuring.store(on, Ordering::Relaxed);
    }

    fn arithmetic(&self) -> String {
        self.arithmetic.clone()
    }

    fn memory(&self) -> Option<u64> {
        Some(self.memory)
    }

    fn peak_bytes(&self) -> u64 {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner).1 + WORKSPACE as u64
    }

    fn take_times(&self) -> Vec<(&'static str, Duration)> {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *times).into_iter().collect()
    }

    fn mark(&self) -> Result<Mark, DeviceError> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let (next, events) = &mut *marks;
        let mark = *next;
        *next = (*next + 1) % MARKS;
        // SAFETY: event and stream live as long as the device.
        self.call("cannot mark the queue", || unsafe {
            result::event::record(events[mark], self.queue)
        })?;
        Ok(Mark(mark))
    }

    fn download(&self, after: Mark, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        let event = self.marks.lock().unwrap_or_else(PoisonError::into_inner).1[after.0];
        let stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let fetch = |number: usize, len: usize| {
            let side = number % 2;
            // SAFETY: the staged memory is ours under the lock, is as long, and was read before.
            self.call("cannot copy from the device", || unsafe {
                let memory = std::slice::from_raw_parts_mut(stage.memory[side], len);
                let from = from.0 + (number * STAGE) as u64;
                result::memcpy_dtoh_async(memory, from, self.copies)?;
                result::event::record(stage.filled[side], self.copies)
            })
        };
        // SAFETY: event and stream live as long as the device.
        self.call("cannot wait for the queue", || unsafe {
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.copies, event, flags)
        })?;
        let lens: Vec<usize> = to.chunks(STAGE).map(<[u8]>::len).collect();
        if let Some(first) = lens.first() {
            fetch(0, *first)?;
        }
        for (number, to) in to.chunks_mut(STAGE).enumerate() {
            if let Some(len) = lens.get(number + 1) {
                fetch(number + 1, *len)?;
            }
            let side = number % 2;
            // SAFETY: as above; the copy is waited for before it is read.
            let staged = self.call("fails", || unsafe {
                result::event::synchronize(stage.filled[side])?;
                Ok(std::slice::from_raw_parts(stage.memory[side], to.len()))
            })?;
            let parts = to.par_chunks_mut(1 << 20).zip(staged.par_chunks(1 << 20));
            parts.for_each(|(to, staged)| to.copy_from_slice(staged));
        }
        Ok(())
    }

    fn enter(&self) -> Result<(), DeviceError> {
        self.call("has no context", || Ok(()))
    }

    fn lane(&self) -> u64 {
        self.lane as u64
    }

    fn lane_waits(&self, after: Mark) -> Result<(), DeviceError> {
        let event = self.marks.lock().unwrap_or_else(PoisonError::into_inner).1[after.0];
        // SAFETY: event and stream live as long as the device.
        self.call("cannot wait for the queue", || unsafe {
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.lane, event, flags)
        })
    }

    fn lane_is_idle(&self) -> Result<bool, DeviceError> {
        // SAFETY: the stream lives as long as the device.
        let state = || unsafe { sys::cuStreamQuery(self.lane) };
        self.call("fails", || match state() {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            state => state.result().map(|()| true),
        })
    }

    fn lane_write(&self, to: Address, words: &[u32]) -> Result<(), DeviceError> {
        // As fills of one word each: a copy would have to wait for the lane before it may read them.
        for (place, word) in words.iter().enumerate() {
            let to = to.plus(place * size_of::<u32>());
            // SAFETY: whoever asks has the memory.
            self.call("cannot write to memory", || unsafe {
                sys::cuMemsetD32Async(to.0, *word, 1, self.lane).result()
            })?;
        }
        Ok(())
    }

    fn lane_read(&self, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: whoever asks has the memory; the copy is waited for before the bytes are looked at.
        self.call("cannot copy from the device", || unsafe {
            result::memcpy_dtoh_async(to, from.0, self.lane)?;
            result::stream::synchronize(self.lane)
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: all of these were made in `new`, and nobody uses them any more.
        let _ = self.call("", || unsafe {
            result::stream::synchronize(self.queue)?;
            result::stream::destroy(self.queue)?;
            result::stream::destroy(self.copies)?;
            result::stream::destroy(self.lane)?;
            result::free_sync(self.workspace.0)?;
            let stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            for memory in stage.memory.into_iter().filter(|memory| !memory.is_null()) {
                result::free_host(memory.cast())?;
            }
            Ok(())
        });
    }
}
