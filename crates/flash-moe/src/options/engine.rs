//! Flags of every command that loads a model: which one, and what of the machine it may use.
//!
//! Resolves them against the machine and the container into the engine's own options.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use flash_moe_engine::container::Container;
use flash_moe_engine::engine::Options;
use flash_moe_engine::gpu::{self, GpuOptions, Misses, Stored};
use flash_moe_engine::kv_cache::{KvFormat, PAGE_POSITIONS};
use flash_moe_engine::store::{IoMode, Reader};
use flash_moe_engine::tokenizer::{TOKENIZER_FILE, Tokenizer};
use flash_moe_engine::{Arithmetic, Lookahead};
use flash_moe_kernels::Isa;

use super::{environment, size};
use crate::hot_set::{self, HotSetFile};
use crate::tiny;

/// Bytes that a loaded tokenizer takes for each byte of its file: 154 MB for Qwen3.5's 10 MB.
const TOKENIZER_FACTOR: u64 = 16;

/// Which model, and what of the machine it may use.
#[derive(Args, Clone, Debug)]
pub struct EngineArgs {
    /// Directory of the model, made by `flash-moe convert` [default: the small built-in model].
    #[arg(long, short, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// Memory for the whole process: 6GiB, 6G or bytes [default: nine tenths of what is free].
    /// What the model itself does not need becomes the cache of experts.
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = "Machine")]
    pub memory: Option<u64>,

    /// Compute threads [default: one a core]. The numbers do not depend on it.
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Machine")]
    pub threads: Option<usize>,

    /// What computes: the processor, the first GPU that is no software, or GPU number N as `flash-moe
    /// devices` counts them. auto takes a discrete GPU on Vulkan that holds at least a third of
    /// the experts beside everything else, and the processor where there is none or where a flag asks for what only
    /// it does.
    #[arg(long, value_name = "auto|cpu|gpu[:N]", default_value = "auto", help_heading = "Machine")]
    pub device: DeviceChoice,

    /// Video memory to use: 8GiB, 8G or bytes [default: nine tenths of the GPU's own; of a GPU on the
    /// processor's memory, what --memory leaves]. What the model itself does not need holds experts.
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = "Machine")]
    pub gpu_memory: Option<u64>,

    /// Who computes experts that are in memory and not in video memory: the GPU, which uploads them, or the
    /// processor. auto shares them out by what is measured when the model opens. The numbers of
    /// upload do not depend on what video memory holds, those of the others do by f32 rounding.
    #[arg(long, value_name = "auto|upload|cpu", value_enum, default_value_t = MissesChoice::Auto, help_heading = "Machine")]
    pub gpu_misses: MissesChoice,

    /// How an expert's record comes to video memory. auto writes it where the kernels read it if the
    /// processor sees all of that memory (`flash-moe devices`: direct uploads) and either has the same or uploads all
    /// that is missing; staged always takes memory for uploads in between. The numbers do not depend on it.
    #[arg(long, value_name = "auto|staged", value_enum, default_value_t = UploadsChoice::Auto, help_heading = "Machine")]
    pub gpu_uploads: UploadsChoice,

    /// Instruction set of the kernels.
    #[arg(long, value_enum, default_value_t = IsaChoice::Auto, help_heading = "Machine")]
    pub isa: IsaChoice,

    /// Activations stay f32 when they meet quantised weights, instead of 16-bit integers with a
    /// scale for every 64 (relative error 2e-5). Slower; the reference for everything else. On a GPU,
    /// whose arithmetic is f32 anyway, a prompt's products then leave tensor cores alone.
    #[arg(long, conflicts_with = "fast", help_heading = "Machine")]
    pub exact: bool,

    /// Activations become 8-bit integers when they meet quantised weights. Faster and LOSSY:
    /// relative error 5e-3; docs/measurements.md has what it costs.
    #[arg(long, help_heading = "Machine")]
    pub fast: bool,

    /// How experts are read: past the page cache or through it. `--json` says which and why.
    #[arg(long, value_enum, default_value_t = IoChoice::Auto, help_heading = "Machine")]
    pub io: IoChoice,

    /// Expert reads in flight. What a disk gains by more of them differs from none to half:
    /// `flash-moe bench` shows its speed at 1, 4, 8 and 16.
    #[arg(long, value_name = "N", default_value = "8", value_parser = at_least_one)]
    #[arg(help_heading = "Machine")]
    pub readers: usize,

    /// Who makes the expert reads; to compare and to diagnose. Never changes the numbers.
    #[arg(long, value_enum, default_value_t = ReaderChoice::Threads, help_heading = "Machine")]
    pub reader: ReaderChoice,

    /// How keys and values are kept: f32, f16, bf16, int8, tq2, tq3, tq4, or keys and values apart,
    /// k4v2. All but f32 are LOSSY and save memory and, in long contexts, time: docs/kv-cache.md has
    /// what each costs [default: f32, or tq2 with TQ_KV=1 in the environment].
    #[arg(long, value_name = "FORMAT", help_heading = "Machine")]
    pub kv_cache: Option<KvFormat>,

    /// With --kv-cache tq..: positions at the start that stay in f16, in whole pages of 64
    /// [default: 64].
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub kv_sink: Option<usize>,

    /// With --kv-cache tq..: latest positions that stay in f16 at least, in whole pages of 64
    /// [default: 256].
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub kv_recent: Option<usize>,

    /// Prompt tokens computed together. Larger chunks read each expert less often and take more
    /// memory [default: 512; on a discrete GPU 2048, or 1024, while that takes little of its memory].
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Machine")]
    pub prefill_chunk: Option<usize>,

    /// Stretch the positions that the model was trained for this many times (YaRN). Lossy: it changes
    /// results at every position.
    #[arg(long, value_name = "FACTOR", help_heading = "Numbers")]
    pub yarn: Option<f64>,

    /// How the experts of the next layer are guessed, to be read while this one computes. Never
    /// changes the numbers. Measured on a disk that was the limit, with random weights: no gain
    /// (docs/measurements.md, entry 16); it can pay where the disk idles.
    #[arg(long, value_enum, default_value_t = LookaheadChoice::Off, help_heading = "Machine")]
    pub lookahead: LookaheadChoice,

    /// Experts for each token, instead of the number the model was trained with. Fewer is faster
    /// and LOSSY.
    #[arg(long, value_name = "K", help_heading = "Machine")]
    pub experts_per_token: Option<usize>,
}

