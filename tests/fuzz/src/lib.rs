//! What the targets share: finding the parser by its name, and its samples to begin with.

use looptrain_proto::fuzzing::Target;

pub use libfuzzer_sys;

/// The parser of this name.
///
/// With `LOOPTRAIN_FUZZ_SAMPLES` in the environment its samples are written into that folder first.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn find(name: &str) -> Target {
    let mut all = looptrain_proto::fuzzing::TARGETS.to_vec();
    all.extend(looptrain_storage::fuzzing::targets());
    all.extend(looptrain_coordinator::fuzzing::TARGETS);
    #[cfg(feature = "ops")]
    all.extend(looptrain::fuzzing::TARGETS);
    let found = all.into_iter().find(|target| target.name == name);
    found.unwrap_or_else(|| panic!("there is no target `{name}`"))
}

/// Writes samples where libFuzzer is told to look.
pub fn write_samples(target: &Target) {
    let Some(folder) = std::env::var_os("LOOPTRAIN_FUZZ_SAMPLES") else { return };
    let folder = std::path::Path::new(&folder);
    std::fs::create_dir_all(folder).expect("the folder of samples can be made");
    for (index, sample) in (target.samples)().iter().enumerate() {
        let path = folder.join(format!("sample-{index}"));
        std::fs::write(path, sample).expect("the folder of samples is writable");
    }
}

/// One target of libFuzzer.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        static TARGET: std::sync::OnceLock<looptrain_proto::fuzzing::Target> =
            std::sync::OnceLock::new();

        $crate::libfuzzer_sys::fuzz_target!(
            init: {
                let target = TARGET.get_or_init(|| $crate::find($name));
                $crate::write_samples(target);
            },
            |data: &[u8]| {
                (TARGET.get().expect("the target was found at the start").run)(data);
            }
        );
    };
}
