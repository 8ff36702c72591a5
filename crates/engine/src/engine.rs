//! A loaded model: the container, its resident weights, the expert store and the threads.
//!
//! Opening plans the memory first and refuses what does not fit before anything is allocated. An
//! engine is shared by any number of sessions and never changes after it is opened, the pool of
//! experts apart.

use std::sync::Arc;

use flash_moe_kernels::Isa;

use crate::budget::{self, Budget, Demand};
use crate::compute::{Arithmetic, Compute, Kin};
use crate::container::{Container, RecordLayout};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, GpuOptions, Host};
use crate::kv_cache::{KvFormat, KvShape};
use crate::layer::lookahead::Lookahead;
use crate::machine;
use crate::pool::Pool;
use crate::shape::{LayerId, Shape};
use crate::store::{ExpertStore, IoMode, Reader, StoreOptions};
use crate::weights::Weights;

/// What a user decides about a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Compute threads, at least 1.
    pub threads: usize,
    /// Kernels.
    pub isa: Isa,
    /// Numbers in which activations meet quantised weights; the router's are always f32.
    pub arithmetic: Arithmetic,
    /// Memory the process may use in all; `None` measures what is free.
    pub memory_bytes: Option<u64>,
    /// Tokens of context of a session; `None` takes a default within the model's limit.
    pub context: Option<usize>,
    /// Sessions that may be alive at once, at least 1; memory is planned for all of them.
    pub sessions: usize,
    /// Direct or buffered expert reads.
    pub io: IoMode,
    /// How keys and values are kept; lossy unless f32.
    pub kv_cache: KvFormat,
    /// Experts chosen for a token instead of the model's own number; lossy when lower.
    pub experts_per_token: Option<usize>,
    /// Prompt tokens computed together, at least 1.
    pub prefill_chunk: usize,
    /// Expert reads in flight, at least 1.
    pub readers: usize,
    /// Who makes them.
    pub reader: Reader,
    /// How the next layer's experts are guessed.
    pub lookahead: Lookahead,
    /// Vocabulary rows that stand for a token; the padding above is masked. `None`: all.
    pub vocabulary: Option<usize>,
    /// Memory that the caller takes beside the engine (tokenizer), in bytes.
    pub other_bytes: u64,
    /// Memory that checkpoints beside the sessions may take, in bytes.
    pub kept_bytes: u64,
    /// The GPU that computes; `None`: the CPU does.
    pub gpu: Option<GpuOptions>,
}

impl Default for Options {
    /// One thread, the fastest kernels, nothing lossy, nothing guessed, one session.
    fn default() -> Self {
        Self {
            threads: 1,
            isa: Isa::detect(),
            arithmetic: Arithmetic::default(),
            memory_bytes: None,
            context: None,
            sessions: 1,
            io: IoMode::Auto,
            kv_cache: KvFormat::F32,
            experts_per_token: None,
            prefill_chunk: 512,
            readers: 8,
            reader: Reader::Threads,
            lookahead: Lookahead::Off,
            vocabulary: None,
            other_bytes: 0,
            kept_bytes: 0,
            gpu: None,
        }
    }
}

/// A loaded model.
pub struct Engine {
    container: Container,
    budget: Budget,
    options: Options,
    pub(crate) weights: Weights,
    pub(crate) store: ExpertStore,
    /// For tokens of one timeline.
    pub(crate) compute: Compute,
    /// For tokens of several timelines, on the same threads.
    pub(crate) strangers: Compute,
    /// What computes instead, if anything does.
    pub(crate) gpu: Option<Gpu>,
}

impl Engine {
    /// Plans the memory, then reads the dense weights and starts the threads.
    ///
    /// # Errors
    /// Options out of range, a plan above the limit, a damaged container.
    pub fn open(container: Container, options: &Options) -> Result<Self> {
        check(container.shape(), options)?;
        let options = &budget::shared(&Demand::of(&container), options)?;
        let budget = Budget::plan(&container, options)?;
        let mut weights = Weights::load(&container)?;
        let open = |wanted| Gpu::open(&container, &mut weights, options, wanted);
        let mut gpu = options.gpu.as_ref().map(open).transpose()?;
        if gpu.is_some() {
            weights.keep_embedding();
        }
        // The dense weights are taken by now; the rest of the plan is still to come.
        let planned = budget.total() - Demand::of(&container).dense_bytes;
        let free = machine::available_memory().unwrap_or(0);
        let store = ExpertStore::open(
            &container,
            StoreOptions {
                slots: budget.slots,
                readers: options.readers,
                reader: options.reader,
                io: options.io,
                spare_bytes: free.saturating_sub(planned),
            },
        )?;
        let pool = Arc::new(Pool::new(options.threads));
        let [compute, strangers] = [Kin::OneTimeline, Kin::Strangers].map(|kin| Compute {
            isa: options.isa,
            pool: Arc::clone(&pool),
            arithmetic: options.arithmetic,
            kin,
        });
        if let Some(gpu) = &mut gpu {
            gpu.prepare(&Host { store: &store, compute: &compute })?;
        }
        let options = options.clone();
        Ok(Self { container, budget, options, weights, store, compute, strangers, gpu })
    }

    /// The container it was opened from.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// The model's shape.
    pub fn shape(&self) -> &Shape {
        self.container.shape()
    }

    /// The memory plan.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Tokens of context a session holds.
    pub fn context(&self) -> usize {
        self.budget.context
    }

    /// The options it was opened with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The expert store, for its counters.
    pub fn store(&self) -> &ExpertStore {
        &self.store
    }

    /// The GPU that computes, if one does.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.gpu.as_ref()
    }

    /// What a device is fed from.
    pub(crate) fn host(&self) -> Host<'_> {
        Host { store: &self.store, compute: &self.compute }
    }

    /// Layout of the expert records of a layer that has experts.
    pub(crate) fn layout(&self, layer: LayerId) -> &RecordLayout {
        let files = &self.container.manifest().experts;
        let place = files.iter().position(|f| f.layer == layer).expect("a layer with experts");
        &self.container.layouts()[place]
    }

    /// Experts chosen for a token.
    pub fn top_k(&self) -> usize {
        self.options.experts_per_token.unwrap_or(self.shape().moe.top_k)
    }

    /// The size of a layer's keys and values.
    pub(crate) fn kv_shape(&self) -> KvShape {
        KvShape::of(&self.shape().attention, self.options.kv_cache)
    }

    /// Vocabulary rows that stand for a token.
    pub fn vocabulary(&self) -> usize {
        self.options.vocabulary.unwrap_or(self.shape().vocab).min(self.shape().vocab)
    }
}

fn check(shape: &Shape, options: &Options) -> Result<()> {
    let experts = shape.moe.experts;
    if options.gpu.is_some() {
        check_with_gpu(options)?;
    }
    match options.experts_per_token {
        Some(k) if k == 0 || k > experts => Err(Error::Shape(format!(
            "{k} experts per token; this model has {experts} and was trained with {}",
            shape.moe.top_k
        ))),
        _ => Ok(()),
    }
}

/// Whether nothing was asked for that only the CPU's blocks do.
pub(crate) fn check_with_gpu(options: &Options) -> Result<()> {
    if options.arithmetic != Arithmetic::Exact {
        return Err(Error::Gpu(format!(
            "activations as {}: a GPU computes in f32 alone; --device cpu takes it",
            options.arithmetic.name()
        )));
    }
    if options.lookahead != Lookahead::Off {
        return Err(Error::Gpu("--lookahead guesses on the CPU; --device cpu takes it".into()));
    }
    Ok(())
}
