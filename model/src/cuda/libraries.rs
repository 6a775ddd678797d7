//! Finding NVIDIA's libraries where they are usually put, none of which are needed to build or to start.

use std::path::PathBuf;

use super::driver::DeviceError;

/// A library, by the names of its files.
struct Wanted {
    what: &'static str,
    names: &'static [&'static str],
    remedy: &'static str,
}

const DRIVER: Wanted = Wanted {
    what: "NVIDIA's driver (libcuda.so.1)",
    names: &["libcuda.so.1", "libcuda.so"],
    remedy: "install the driver, or train on the CPU with --device cpu",
};

const OTHERS: [Wanted; 2] = [
    Wanted {
        what: "NVRTC (libnvrtc.so)",
        names: &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
        remedy: "install the CUDA toolkit, or nvidia-cuda-nvrtc from PyPI, and name the library's folder in LD_LIBRARY_PATH if it is an unusual one",
    },
    Wanted {
        what: "cuBLASLt (libcublasLt.so)",
        names: &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
        remedy: "install the CUDA toolkit, or nvidia-cublas from PyPI, and name the library's folder in LD_LIBRARY_PATH if it is an unusual one",
    },
];

const NCCL: Wanted = Wanted {
    what: "NCCL (libnccl.so.2)",
    names: &["libnccl.so.2"],
    remedy: "install libnccl2, or nvidia-nccl-cu13 from PyPI, and name the library's folder in LD_LIBRARY_PATH if it is an \
             unusual one; without it workers reduce over TCP",
};

/// Loads driver, NVRTC and cuBLASLt, so that whoever asks for them by name later finds them loaded.
///
/// # Errors
/// Names what is missing and what helps.
pub(super) fn load() -> Result<(), DeviceError> {
    find(&DRIVER, &[])?;
    let folders = folders();
    OTHERS.iter().try_for_each(|wanted| find(wanted, &folders))
}

/// What of NVIDIA's is found on this machine, of what no GPU is used without: driver, NVRTC and cuBLASLt. What
/// is found stays loaded.
#[must_use]
pub fn gpu_libraries() -> Vec<(&'static str, Result<(), DeviceError>)> {
    let folders = folders();
    let all = [&DRIVER].into_iter().chain(&OTHERS);
    all.map(|wanted| (wanted.what, find(wanted, &folders))).collect()
}

/// NCCL, by a name or a path that it can be loaded by.
///
/// # Errors
/// Says what helps when it cannot be.
pub fn nccl() -> Result<PathBuf, DeviceError> {
    locate(&NCCL, &folders())
}

fn find(wanted: &Wanted, folders: &[PathBuf]) -> Result<(), DeviceError> {
    locate(wanted, folders).map(drop)
}

fn locate(wanted: &Wanted, folders: &[PathBuf]) -> Result<PathBuf, DeviceError> {
    let by_name = wanted.names.iter().map(PathBuf::from);
    let in_folders = folders
        .iter()
        .flat_map(|folder| wanted.names.iter().map(move |name| folder.join(name)))
        .filter(|path| path.exists());
    for path in by_name.chain(in_folders) {
        // SAFETY: NVIDIA's libraries may be loaded at any time, from any thread.
        if let Ok(library) = unsafe { libloading::Library::new(&path) } {
            // It stays for as long as the process does.
            std::mem::forget(library);
            return Ok(path);
        }
    }
    Err(DeviceError(format!("{} cannot be loaded: {}", wanted.what, wanted.remedy)))
}

/// Where the toolkit and PyPI's packages put libraries.
fn folders() -> Vec<PathBuf> {
    let toolkit = std::env::var_os("CUDA_PATH").or_else(|| std::env::var_os("CUDA_HOME"));
    let toolkits = toolkit.map(PathBuf::from).into_iter().chain(["/usr/local/cuda".into()]);
    let mut found: Vec<_> =
        toolkits.flat_map(|base| ["lib64", "lib"].map(|folder| base.join(folder))).collect();
    for python in [std::env::var_os("VIRTUAL_ENV"), Some("/usr/local".into()), Some("/usr".into())]
    {
        let Some(lib) = python.map(|base| PathBuf::from(base).join("lib")) else { continue };
        let versions = std::fs::read_dir(lib).into_iter().flatten().flatten();
        for version in versions.map(|entry| entry.path()) {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = version.join(packages).join("nvidia");
                found.extend(
                    ["cu13", "cuda_nvrtc", "cublas", "nccl"].map(|p| nvidia.join(p).join("lib")),
                );
            }
        }
    }
    found
}
