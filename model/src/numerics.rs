//! What decides the bits of the arithmetic, as a short text that machines can compare.
//!
//! The kernel level says which instructions are used; a probe computation catches everything else
//! (the libraries' blocking, the C library's logarithm): two machines with the same text compute
//! the same bits. A run pins the text of its first worker.

use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use looptrain_proto::spec::{self, Objective};
use looptrain_proto::{Digest, Step};

use crate::optimizer::StepSize;
use crate::{
    Device, DeviceError, Engine, KernelLevel, Layout, Recompute, SlotBatch, StageSettings,
    TrainState,
};

/// Kernel level and probe of this machine, such as `avx512-1f2e3d4c5b6a7980`; of a GPU its architecture,
/// the version of the library that multiplies matrices, and a probe.
///
/// # Errors
/// When the device cannot be used.
pub fn numerics(device: Device) -> Result<String, DeviceError> {
    let (name, probe) = match device {
        Device::Cpu => (KernelLevel::detect().name().to_owned(), probe()),
        _ => probe_of_device(device)?,
    };
    let hex: String = probe.0[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{name}-{hex}"))
}

/// The same two of a device, with a small model of sizes that it takes.
fn probe_of_device(device: Device) -> Result<(String, Digest), DeviceError> {
    let model = spec::Model {
        hidden_size: 64,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        intermediate_size: 160,
        vocab_size: 264,
        rms_norm_eps: 1e-6,
        initializer_range: 0.05,
    };
    let engine = device.engine(&model)?.expect("this device is not the CPU");
    engine.put(&TrainState::initial(&model, 1))?;
    engine.clear(Objective::Language)?;
    let (sequences, sequence_length) = (1, 80);
    let tokens = (0..=80).map(|i| (i * 7919 + 13) % 264).collect();
    let settings = StageSettings {
        loops: 2,
        entropy_weight: 0.05,
        rope_base: 1e4,
        objective: Objective::Language,
    };
    let batch = SlotBatch { tokens, sequences, sequence_length, ..SlotBatch::default() };
    engine.queue_slot(&settings, Recompute::None, &batch, &mut |_| {})?.statistics()?;
    let norm = engine.norm(Objective::Language)?;
    let optimizer = spec::Optimizer::default();
    let size = StepSize { settings: &optimizer, step: Step(12_345), learning_rate: 1e-3 };
    engine.update(&size, Objective::Language, norm, 1.0)?;
    let parameters = Layout::new(&model).parameters();
    let mut weights = vec![0f32; parameters];
    engine.read(0..parameters, [&mut weights, &mut [], &mut []])?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&norm.to_le_bytes());
    hasher.update(bytemuck::cast_slice(&weights));
    Ok((engine.arithmetic(), hasher.finalize().into()))
}

/// Digest of the gradient of one slot, and of the weights after a late update with it, of a small
/// model whose products are long enough to be blocked and whose sequences are long enough to be
/// tiled.
fn probe() -> Digest {
    static PROBE: OnceLock<Digest> = OnceLock::new();
    *PROBE.get_or_init(|| {
        let model = spec::Model {
            hidden_size: 96,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            intermediate_size: 1100,
            vocab_size: 700,
            rms_norm_eps: 1e-6,
            initializer_range: 0.05,
        };
        let mut state = TrainState::initial(&model, 1);
        let mut engine = Engine::new(&model, 1);
        engine.load(&state.weights);
        let (sequences, sequence_length) = (1, 100);
        let tokens = (0..=100).map(|i| (i * 7919 + 13) % 700).collect();
        let settings = StageSettings {
            loops: 2,
            entropy_weight: 0.05,
            rope_base: 1e4,
            objective: Objective::Language,
        };
        let gradient = OnceLock::new();
        engine.gradients(
            &settings,
            &[SlotBatch { tokens, sequences, sequence_length, ..SlotBatch::default() }],
            &AtomicBool::new(false),
            &|_, slot| {
                let _ = gradient.set(slot.gradient);
            },
        );
        let gradient = gradient.into_inner().expect("the engine computes every slot");
        state.step = Step(12_345);
        let (optimizer, objective) = (spec::Optimizer::default(), Objective::Language);
        engine.update(&mut state, &gradient, &optimizer, objective, 1e-3);
        let mut hasher = blake3::Hasher::new();
        hasher.update(bytemuck::cast_slice(&gradient));
        hasher.update(bytemuck::cast_slice(&state.weights));
        hasher.finalize().into()
    })
}
