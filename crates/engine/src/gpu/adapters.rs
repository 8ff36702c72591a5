//! The adapters of this machine, and which of them `auto` takes.
//!
//! `auto` takes a discrete GPU that Vulkan shows, whose memory holds all of the model but experts and at least
//! a third of those. Other real GPUs run when they are asked for; a software adapter, which computes on the
//! CPU what the CPU's own kernels compute faster, runs for `gpu:N` alone.

use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

use super::device::{at_once, own_memory, tensor};
use super::window;
use super::{GpuOptions, NO_ADAPTER, Stored};
use crate::budget::gib;
use crate::container::Container;
use crate::engine::Options;
use crate::error::{Error, Result};

/// One adapter.
#[derive(Clone)]
pub struct Adapter {
    pub(super) adapter: wgpu::Adapter,
    /// As the system names it.
    pub name: String,
    /// Vulkan, Metal or Dx12.
    pub backend: String,
    /// What it is.
    pub kind: AdapterKind,
    /// Bytes of its own memory, where the system says.
    pub memory_bytes: Option<u64>,
    /// Largest buffer that a kernel can be given, in bytes.
    pub binding_bytes: u64,
    /// Whether this program sees all of that memory.
    pub has_windows: bool,
    /// What of the optional features the kernels use it has.
    pub features: Vec<&'static str>,
}

/// What an adapter is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AdapterKind {
    /// With memory of its own.
    Discrete,
    /// On the processor's memory.
    Integrated,
    /// Passed into a virtual machine, or not said.
    Other,
    /// The processor itself.
    Software,
}

impl Adapter {
    /// Whether its memory is the processor's.
    pub fn is_shared(&self) -> bool {
        matches!(self.kind, AdapterKind::Integrated | AdapterKind::Software)
    }
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            AdapterKind::Discrete => "discrete",
            AdapterKind::Integrated => "integrated",
            AdapterKind::Other => "other",
            AdapterKind::Software => "software",
        };
        let memory = self.memory_bytes.map_or("memory not said".into(), gib);
        let features = match &self.features[..] {
            [] => "none".into(),
            some => some.join(", "),
        };
        write!(
            f,
            "{} ({}, {kind}), {memory}, buffers up to {}, features: {features}",
            self.name,
            self.backend,
            gib(self.binding_bytes)
        )
    }
}

/// All adapters, in the order in which `gpu:N` counts them. The drivers are asked once.
pub fn adapters() -> Vec<Adapter> {
    static ALL: OnceLock<Vec<Adapter>> = OnceLock::new();
    ALL.get_or_init(found).clone()
}

fn found() -> Vec<Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12,
        flags: wgpu::InstanceFlags::empty(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    at_once(instance.enumerate_adapters(wgpu::Backends::all())).into_iter().map(describe).collect()
}

fn describe(adapter: wgpu::Adapter) -> Adapter {
    let info = adapter.get_info();
    let features = [
        (wgpu::Features::SUBGROUP, "subgroups"),
        (wgpu::Features::TIMESTAMP_QUERY, "timestamps"),
        (wgpu::Features::SHADER_F16, "f16"),
        (wgpu::Features::PIPELINE_CACHE, "kernel cache"),
    ];
    let has = adapter.features();
    let limits = adapter.limits();
    let has_windows = window::is_seen(&adapter);
    Adapter {
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => AdapterKind::Discrete,
            wgpu::DeviceType::IntegratedGpu => AdapterKind::Integrated,
            wgpu::DeviceType::Cpu => AdapterKind::Software,
            wgpu::DeviceType::VirtualGpu | wgpu::DeviceType::Other => AdapterKind::Other,
        },
        name: info.name,
        backend: format!("{:?}", info.backend),
        memory_bytes: own_memory(&adapter).map(|memory| memory.bytes),
        binding_bytes: limits.max_buffer_size.min(limits.max_storage_buffer_binding_size),
        has_windows,
        features: (features.iter())
            .filter(|(f, _)| has.contains(*f))
            .map(|(_, name)| *name)
            .chain(tensor(&adapter).map(|_| "tensor products"))
            .chain(has_windows.then_some("direct uploads"))
            .collect(),
        adapter,
    }
}

