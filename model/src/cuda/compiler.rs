//! The kernels' machine code: compiled by NVRTC for the device and the model's sizes, and kept on disk.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};

use super::driver::DeviceError;
use super::kernels::{SOURCE, Sizes, Target};

/// The compute capability, 9.0, of the devices whose groups of warps multiply out of shared memory.
const HOPPER: i32 = 90;

/// What the kernels are compiled for on a device of that compute capability, such as 90 for 9.0.
pub(super) fn target(sizes: Sizes, architecture: i32) -> Target {
    Target::new(sizes, architecture == HOPPER)
}

/// Machine code of the kernels: from the cache, or compiled and put there, so that the next worker on
/// this machine starts some seconds earlier.
pub(super) fn kernels(target: &Target, architecture: i32) -> Result<Vec<u8>, DeviceError> {
    let options = options(target, architecture);
    let mut key = blake3::Hasher::new_derive_key("looptrain kernels v1");
    key.update(format!("{} {}", version()?, options.join(" ")).as_bytes());
    key.update(SOURCE.as_bytes());
    let file = cache().map(|folder| folder.join(format!("{}.cubin", key.finalize().to_hex())));
    if let Some(image) = file.as_ref().and_then(|file| cached(file)) {
        return Ok(image);
    }
    let (image, _) = compile(&options)?;
    // Without a cache the next start takes longer, that is all.
    let _ = file.map(|file| keep(&file, &image));
    Ok(image)
}

/// The compiler's version, such as 13.0.
pub(super) fn version() -> Result<String, DeviceError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are written to, and nothing else.
    unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) }
        .result()
        .map_err(|error| DeviceError(format!("NVRTC fails: {error:?}")))?;
    Ok(format!("{major}.{minor}"))
}

/// Where compiled kernels are kept.
fn cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
    Some(base?.join("looptrain").join("kernels"))
}

/// What was kept, if it is whole: the hash of the image comes before it.
fn cached(file: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(file).ok()?;
    let image = (bytes.len() > blake3::OUT_LEN).then(|| bytes.split_off(blake3::OUT_LEN))?;
    (blake3::hash(&image).as_bytes() == bytes.as_slice()).then_some(image)
}

fn keep(file: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Under a name of its own first: two workers may come here at a time.
    let part = file.with_extension(format!("{}.part", std::process::id()));
    let hash = blake3::hash(image);
    std::fs::write(&part, [hash.as_bytes(), image].concat())?;
    std::fs::rename(&part, file)
}

/// The compiler's options.
fn options(target: &Target, architecture: i32) -> Vec<String> {
    let mut options = target.definitions();
    // Hopper's own instructions have to be asked for.
    let own = if architecture == HOPPER { "a" } else { "" };
    options.push(format!("--gpu-architecture=sm_{architecture}{own}"));
    options.extend(["--std=c++17", "-default-device"].map(String::from));
    options
}

/// Has NVRTC compile the kernels; gives the image and what the compiler says.
fn compile(options: &[String]) -> Result<(Vec<u8>, String), DeviceError> {
    let source = CString::new(SOURCE).expect("the source has no zero byte");
    let failed = |error: nvrtc::NvrtcError| DeviceError(format!("NVRTC fails: {error:?}"));
    let program = nvrtc::create_program(&source, Some(c"looptrain.cu")).map_err(failed)?;
    // SAFETY: the program is the one made above, and the buffer has the size that NVRTC names.
    unsafe {
        let compiled = nvrtc::compile_program(program, options);
        let log = nvrtc::get_program_log(program).unwrap_or_default();
        let log: Vec<u8> = log.into_iter().map(|byte| byte as u8).collect();
        let log = String::from_utf8_lossy(&log).into_owned();
        if let Err(error) = compiled {
            let options = options.join(" ");
            return Err(DeviceError(format!(
                "NVRTC does not compile the kernels ({options}): {error:?}\n{log}"
            )));
        }
        let mut len = 0;
        nvrtc_sys::nvrtcGetCUBINSize(program, &mut len).result().map_err(failed)?;
        let mut image = vec![0u8; len];
        nvrtc_sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result().map_err(failed)?;
        nvrtc::destroy_program(program).map_err(failed)?;
        Ok((image, log))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVRTC needs neither a driver nor a GPU, and sees what the kernels' emulator does not: Hopper's own
    /// instructions, and whether they can run beside each other. `tests/run` installs it and names it here.
    #[test]
    fn the_kernels_compile_for_every_kind_of_device() {
        let Some(library) = std::env::var_os("LOOPTRAIN_TEST_NVRTC") else {
            assert!(std::env::var_os("CI").is_none(), "CI has NVRTC");
            println!("left out: LOOPTRAIN_TEST_NVRTC names no libnvrtc.so");
            return;
        };
        // SAFETY: NVRTC may be loaded at any time; it stays, for it is asked for by its name from here on.
        std::mem::forget(unsafe { libloading::Library::new(library) }.expect("NVRTC loads"));
        for (hidden, heads, architecture) in
            [(2048, 16, 80), (2048, 16, 90), (2048, 16, 100), (768, 12, 90), (64, 4, 80)]
        {
            let head_dim = hidden / heads;
            let sizes = Sizes { hidden, inner: 2 * hidden, vocab: 512, heads, head_dim };
            let target = target(sizes, architecture);
            assert_eq!(target.warp_groups, architecture == HOPPER);
            let mut options = options(&target, architecture);
            options.push("--ptxas-options=-v".into());
            let (image, log) = compile(&options).unwrap_or_else(|error| panic!("{error}"));
            assert!(image.len() > 50_000, "{} bytes for {architecture}", image.len());
            // The compiler tells registers, and when products wait for each other for want of them.
            assert!(log.contains("registers"), "{log}");
            assert!(!log.contains("Potential Performance Loss"), "for {architecture}:\n{log}");
            if target.warp_groups {
                let spilled =
                    |line: &&str| line.contains("spill") && !line.contains(" 0 bytes spill stores");
                assert_eq!(log.lines().find(spilled), None, "registers do not suffice:\n{log}");
            }
        }
    }

    #[test]
    fn kept_kernels_are_read_when_they_are_whole() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("deeper").join("kernels.cubin");
        assert_eq!(cached(&file), None);
        keep(&file, b"an image").expect("the folder can be written to");
        assert_eq!(cached(&file).as_deref(), Some(&b"an image"[..]));
        let mut bytes = std::fs::read(&file).expect("the file is there");
        bytes.pop();
        std::fs::write(&file, &bytes).expect("the folder can be written to");
        assert_eq!(cached(&file), None, "cut short");
        std::fs::write(&file, &bytes[..9]).expect("the folder can be written to");
        assert_eq!(cached(&file), None);
    }
}