/// What is kept from one run to the next, for commands that start with an empty cache of experts.
#[derive(Args, Clone, Debug)]
pub struct HotSetArgs {
    /// Keep which experts were used, for the next run to read them in the background while no
    /// token waits for a read: `auto` in hot-set.json beside the model, or in a FILE. Never changes
    /// the numbers.
    #[arg(long, value_name = "auto|off|FILE", default_value = "off", help_heading = "Machine")]
    pub hot_set: HotSetChoice,
}

/// Values of `--device`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceChoice {
    /// A GPU where one fits, as the flag's help says.
    Auto,
    /// The processor.
    Cpu,
    /// A GPU: this one, or the first that is no software.
    Gpu(Option<usize>),
}

/// Values of `--gpu-misses`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum MissesChoice {
    /// As measured.
    Auto,
    /// The GPU.
    Upload,
    /// The processor.
    Cpu,
}

/// Values of `--gpu-uploads`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum UploadsChoice {
    /// Directly where that can be.
    Auto,
    /// Through memory for uploads.
    Staged,
}

/// Values of `--hot-set`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HotSetChoice {
    /// Nothing is kept.
    Off,
    /// Beside the model.
    Auto,
    /// In this file.
    File(PathBuf),
}

/// Values of `--isa`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum IsaChoice {
    /// The fastest that this CPU has.
    Auto,
    /// Plain code, the specification.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with VNNI.
    #[value(name = "avx512vnni")]
    Avx512Vnni,
    /// AArch64.
    Neon,
    /// The same with the dot product instructions.
    #[value(name = "neondot")]
    NeonDot,
}

/// Values of `--io`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum IoChoice {
    /// Past it when the experts fit neither the expert cache nor the memory left beside it;
    /// otherwise what is quicker on a few records read at the start.
    Auto,
    /// Past the page cache.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// Values of `--reader`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ReaderChoice {
    /// As many threads as reads in flight.
    Threads,
    /// One thread with io_uring; threads where the system has or allows none. Where it may lock memory
    /// it takes less than half of the processor time; decoding was no faster where that was measured.
    Uring,
}

/// Values of `--lookahead`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum LookaheadChoice {
    /// Nothing is guessed.
    Off,
    /// The next layer's own router, applied to the state before this layer's experts.
    Router,
    /// The experts that the last token used there: the original engine's --predict. Of its reads
    /// a quarter at most were useful where that was measured.
    Previous,
}

/// A model directory that is open, with the tokenizer where there is one.
pub struct Model {
    /// The container.
    pub container: Container,
    /// Absent in a container of random weights, which takes token ids alone.
    pub tokenizer: Option<Tokenizer>,
}

