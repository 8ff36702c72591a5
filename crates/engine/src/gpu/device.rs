//! The opened device: its queue, its buffers, its kernels, and the one place where it is waited for.
//!
//! What goes wrong on a device arrives late and through callbacks. Allocation and compilation are held
//! in error scopes and answer at once; everything else is kept here and becomes the error of the next
//! call that waits. Nothing after that is trusted.

#![allow(unsafe_code, reason = "kernels without run-time checks, and the size of video memory")]

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use wgpu::util::DeviceExt;
use wgpu::{
    BindGroup, BindGroupLayout, Buffer, BufferBinding, BufferUsages, ComputePipeline,
    SubmissionIndex,
};

use super::slots::BUFFERS_MAX;
use super::window::{self, Window};
use crate::budget::gib;
use crate::error::{Error, Result};

/// Lanes of a team: rows are shared out over teams of so many.
pub const TEAM: u32 = 32;

/// Workgroup memory of the largest tile on tensor cores.
const TENSOR_STORAGE_BYTES: u32 = 32 << 10;

/// Bytes written to the device between two submissions, so that what is staged does not pile up.
const STAGED_BYTES_MAX: u64 = 256 << 20;

/// A device and its queue.
pub struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
    failure: Arc<Mutex<Option<String>>>,
    pipelines: Option<wgpu::PipelineCache>,
    submissions: AtomicU64,
    buffers: AtomicU64,
    /// Whether lanes of a team are lanes of one subgroup.
    pub subgroups: bool,
    /// What its tensor cores multiply, where kernels can use them.
    pub tensor: Option<Tensor>,
}

/// Squares of f16 that a subgroup multiplies at once, with sums in f32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensor {
    /// Rows and columns of one.
    pub side: u32,
}

/// How a kernel sees a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// It only reads.
    Read,
    /// It reads and writes.
    Write,
}

