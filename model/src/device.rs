//! Where a worker computes, and how people write that.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use looptrain_proto::spec;

use crate::cuda::{CudaEngine, DeviceError};

/// One of the NVIDIA GPUs that the driver shows this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gpu {
    /// By its number, as the driver counts them.
    Number(usize),
    /// By its UUID, which it has in any machine and order.
    Uuid([u8; 16]),
}

/// Bytes of a UUID between its hyphens.
const UUID_PARTS: [Range<usize>; 5] = [0..4, 4..6, 6..8, 8..10, 10..16];

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Uuid(bytes) => {
                f.write_str("GPU")?;
                for part in UUID_PARTS {
                    f.write_str("-")?;
                    bytes[part].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
                }
                Ok(())
            }
        }
    }
}

impl FromStr for Gpu {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let Some(uuid) = text.strip_prefix("GPU-") else {
            return text.parse().map(Self::Number).map_err(drop);
        };
        let parts: Vec<&str> = uuid.split('-').collect();
        let lengths = UUID_PARTS.map(|part| 2 * part.len());
        if !uuid.is_ascii() || !parts.iter().map(|part| part.len()).eq(lengths) {
            return Err(());
        }
        let digits = parts.concat();
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(());
        }
        let mut bytes = [0; 16];
        for (place, byte) in bytes.iter_mut().enumerate() {
            let digits = &digits[2 * place..2 * place + 2];
            *byte = u8::from_str_radix(digits, 16).map_err(drop)?;
        }
        Ok(Self::Uuid(bytes))
    }
}

/// Where a worker computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The threads of this machine.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda(Gpu),
    /// The GPU's kernels on the CPU, compiled by the system's C++ compiler: slow, for tests.
    #[cfg(any(test, feature = "emulator"))]
    Emulated,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(gpu) => write!(f, "cuda:{gpu}"),
            #[cfg(any(test, feature = "emulator"))]
            Self::Emulated => f.write_str("emulated"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let gpu = text.strip_prefix("cuda:").and_then(|gpu| gpu.parse().ok());
        match (text, gpu) {
            ("cpu", _) => Ok(Self::Cpu),
            #[cfg(any(test, feature = "emulator"))]
            ("emulated", _) => Ok(Self::Emulated),
            (_, Some(gpu)) => Ok(Self::Cuda(gpu)),
            _ => Err("write cpu, or cuda:N for the GPU of that number, or cuda:GPU-... with the UUID that \
                      `nvidia-smi -L` tells"
                .to_owned()),
        }
    }
}

impl Device {
    /// The device so many numbers further; what has no number is one for all.
    #[must_use]
    pub fn after(self, count: usize) -> Self {
        match self {
            Self::Cuda(Gpu::Number(number)) => Self::Cuda(Gpu::Number(number + count)),
            other => other,
        }
    }

    pub(crate) fn engine(self, model: &spec::Model) -> Result<Option<CudaEngine>, DeviceError> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(gpu) => CudaEngine::on_device(gpu, model).map(Some),
            #[cfg(any(test, feature = "emulator"))]
            Self::Emulated => CudaEngine::emulated(model).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_written_as_it_is_read() {
        let number = |number| Device::Cuda(Gpu::Number(number));
        let uuid = "cuda:GPU-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9";
        let by_uuid: Device = uuid.parse().expect("a UUID");
        assert_eq!(by_uuid.to_string(), uuid);
        for device in [Device::Cpu, Device::Emulated, number(0), number(11), by_uuid] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        let moved = [Device::Cpu, number(1), by_uuid].map(|device| device.after(2));
        assert_eq!(moved, [Device::Cpu, number(3), by_uuid]);
        for bad in [
            "cuda:GPU-",
            "cuda:GPU-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8",
            "cuda:GPU-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8fg",
            "cuda:GPU-0a1b2c3d4e5f-6071-8293-a4b5-c6d7e8f9",
            "cuda:GPU-+a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9",
            "cuda:MIG-0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9",
        ] {
            assert!(bad.parse::<Device>().is_err(), "{bad}");
        }
        for bad in ["gpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(bad.parse::<Device>().is_err(), "{bad}");
        }
    }
}