impl EngineArgs {
    /// Opens the model directory, unpacking the built-in model if none is named.
    ///
    /// # Errors
    /// What the container, the tokenizer or the cache directory has to say.
    pub fn open(&self) -> Result<Model> {
        let dir = match &self.model {
            Some(dir) => dir.clone(),
            None => tiny::unpacked(environment::cache_dir())?,
        };
        let mut container = Container::open(&dir)?;
        if let Some(factor) = self.yarn {
            container.stretch(factor).context("--yarn")?;
        }
        let tokenizer = match dir.join(TOKENIZER_FILE).exists() {
            true => Some(Tokenizer::open(&dir)?),
            false => None,
        };
        Ok(Model { container, tokenizer })
    }

    /// The engine's options for `model`, with `context` tokens.
    ///
    /// # Errors
    /// An instruction set that this CPU does not have.
    pub fn engine_options(&self, model: &Model, context: Option<usize>) -> Result<Options> {
        let tokenizer_file = model.container.dir().join(TOKENIZER_FILE);
        let tokenizer_bytes = match &model.tokenizer {
            Some(_) => std::fs::metadata(&tokenizer_file)
                .with_context(|| tokenizer_file.display().to_string())?
                .len(),
            None => 0,
        };
        let options = Options {
            vocabulary: model.tokenizer.as_ref().map(Tokenizer::count),
            other_bytes: tokenizer_bytes * TOKENIZER_FACTOR,
            ..self.machine_options(context)?
        };
        let auto = |exact: &Options, wanted| gpu::auto(&model.container, exact, wanted);
        let options = self.on_device(&auto, options)?;
        self.in_chunks(&Stored::of(&model.container), options)
    }

    /// The same with the chunk of a prompt that the device takes best, unless one was asked for.
    ///
    /// # Errors
    /// There is no such device.
    pub fn in_chunks(&self, stored: &Stored, options: Options) -> Result<Options> {
        let chunk = match (&options.gpu, self.prefill_chunk) {
            (Some(wanted), None) => gpu::prefill_chunk(stored, &options, wanted)?,
            _ => options.prefill_chunk,
        };
        Ok(Options { prefill_chunk: chunk, ..options })
    }

    /// The options for dimensions alone: `auto` is the processor, since what a GPU would have to hold is not
    /// here.
    ///
    /// # Errors
    /// As [`EngineArgs::engine_options`].
    pub fn options_without_model(&self, context: Option<usize>) -> Result<Options> {
        let options = self.machine_options(context)?;
        self.on_device(&|_, _| Err("there is no model to hold".into()), options)
    }

    /// The same options on the device that was asked for, `auto` as it says. A GPU computes in f32.
    fn on_device(
        &self,
        auto: &dyn Fn(&Options, GpuOptions) -> Result<GpuOptions, String>,
        options: Options,
    ) -> Result<Options> {
        let misses = match self.gpu_misses {
            MissesChoice::Auto => Misses::Auto,
            MissesChoice::Upload => Misses::Upload,
            MissesChoice::Cpu => Misses::Cpu,
        };
        let on_gpu = |adapter| GpuOptions {
            adapter,
            memory_bytes: self.gpu_memory,
            kernels_dir: environment::cache_dir(),
            timed: false,
            plain: self.exact,
            staged: self.gpu_uploads == UploadsChoice::Staged,
            misses,
        };
        let exact = Options {
            arithmetic: if self.fast { options.arithmetic } else { Arithmetic::Exact },
            ..options.clone()
        };
        let (gpu, why) = match self.device {
            DeviceChoice::Gpu(adapter) => (Some(on_gpu(adapter)), String::new()),
            DeviceChoice::Cpu => (None, "--device is cpu".into()),
            DeviceChoice::Auto => match auto(&exact, on_gpu(None)) {
                Ok(adapter) => (Some(adapter), String::new()),
                Err(why) => (None, format!("--device auto takes the processor: {why}")),
            },
        };
        match (gpu, self.gpu_memory) {
            (None, Some(_)) => bail!("--gpu-memory needs a GPU, but {why}"),
            (None, None) if self.gpu_misses != MissesChoice::Auto => {
                bail!("--gpu-misses needs a GPU, but {why}")
            }
            (None, None) if self.gpu_uploads != UploadsChoice::Auto => {
                bail!("--gpu-uploads needs a GPU, but {why}")
            }
            (None, None) => Ok(options),
            (gpu, _) => Ok(Options { gpu, ..exact }),
        }
    }

    /// The engine's options for a model without a tokenizer, with `context` tokens.
    ///
    /// # Errors
    /// An instruction set that this CPU does not have.
    pub fn machine_options(&self, context: Option<usize>) -> Result<Options> {
        let defaults = Options::default();
        Ok(Options {
            threads: self.threads.unwrap_or_else(cores),
            isa: self.isa.resolve()?,
            arithmetic: self.arithmetic(),
            memory_bytes: self.memory,
            context,
            io: self.io.mode(),
            kv_cache: self.kv_format()?,
            experts_per_token: self.experts_per_token,
            prefill_chunk: self.prefill_chunk.unwrap_or(defaults.prefill_chunk),
            readers: self.readers,
            reader: self.reader.mode(),
            lookahead: self.lookahead.mode(),
            ..defaults
        })
    }