impl Device {
    /// Opens an adapter with all that it offers.
    ///
    /// # Errors
    /// It gives a kernel too few buffers; the driver refuses.
    pub fn open(adapter: &wgpu::Adapter) -> Result<Self> {
        let info = adapter.get_info();
        enough_buffers(&info.name, adapter.limits().max_storage_buffers_per_shader_stage)?;
        let has_subgroups = adapter.features().contains(wgpu::Features::SUBGROUP);
        let subgroups = has_subgroups && info.subgroup_min_size >= TEAM;
        let tensor = tensor(adapter);
        let windows = match window::is_seen(adapter) {
            true => wgpu::Features::MAPPABLE_PRIMARY_BUFFERS,
            false => wgpu::Features::empty(),
        };
        let wanted = wgpu::Features::SUBGROUP
            | wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::PIPELINE_CACHE
            | windows
            | tensor.map_or(wgpu::Features::empty(), |_| TENSOR_FEATURES);
        let experimental_features = match tensor {
            None => wgpu::ExperimentalFeatures::disabled(),
            // SAFETY: cooperative matrices are the only experimental feature that is asked for. The kernels
            // that have them load and store within workgroup arrays whose sizes are constants in front of
            // them, in uniform control flow, in a configuration that the adapter lists (`tensor`).
            Some(_) => unsafe { wgpu::ExperimentalFeatures::enabled() },
        };
        let descriptor = wgpu::DeviceDescriptor {
            required_features: adapter.features() & wanted,
            required_limits: adapter.limits(),
            experimental_features,
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        };
        let (device, queue) = at_once(adapter.request_device(&descriptor))
            .map_err(|e| Error::Gpu(format!("{}: the device does not open: {e}", info.name)))?;
        let failure = Arc::new(Mutex::new(None));
        let keep = |failure: &Arc<Mutex<Option<String>>>| {
            let failure = Arc::clone(failure);
            move |what: String| {
                let mut first = failure.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(what);
            }
        };
        let kept = keep(&failure);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| kept(in_words(&error))));
        let kept = keep(&failure);
        device.set_device_lost_callback(move |reason, message| {
            kept(format!("the device is lost ({reason:?}: {message}); start again"));
        });
        let [submissions, buffers] = [0, 0].map(AtomicU64::new);
        Ok(Self {
            device,
            queue,
            failure,
            pipelines: None,
            submissions,
            buffers,
            subgroups,
            tensor,
        })
    }

    /// Compiles from here on with what an earlier run has left, as [`Device::pipelines`] gave it then, and
    /// keeps what is compiled; whether the device can.
    pub fn keep_pipelines(&mut self, earlier: Option<&[u8]>) -> bool {
        if !self.device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return false;
        }
        let descriptor =
            wgpu::PipelineCacheDescriptor { label: None, data: earlier, fallback: true };
        // SAFETY: the bytes are `pipelines`' own: `KeptPipelines` alone calls this, writes nothing else to
        // its file and takes nothing whose checksum is another. wgpu refuses those of another adapter.
        let made = self.scoped("compiled kernels", || unsafe {
            self.device.create_pipeline_cache(&descriptor)
        });
        // Without it kernels are compiled.
        self.pipelines = made.ok();
        self.pipelines.is_some()
    }

    /// What was compiled since [`Device::keep_pipelines`] and what there was before.
    pub fn pipelines(&self) -> Option<Vec<u8>> {
        self.pipelines.as_ref()?.get_data()
    }

    /// What went wrong since it was opened, if anything did.
    ///
    /// # Errors
    /// The first thing.
    pub fn check(&self) -> Result<()> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(what) => Err(Error::Gpu(what.clone())),
            None => Ok(()),
        }
    }

    /// Does `make`, whose errors are the caller's.
    fn scoped<T>(&self, what: &str, make: impl FnOnce() -> T) -> Result<T> {
        let filters = [
            wgpu::ErrorFilter::Internal,
            wgpu::ErrorFilter::OutOfMemory,
            wgpu::ErrorFilter::Validation,
        ];
        let [internal, memory, validation] = filters.map(|f| self.device.push_error_scope(f));
        let made = make();
        for scope in [validation, memory, internal] {
            if let Some(error) = at_once(scope.pop()) {
                return Err(Error::Gpu(format!("{what}: {}", in_words(&error))));
            }
        }
        self.check().map(|()| made)
    }

    /// A buffer of zeros for kernels, which can be written and read from here.
    ///
    /// # Errors
    /// Larger than the device allows, or than its memory.
    pub fn buffer(&self, name: &str, bytes: u64) -> Result<Buffer> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        self.allocate(name, bytes, usage)
    }

    /// As [`Device::buffer`], in memory that this program sees as well, and may write once its zeros are there:
    /// once what was submitted so far is over.
    ///
    /// # Errors
    /// As [`Device::buffer`].
    pub fn window(&self, name: &str, bytes: u64) -> Result<Window> {
        let usage = BufferUsages::STORAGE
            | BufferUsages::COPY_DST
            | BufferUsages::COPY_SRC
            | BufferUsages::MAP_WRITE;
        let buffer = self.allocate(name, bytes, usage)?;
        // Otherwise the zeros would come with the first command, over what is there by then.
        let mut encoder = self.encoder();
        encoder.clear_buffer(&buffer, 0, None);
        self.submit(encoder);
        Window::new(&self.device, buffer)
    }

    /// Bytes that a part of a buffer begins at a multiple of, where kernels are given a part.
    pub fn part_alignment(&self) -> usize {
        self.device.limits().min_storage_buffer_offset_alignment as usize
    }

    /// Memory that the device copies to and this program reads.
    ///
    /// # Errors
    /// As [`Device::buffer`].
    pub fn landing(&self, bytes: u64) -> Result<Buffer> {
        self.allocate("read back", bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST)
    }

    /// Memory that this program writes, as it may at once, and the device copies from.
    ///
    /// # Errors
    /// As [`Device::buffer`].
    pub fn staging(&self, name: &str, bytes: u64) -> Result<Buffer> {
        self.allocate(name, bytes, BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC)
    }

    /// Submissions so far, and buffers that the driver was asked for.
    pub fn counts(&self) -> [u64; 2] {
        [&self.submissions, &self.buffers].map(|count| count.load(Ordering::Relaxed))
    }

    fn allocate(&self, name: &str, bytes: u64, usage: BufferUsages) -> Result<Buffer> {
        self.buffers.fetch_add(1, Ordering::Relaxed);
        let size = bytes.next_multiple_of(16).max(16);
        self.scoped(&format!("{name}, {}", gib(bytes)), || {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(name),
                size,
                usage,
                mapped_at_creation: usage == BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC,
            })
        })
    }

    /// A buffer with these contents.
    ///
    /// # Errors
    /// As [`Device::buffer`].
    pub fn filled(&self, name: &str, contents: &[u8]) -> Result<Buffer> {
        self.buffers.fetch_add(1, Ordering::Relaxed);
        self.scoped(&format!("{name}, {}", gib(contents.len() as u64)), || {
            self.device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: Some(name),
                contents,
                usage: BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC,
            })
        })
    }

    /// Room for time stamps, where the device has them.
    ///
    /// # Errors
    /// As [`Device::buffer`].
    pub fn stamps(&self, count: u32) -> Result<Option<wgpu::QuerySet>> {
        if !self.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Ok(None);
        }
        let ty = wgpu::QueryType::Timestamp;
        let descriptor = wgpu::QuerySetDescriptor { label: None, ty, count };
        self.scoped("time stamps", || Some(self.device.create_query_set(&descriptor)))
    }

    /// Memory for time stamps as numbers.
    ///
    /// # Errors
    /// As [`Device::buffer`].
    pub fn resolved(&self, bytes: u64) -> Result<Buffer> {
        self.allocate("time stamps", bytes, BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC)
    }

    /// Nanoseconds of a time stamp's unit.
    pub fn tick_ns(&self) -> f32 {
        self.queue.get_timestamp_period()
    }

    /// Writes bytes, before everything that is submitted from here on. The driver makes a buffer for
    /// each call.
    pub fn write(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) {
        self.buffers.fetch_add(1, Ordering::Relaxed);
        self.queue.write_buffer(buffer, offset, bytes);
    }

    /// As [`Device::write`], of much: what is staged is handed over and waited for part by part.
    ///
    /// # Errors
    /// The device failed.
    pub fn write_all(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        for (i, part) in bytes.chunks(STAGED_BYTES_MAX as usize).enumerate() {
            self.write(buffer, offset + i as u64 * STAGED_BYTES_MAX, part);
            self.flush()?;
        }
        Ok(())
    }

    /// Sees what was written so far to the device.
    fn flush(&self) -> Result<()> {
        self.queue.submit([]);
        self.wait_for(None)
    }

    /// Layouts of a group of buffers that kernels see so.
    pub fn layout(&self, accesses: &[Access]) -> BindGroupLayout {
        let entry = |(binding, access): (u32, &Access)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: *access == Access::Read },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let entries: Vec<_> = (0..).zip(accesses).map(entry).collect();
        self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: None,
            entries: &entries,
        })
    }

    /// Buffers for a kernel, in the order of the layout.
    ///
    /// # Errors
    /// One is larger than a kernel can be given.
    pub fn group(&self, layout: &BindGroupLayout, buffers: &[&Buffer]) -> Result<BindGroup> {
        let whole = buffers.iter().map(|buffer| buffer.as_entire_buffer_binding());
        self.group_of_parts(layout, whole)
    }

    /// As [`Device::group`], of parts of buffers.
    ///
    /// # Errors
    /// As there.
    pub fn group_of_parts<'b>(
        &self,
        layout: &BindGroupLayout,
        parts: impl Iterator<Item = BufferBinding<'b>>,
    ) -> Result<BindGroup> {
        let entries = (0..).zip(parts).map(|(binding, part)| wgpu::BindGroupEntry {
            binding,
            resource: wgpu::BindingResource::Buffer(part),
        });
        let entries: Vec<_> = entries.collect();
        self.scoped("a group of buffers", || {
            self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout,
                entries: &entries,
            })
        })
    }

    /// Compiles a kernel, `main` in its source.
    ///
    /// # Errors
    /// The driver refuses it.
    pub fn kernel(
        &self,
        name: &str,
        source: &str,
        groups: &[&BindGroupLayout],
    ) -> Result<ComputePipeline> {
        self.scoped(&format!("kernel {name}"), || {
            let shader = wgpu::ShaderModuleDescriptor {
                label: Some(name),
                source: wgpu::ShaderSource::Wgsl(source.into()),
            };
            // SAFETY: indices in our kernels come from the constants in front of them, from headers
            // that `dense` writes and from ids below the number of experts; buffers are made for the
            // largest of each (`layout`, `dense`, `slots`), and every loop has a bound.
            let module = unsafe {
                let unchecked = wgpu::ShaderRuntimeChecks::unchecked();
                self.device.create_shader_module_trusted(shader, unchecked)
            };
            let groups: Vec<_> = groups.iter().copied().map(Some).collect();
            let layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &groups,
                immediate_size: 0,
            });
            self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(name),
                layout: Some(&layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: self.pipelines.as_ref(),
            })
        })
    }

    /// Commands to come.
    pub fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    /// Hands commands over.
    pub fn submit(&self, encoder: wgpu::CommandEncoder) {
        self.submit_all([encoder.finish()]);
    }

    /// Hands over what was written before.
    pub fn submit_all(
        &self,
        commands: impl IntoIterator<Item = wgpu::CommandBuffer>,
    ) -> SubmissionIndex {
        self.submissions.fetch_add(1, Ordering::Relaxed);
        self.queue.submit(commands)
    }

    /// Sees which submissions are over, without waiting.
    ///
    /// # Errors
    /// The device failed.
    pub fn poll(&self) -> Result<()> {
        self.polled(wgpu::PollType::Poll)
    }

    /// Waits for a submission, or for everything that was submitted.
    ///
    /// # Errors
    /// The device failed.
    pub fn wait_for(&self, submission_index: Option<SubmissionIndex>) -> Result<()> {
        self.polled(wgpu::PollType::Wait { submission_index, timeout: None })
    }

    fn polled(&self, how: wgpu::PollType) -> Result<()> {
        let polled = self.device.poll(how);
        self.check()?;
        polled.map(|_| ()).map_err(|e| Error::Gpu(format!("waiting for the device: {e}")))
    }

    /// Asks for the first `bytes` of a landing buffer, as what was submitted so far leaves them.
    pub fn ask(&self, landing: &Buffer, bytes: u64) {
        let failure = Arc::clone(&self.failure);
        landing.slice(..bytes).map_async(wgpu::MapMode::Read, move |outcome| {
            if let Err(error) = outcome {
                let mut first = failure.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(format!("reading back: {error}"));
            }
        });
    }

    /// Waits for a submission, or for all, then hands what was asked for to `take`.
    ///
    /// # Errors
    /// The device failed.
    pub fn answer<T>(
        &self,
        landing: &Buffer,
        bytes: u64,
        submission: Option<SubmissionIndex>,
        take: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        self.wait_for(submission)?;
        let view = landing.slice(..bytes).get_mapped_range();
        let view = view.map_err(|e| Error::Gpu(format!("reading back: {e}")))?;
        let taken = take(&view);
        drop(view);
        landing.unmap();
        Ok(taken)
    }

    /// Waits for everything, then hands the first `bytes` of a landing buffer to `take`.
    ///
    /// # Errors
    /// The device failed.
    pub fn landed<T>(
        &self,
        landing: &Buffer,
        bytes: u64,
        take: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        self.ask(landing, bytes);
        self.answer(landing, bytes, None, take)
    }

    /// Copies a part of a buffer here.
    ///
    /// # Errors
    /// The device failed.
    pub fn read(&self, buffer: &Buffer, offset: u64, to: &mut [u8]) -> Result<()> {
        for (i, to) in to.chunks_mut(STAGED_BYTES_MAX as usize).enumerate() {
            let bytes = to.len() as u64;
            let landing = self.landing(bytes)?;
            let mut encoder = self.encoder();
            let from = offset + i as u64 * STAGED_BYTES_MAX;
            encoder.copy_buffer_to_buffer(buffer, from, &landing, 0, bytes);
            self.submit(encoder);
            self.landed(&landing, bytes, |from| to.copy_from_slice(from))?;
        }
        Ok(())
    }
}

