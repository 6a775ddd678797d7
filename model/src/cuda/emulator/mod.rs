//! A device that runs the kernels on the CPU: their source, compiled as C++.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use super::driver::{Address, Argument, DeviceError, Driver, Launch, Mark, Product, ProductKind};
use super::kernels::{NAMES, SOURCE, Sizes, Target};

type Run = unsafe extern "C" fn(
    kernel: i32,
    grid: *const u32,
    threads: u32,
    shared: usize,
    arguments: *const *const u64,
);

/// Memory is the process's own, and everything is done at once.
pub(super) struct Emulator {
    /// Keeps the code.
    _library: Option<libloading::Library>,
    /// There is none on a device without kernels.
    kernels: Option<(Target, Run)>,
    /// What a collective has put in the lane and not done yet.
    lane: std::sync::atomic::AtomicU64,
    allocations: Mutex<Vec<(u64, Vec<u128>)>>,
    /// Kernels that have run.
    pub(super) launched: Mutex<std::collections::BTreeSet<&'static str>>,
}

/// One at a time: the emulator's own memory is global.
static TURN: Mutex<()> = Mutex::new(());

/// Names a folder for compiled kernels, which processes of one test then share.
const KEPT: &str = "LOOPTRAIN_EMULATED_KERNELS";

/// The kernels as a library, compiled once for a target.
fn compiled(target: &Target) -> PathBuf {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let own = || FOLDER.get_or_init(|| tempfile::tempdir().expect("a temporary folder"));
    let kept = std::env::var_os(KEPT).map(PathBuf::from);
    let folder = kept.unwrap_or_else(|| own().path().to_owned());
    let Sizes { hidden, inner, vocab, heads, .. } = target.sizes;
    let groups = if target.warp_groups { "-groups" } else { "" };
    let library = folder.join(format!("{hidden}-{inner}-{vocab}-{heads}{groups}.so"));
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if library.exists() {
        return library;
    }
    // Another process may be at the same.
    let [source, part] = ["cpp", "part"]
        .map(|kind| library.with_extension(format!("{}.{kind}", std::process::id())));
    let mut text = String::from(include_str!("emulator.h"));
    text.push_str(SOURCE);
    text.push_str(
        "extern \"C\" void run(int kernel, const u32* grid, u32 threads, size_t shared, void** arguments) {\n",
    );
    text.push_str("    switch (kernel) {\n");
    for (number, name) in NAMES.iter().enumerate() {
        let _ = writeln!(
            text,
            "    case {number}: emulator::launch(emulator::Entry<{name}>::enter, grid, threads, shared, arguments); break;"
        );
    }
    text.push_str("    }\n}\n");
    std::fs::write(&source, text).expect("the folder can be written to");
    let compiler: PathBuf = std::env::var_os("CXX").map_or("c++".into(), PathBuf::from);
    let compiled = Command::new(&compiler)
        .args([
            "-std=c++17",
            "-O1",
            "-U_FORTIFY_SOURCE",
            "-shared",
            "-fPIC",
            "-w",
            "-ffp-contract=off",
        ])
        .args(target.definitions())
        .arg(&source)
        .arg("-o")
        .arg(&part)
        .output()
        .unwrap_or_else(|error| panic!("cannot run the C++ compiler {compiler:?}: {error}"));
    assert!(
        compiled.status.success(),
        "the kernels do not compile as C++:\n{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    std::fs::rename(&part, &library).expect("the folder can be written to");
    std::fs::remove_file(&source).expect("the source is there");
    library
}

impl Emulator {
    /// Without kernels.
    pub(super) fn bare() -> Self {
        Self {
            _library: None,
            kernels: None,
            lane: std::sync::atomic::AtomicU64::new(0),
            allocations: Mutex::default(),
            launched: Mutex::default(),
        }
    }

    /// Compiles the kernels for these sizes, as for a device that has groups of warps.
    pub(super) fn new(sizes: &Sizes) -> Self {
        Self::of(Target::new(*sizes, true))
    }

    /// Compiles the kernels.
    pub(super) fn of(target: Target) -> Self {
        let library = compiled(&target);
        // SAFETY: the library has been made from our own source, and runs nothing when loaded.
        let library = unsafe { libloading::Library::new(&library) }.expect("the library loads");
        // SAFETY: `run` has this type in the source above.
        let run = unsafe { *library.get::<Run>(b"run\0").expect("the library has `run`") };
        Self { _library: Some(library), kernels: Some((target, run)), ..Self::bare() }
    }
}

fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

fn wide(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

/// Memory at an address.
///
/// # Safety
/// So many elements lie there, in an allocation of the emulator, and nobody else uses them meanwhile.
unsafe fn at<'a, T>(address: Address, len: usize) -> &'a mut [T] {
    // SAFETY: as the caller promises; allocations are aligned for every type used here.
    unsafe { std::slice::from_raw_parts_mut(address.0 as *mut T, len) }
}

impl Driver for Emulator {
    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        // NaN wherever nothing is written.
        let memory = vec![u128::MAX; bytes.div_ceil(16) + 16];
        let address = (memory.as_ptr() as u64).next_multiple_of(256);
        self.allocations.lock().expect("no test panics here").push((address, memory));
        Ok(Address(address))
    }

    fn free(&self, address: Address) {
        let mut all = self.allocations.lock().expect("no test panics here");
        let count = all.len();
        all.retain(|(at, _)| *at != address.0);
        assert_eq!(all.len() + 1, count, "memory is given back once");
    }

    fn zero(&self, to: Address, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the engine names memory that it has, from one thread.
        unsafe { at::<u8>(to, bytes) }.fill(0);
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: as in `zero`; the two do not overlap.
        unsafe { at::<u8>(to, bytes).copy_from_slice(at(from, bytes)) };
        Ok(())
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: as in `zero`.
        unsafe { at::<u8>(to, bytes.len()) }.copy_from_slice(bytes);
        Ok(())
    }

    fn launch(&self, launch: Launch, arguments: &[Argument]) -> Result<(), DeviceError> {
        let [x, y, z] = launch.grid;
        assert!(
            x < 1 << 31 && y < 1 << 16 && z < 1 << 16,
            "more blocks than CUDA takes: {launch:?}"
        );
        assert!((1..=1024).contains(&launch.threads) && x * y * z > 0, "{launch:?}");
        let kernel = NAMES.iter().position(|name| *name == launch.kernel).expect("a kernel's name");
        self.launched.lock().expect("no test panics here").insert(launch.kernel);
        let words: Vec<u64> = arguments.iter().map(Argument::word).collect();
        let pointers: Vec<*const u64> = words.iter().map(std::ptr::from_ref).collect();
        let (target, run) = self.kernels.expect("a device with kernels");
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: as on a GPU, the arguments are those that the kernel is declared with, and name memory
        // of the engine.
        unsafe {
            run(
                kernel as i32,
                launch.grid.as_ptr(),
                launch.threads,
                target.shared(launch.kernel),
                pointers.as_ptr(),
            );
        }
        Ok(())
    }

    fn product(
        &self,
        product: Product,
        left: Address,
        right: Address,
        out: Address,
    ) -> Result<(), DeviceError> {
        let Product { kind, rows, outputs, inputs, single } = product;
        let (of_left, of_right, of_out, terms) = match kind {
            ProductKind::Forward => (rows * inputs, outputs * inputs, [rows, outputs], inputs),
            ProductKind::Input => (rows * outputs, outputs * inputs, [rows, inputs], outputs),
            ProductKind::Weight => (rows * outputs, rows * inputs, [outputs, inputs], rows),
        };
        // SAFETY: as in `zero`; the result overlaps neither side.
        let (left, right): (&[u16], &[u16]) = unsafe { (at(left, of_left), at(right, of_right)) };
        let [m, n] = of_out;
        let mut sums = vec![0f32; m * n];
        for i in 0..m {
            for k in 0..terms {
                let a = wide(match kind {
                    ProductKind::Weight => left[k * outputs + i],
                    _ => left[i * terms + k],
                });
                for j in 0..n {
                    let b = match kind {
                        ProductKind::Forward => right[j * inputs + k],
                        _ => right[k * inputs + j],
                    };
                    sums[i * n + j] += a * wide(b);
                }
            }
        }
        // SAFETY: as in `zero`.
        unsafe {
            match (kind, single) {
                (ProductKind::Weight, _) => {
                    let out = at::<f32>(out, m * n);
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                }
                (_, true) => at::<f32>(out, m * n).copy_from_slice(&sums),
                (_, false) => {
                    let out = at::<u16>(out, m * n);
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = bf16(sum));
                }
            }
        }
        Ok(())
    }

    fn measure(&self, _on: bool) {}

    fn take_times(&self) -> Vec<(&'static str, std::time::Duration)> {
        Vec::new()
    }

    fn arithmetic(&self) -> String {
        "emulated".into()
    }

    fn memory(&self) -> Option<u64> {
        None
    }

    fn peak_bytes(&self) -> u64 {
        let all = self.allocations.lock().expect("no test panics here");
        all.iter().map(|(_, memory)| size_of_val(memory.as_slice()) as u64).sum()
    }

    fn mark(&self) -> Result<Mark, DeviceError> {
        Ok(Mark(0))
    }

    fn download(&self, _after: Mark, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: as in `zero`.
        to.copy_from_slice(unsafe { at::<u8>(from, to.len()) });
        Ok(())
    }

    fn enter(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn lane(&self) -> u64 {
        // The stand-in for NCCL counts there what it has to do.
        std::ptr::from_ref(&self.lane) as u64
    }

    fn lane_waits(&self, _after: Mark) -> Result<(), DeviceError> {
        Ok(())
    }

    fn lane_is_idle(&self) -> Result<bool, DeviceError> {
        Ok(self.lane.load(std::sync::atomic::Ordering::Acquire) == 0)
    }

    fn lane_write(&self, to: Address, words: &[u32]) -> Result<(), DeviceError> {
        assert!(self.lane_is_idle()?, "the emulator does at once what waits in a lane");
        self.upload(to, bytemuck::cast_slice(words))
    }

    fn lane_read(&self, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        assert!(self.lane_is_idle()?, "the lane is waited for before it is read");
        self.download(Mark(0), from, to)
    }
}