    /// The same with keys and values as they are computed.
    pub fn with_plain_kv_cache(&self) -> Self {
        Self { kv_cache: Some(KvFormat::F32), kv_sink: None, kv_recent: None, ..self.clone() }
    }

    /// How keys and values are kept.
    fn kv_format(&self) -> Result<KvFormat> {
        let original = || environment::original_kv_codes().then(KvFormat::original);
        let format = self.kv_cache.or_else(original).unwrap_or(KvFormat::F32);
        let pages = |positions: usize| positions.div_ceil(PAGE_POSITIONS);
        let (sink, recent) = (self.kv_sink.map(pages), self.kv_recent.map(pages));
        match format.codes() {
            Some(codes) => Ok(format.with_window(
                sink.unwrap_or(codes.sink_pages),
                recent.unwrap_or(codes.recent_pages),
            )),
            None if sink.or(recent).is_some() => bail!(
                "--kv-sink and --kv-recent are what codes leave in f16: they need --kv-cache tq2 or \
                 another of its kind"
            ),
            None => Ok(format),
        }
    }

    /// What about these flags makes the output differ from the model's own, in words.
    pub fn lossy(&self, container: &Container) -> Vec<String> {
        let trained = container.shape().moe.top_k;
        let fewer = self.experts_per_token.filter(|&k| k < trained);
        let fewer = fewer
            .map(|k| format!("experts for each token: {k}, the model was trained with {trained}"));
        let coarse = self.fast.then(|| "--fast: activations in 8-bit integers".to_string());
        // Flags that contradict each other are an error elsewhere, before a model runs.
        let kept = self.kv_format().unwrap_or(KvFormat::F32);
        let kept = kept.loss().map(|loss| format!("--kv-cache {kept}: {loss}"));
        let stretched = self.yarn.map(|f| format!("--yarn: positions stretched {f} times"));
        fewer.into_iter().chain(coarse).chain(stretched).chain(kept).collect()
    }

    fn arithmetic(&self) -> Arithmetic {
        match (self.exact, self.fast) {
            (true, _) => Arithmetic::Exact,
            (_, true) => Arithmetic::Fast8,
            _ => Arithmetic::Fixed16,
        }
    }
}

impl HotSetArgs {
    /// Where the hot set of a model is kept, if it is.
    pub fn file(&self, container: &Container) -> Option<HotSetFile> {
        match &self.hot_set {
            HotSetChoice::Off => None,
            HotSetChoice::Auto => Some(HotSetFile::new(container.dir().join(hot_set::FILE_NAME))),
            HotSetChoice::File(path) => Some(HotSetFile::new(path.clone())),
        }
    }
}

impl FromStr for HotSetChoice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "off" => Self::Off,
            "auto" => Self::Auto,
            path => Self::File(path.into()),
        })
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "gpu" => Ok(Self::Gpu(None)),
            _ => match text.strip_prefix("gpu:").map(str::parse) {
                Some(Ok(number)) => Ok(Self::Gpu(Some(number))),
                _ => Err("expected auto, cpu, gpu or gpu:N".into()),
            },
        }
    }
}

impl IsaChoice {
    fn resolve(self) -> Result<Isa> {
        let name = match self {
            Self::Auto => return Ok(Isa::detect()),
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
        };
        let Some(isa) = Isa::parse(name) else {
            let has: Vec<&str> = Isa::available().map(Isa::name).collect();
            bail!("--isa {name}: this CPU has {}", has.join(", "));
        };
        Ok(isa)
    }
}

impl IoChoice {
    fn mode(self) -> IoMode {
        match self {
            Self::Auto => IoMode::Auto,
            Self::Direct => IoMode::Direct,
            Self::Buffered => IoMode::Buffered,
        }
    }
}

impl ReaderChoice {
    fn mode(self) -> Reader {
        match self {
            Self::Threads => Reader::Threads,
            Self::Uring => Reader::Uring,
        }
    }
}

impl LookaheadChoice {
    fn mode(self) -> Lookahead {
        match self {
            Self::Off => Lookahead::Off,
            Self::Router => Lookahead::Router,
            Self::Previous => Lookahead::Previous,
        }
    }
}

/// Cores that this process may run on; one where the system does not say.
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Parses a count of at least one.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n >= 1 => Ok(n),
        _ => Err("expected a whole number of at least 1".into()),
    }
}