/// What products on tensor cores need.
const TENSOR_FEATURES: wgpu::Features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
    .union(wgpu::Features::SHADER_F16)
    .union(wgpu::Features::SUBGROUP);

/// What an adapter's tensor cores multiply, where the kernels can use them: through Vulkan, which alone was
/// tried, and where a tile's 128 threads are as many subgroups as take its squares two by two: squares of
/// 16 with 32 lanes, or of 8 with 8.
pub fn tensor(adapter: &wgpu::Adapter) -> Option<Tensor> {
    let info = adapter.get_info();
    let can = info.backend == wgpu::Backend::Vulkan
        && adapter.features().contains(TENSOR_FEATURES)
        && adapter.limits().max_compute_workgroup_storage_size >= TENSOR_STORAGE_BYTES;
    let fits = |side: u32| {
        let lanes = side * side / 8;
        let takes = |c: &wgpu::CooperativeMatrixProperties| {
            [c.m_size, c.n_size, c.k_size] == [side; 3]
                && c.ab_type == wgpu::CooperativeScalarType::F16
                && c.cr_type == wgpu::CooperativeScalarType::F32
        };
        [info.subgroup_min_size, info.subgroup_max_size] == [lanes; 2]
            && adapter.cooperative_matrix_properties().iter().any(takes)
    };
    [16, 8].into_iter().find(|side| can && fits(*side)).map(|side| Tensor { side })
}

