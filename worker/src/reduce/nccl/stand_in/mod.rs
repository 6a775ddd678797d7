//! A stand-in for NCCL, compiled by the system's C++ compiler: `nccl.cpp`. It takes the memory of the
//! emulated device for that of a GPU, notes what is called, and fails where it is told to.

#[cfg(test)]
mod control;

use std::path::{Path, PathBuf};
use std::process::Command;

#[cfg(test)]
pub(crate) use control::StandIn;

/// Compiles the stand-in into a folder, under the name that NCCL has.
///
/// # Panics
/// Without a C++ compiler.
#[must_use]
pub fn compile(folder: &Path) -> PathBuf {
    let (source, library) = (folder.join("nccl.cpp"), folder.join("libnccl.so.2"));
    std::fs::write(&source, include_str!("nccl.cpp")).expect("the folder can be written to");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let compiled = Command::new(&compiler)
        .args([
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-pthread",
            "-Wl,-soname,libnccl.so.2",
            "-o",
        ])
        .arg(&library)
        .arg(&source)
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot run the C++ compiler {}: {error}", compiler.display())
        });
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "the stand-in for NCCL does not compile:\n{said}");
    library
}