/// The adapter that was asked for: number N, or without one the first that is no software.
///
/// # Errors
/// There is none; says what to install.
pub fn pick(number: Option<usize>) -> Result<(usize, Adapter)> {
    let all = adapters();
    let count = all.len();
    let mut numbered = all.into_iter().enumerate();
    let found = match number {
        Some(number) => numbered.nth(number),
        None => numbered.find(|(_, adapter)| adapter.kind != AdapterKind::Software),
    };
    found.ok_or_else(|| {
        Error::Gpu(match (number, count) {
            (_, 0) => NO_ADAPTER.into(),
            (Some(number), _) => format!(
                "there is no adapter {number}: `flash-moe devices` lists 0 to {}",
                count - 1
            ),
            (None, _) => "software adapters alone: `flash-moe devices` lists them, --device gpu:N \
                          takes one, --device cpu is faster"
                .into(),
        })
    })
}

/// Bytes that the GPU that was asked for can have of the processor's memory, if that is what it has.
///
/// # Errors
/// There is no such GPU.
pub fn shared_memory(wanted: &GpuOptions) -> Result<Option<u64>> {
    let (_, adapter) = pick(wanted.adapter)?;
    let most = adapter.memory_bytes.map_or(u64::MAX, |bytes| bytes - bytes / 10);
    Ok(adapter.is_shared().then_some(most))
}

/// The GPU that `auto` takes for a container, or why it takes none, in words.
///
/// # Errors
/// The reason, for people.
pub fn auto(
    container: &Container,
    options: &Options,
    wanted: GpuOptions,
) -> Result<GpuOptions, String> {
    super::check(container.shape(), options).map_err(|e| e.to_string())?;
    crate::engine::check_with_gpu(options).map_err(|e| e.to_string())?;
    if !may_have_one() {
        return Err("this system has no graphics device".into());
    }
    let takes =
        |adapter: &Adapter| adapter.kind == AdapterKind::Discrete && adapter.backend == "Vulkan";
    let found = adapters().into_iter().enumerate().find(|(_, adapter)| takes(adapter));
    let Some((number, adapter)) = found else {
        return Err("there is no discrete GPU on Vulkan; `flash-moe devices` lists others".into());
    };
    let memory = wanted.memory_bytes.or(adapter.memory_bytes.map(|bytes| bytes - bytes / 10));
    let Some(memory) = memory else {
        return Err(format!("{} does not say how much memory it has", adapter.name));
    };
    let [whole, experts] = super::plan::whole_bytes(&Stored::of(container), options);
    match holds_enough(memory, whole, experts) {
        true => Ok(GpuOptions { adapter: Some(number), ..wanted }),
        false => Err(format!(
            "{} has {} for it, the model without experts and a third of those need {}",
            adapter.name,
            gib(memory),
            gib(whole - experts + experts.div_ceil(3))
        )),
    }
}

/// Whether a GPU's memory holds a third of the experts beside everything else: with fewer than were tried
/// (docs/measurements.md, 36 and 40) it may be slower than the processor by itself.
fn holds_enough(memory: u64, whole: u64, experts: u64) -> bool {
    memory >= whole - experts + experts.div_ceil(3)
}

/// Whether there can be a GPU at all. Loading the drivers to find out takes a tenth of a second, which
/// every start on a machine without one would pay.
fn may_have_one() -> bool {
    let nodes = ["/dev/dri", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"];
    !cfg!(target_os = "linux") || nodes.iter().any(|node| Path::new(node).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_third_of_the_experts_is_enough() {
        assert!(holds_enough(1000, 1000, 600) && holds_enough(600, 1000, 600));
        assert!(!holds_enough(599, 1000, 600));
        assert!(holds_enough(700, 700, 0) && !holds_enough(699, 700, 0));
    }
}