/// Whether kernels get as many buffers as the largest of them has.
fn enough_buffers(name: &str, most: u32) -> Result<()> {
    match most >= BUFFERS_MAX {
        true => Ok(()),
        false => Err(Error::Gpu(format!(
            "{name} gives a kernel {most} buffers, {BUFFERS_MAX} are needed; use --device cpu"
        ))),
    }
}

fn in_words(error: &wgpu::Error) -> String {
    match error {
        wgpu::Error::OutOfMemory { .. } => {
            "the device has not enough memory left; give a smaller --gpu-memory or --context".into()
        }
        other => other.to_string(),
    }
}

/// The value of a future of wgpu's, which without a browser are ready when they are made.
pub fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::yield_now();
    }
}

/// Memory of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OwnMemory {
    /// Bytes of the largest heap that is its own.
    pub bytes: u64,
    /// Bytes of the heap that buffers for both sides come from, where that is its own; otherwise 0.
    pub seen: u64,
}

/// The memory of the device itself, where the system says.
pub fn own_memory(adapter: &wgpu::Adapter) -> Option<OwnMemory> {
    #[cfg(not(target_vendor = "apple"))]
    {
        // SAFETY: the guard outlives the use of what it gives, and nothing is destroyed.
        let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
        let instance = adapter.shared_instance().raw_instance();
        // SAFETY: the physical device is of this instance, and both are alive behind the guard.
        let memory = unsafe {
            instance.get_physical_device_memory_properties(adapter.raw_physical_device())
        };
        let heaps = &memory.memory_heaps[..memory.memory_heap_count as usize];
        // Bit 0 of a heap's flags: VK_MEMORY_HEAP_DEVICE_LOCAL_BIT.
        let own = heaps.iter().filter(|heap| heap.flags.as_raw() & 1 == 1).map(|heap| heap.size);
        // Bits 0 to 2 of a type's: device local, host visible, host coherent. The first that has all is taken.
        let types = &memory.memory_types[..memory.memory_type_count as usize];
        let seen = types.iter().find(|t| t.property_flags.as_raw() & 0b111 == 0b111);
        let seen = seen.map_or(0, |t| heaps[t.heap_index as usize].size);
        own.max().map(|bytes| OwnMemory { bytes, seen })
    }
    #[cfg(target_vendor = "apple")]
    {
        let _unknown = adapter;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_with_too_few_buffers_is_refused_by_name() {
        assert!(enough_buffers("a GPU", BUFFERS_MAX).is_ok());
        let error = enough_buffers("a small GPU", 8).unwrap_err().to_string();
        assert!(error.contains("a small GPU gives a kernel 8 buffers, 12"), "{error}");
        assert!(error.contains("--device cpu"), "{error}");
    }
}
