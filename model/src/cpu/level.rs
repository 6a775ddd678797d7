//! The instruction sets that the kernels are compiled for, and which of them this machine has.

use std::sync::OnceLock;

/// An instruction set.
///
/// Sums have the same shape whatever the width of a register, so levels with fused multiply-add (all
/// but [`KernelLevel::Portable`]) give the same products bit for bit. A run pins its level all the
/// same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelLevel {
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// NEON, which every 64-bit ARM processor has.
    Neon,
    /// Whatever the compilation target guarantees.
    Portable,
}

impl KernelLevel {
    /// The best level of this machine.
    #[must_use]
    pub fn detect() -> Self {
        static LEVEL: OnceLock<KernelLevel> = OnceLock::new();
        *LEVEL.get_or_init(|| Self::available()[0])
    }

    /// The levels of this machine, the best one first.
    #[must_use]
    pub(super) fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                levels.push(Self::Avx512);
            }
            if avx2 {
                levels.push(Self::Avx2);
            }
        }
        if cfg!(target_arch = "aarch64") {
            levels.push(Self::Neon);
        } else {
            levels.push(Self::Portable);
        }
        levels
    }

    /// The level's name in logs, errors and the run record.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Portable => "portable",
        }
    }
}
