//! `flash-moe run`: one prompt, one answer.
//!
//! The answer is the only thing on standard output. Everything that can be refused is refused before
//! the weights are read: flags, prompt, sampling, memory, context, the trace file.

mod answer;
mod generate;
mod interrupt;
mod prompt;
pub mod report;
mod thinking;
mod trace;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flash_moe_engine::budget::{Budget, gib};
use flash_moe_engine::engine::Engine;
use flash_moe_engine::generation::GenerationConfig;
use flash_moe_engine::gpu::{Gpu, GpuCounters};
use flash_moe_engine::sampler::{Sampler, Sampling};
use flash_moe_engine::session::Session;
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::store::StoreCounters;
use flash_moe_engine::timing::Timing;
use flash_moe_engine::tokenizer::Tokenizer;
use indicatif::{ProgressBar, ProgressStyle};

use crate::hot_set::HotSetFile;
use crate::options::environment;
use crate::options::run::RunArgs;
use crate::say::tell;
use crate::state_file::{NewState, SavedState};
use crate::video::Video;
use answer::{Answer, Show};
use generate::{Finish, Limits, generate, prefill};
use interrupt::Interrupt;
use report::{Counters, Report, Settings, Timings, ms, rate};
use thinking::Thinking;
use trace::TraceFile;

/// A run that is about to start.
struct Run<'a> {
    args: &'a RunArgs,
    engine: Arc<Engine>,
    hot_set: Option<HotSetFile>,
    tokenizer: Option<Tokenizer>,
    state: Option<SavedState>,
    new_state: Option<NewState>,
    prompt: Vec<TokenId>,
    sampling: Sampling,
    eos: Vec<TokenId>,
    interrupt: Interrupt,
    loaded: Duration,
    start: usize, // position at which the prompt begins
}

/// What came of it.
struct Outcome {
    tokens: Vec<TokenId>,
    finish: Finish,
    text: String,
    thinking: String,
    prefill_time: Duration,
    first_token: Duration, // since the start of the prefill
    whole: Duration,       // prefill and decode
    prefill_reads: StoreCounters,
    prefill_uploads: Option<GpuCounters>,
    prefill_timing: Timing,
}

/// Runs the command.
///
/// # Errors
/// Whatever the flags, the prompt, the model or the engine have to say.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    let trace = trace_file(args)?;
    let mut run = Run::prepare(args)?;
    let mut session = Session::new(&run.engine);
    if let Some(state) = run.state.take() {
        session.adopt(state.load(&run.engine)?)?;
    }
    run.start = session.position();
    if trace.is_some() {
        session.record();
    }
    let outcome = run.answer(&mut session)?;
    if let Some(trace) = trace {
        trace.write(session.take_trace(), &run.prompt, &outcome.tokens)?;
    }
    let answer = outcome.tokens.clone();
    let status = run.tell(&session, outcome)?;
    if let Some(file) = run.new_state.take() {
        run.keep(&mut session, &answer, file)?;
    }
    run.hot_set.iter().for_each(|file| file.save(&run.engine));
    Ok(status)
}

impl<'a> Run<'a> {
    fn prepare(args: &'a RunArgs) -> Result<Self> {
        let started = Instant::now();
        let model = args.engine.open()?;
        let config = GenerationConfig::open(model.container.dir())?;
        let sampling = args.sampling.resolve(&config)?;
        if model.tokenizer.is_none() && !args.length.stop.is_empty() {
            bail!("--stop needs a model with a tokenizer.json");
        }
        let prompt = prompt::read(args, &model)?;
        let mut options = args.engine.engine_options(&model, args.length.context)?;
        options.gpu.iter_mut().for_each(|gpu| gpu.timed = args.output.timing);
        let budget = Budget::plan(&model.container, &options)?;
        let open = |path: &PathBuf| SavedState::open(path, &model.container, &options);
        let state = args.state.load_state.as_ref().map(open).transpose()?;
        let before = state.as_ref().map_or(0, SavedState::position);
        let most = model.container.shape().max_positions;
        check_length((before, prompt.tokens.len()), &budget, most)?;
        let create = |path: &PathBuf| NewState::create(path);
        let new_state = args.state.save_state.as_ref().map(create).transpose()?;
        let lossy = args.engine.lossy(&model.container).into_iter().map(|l| format!("lossy: {l}"));
        for note in lossy.chain(prompt.notes) {
            tell!("flash-moe: note: {note}");
        }
        let eos = config.eos(model.container.shape());
        let eos = if args.length.ignore_eos { Vec::new() } else { eos };
        let interrupt = Interrupt::install()?;
        let spinner = spinner(args, &model.container.manifest().name, &budget);
        let engine = Arc::new(Engine::open(model.container, &options)?);
        spinner.finish_and_clear();
        let hot_set = args.hot_set.file(engine.container());
        hot_set.iter().for_each(|file| file.load(&engine));
        if let Some(gpu) = engine.gpu() {
            tell!("flash-moe: note: computing on {}", gpu.budget().adapter);
        }
        if args.output.timing {
            tell!("memory plan\n{}", engine.budget());
            engine.gpu().iter().for_each(|gpu| tell!("video memory plan\n{}", gpu.budget()));
            let streams = engine.gpu().filter(|gpu| !gpu.budget().resident);
            streams.iter().for_each(|gpu| tell!("{}", gpu.misses()));
        }
        Ok(Self {
            args,
            engine,
            hot_set,
            tokenizer: model.tokenizer,
            state,
            new_state,
            prompt: prompt.tokens,
            sampling,
            eos,
            interrupt,
            loaded: started.elapsed(),
            start: 0,
        })
    }

    /// Prefill and decode, the text on standard output as it comes.
    fn answer(&self, session: &mut Session) -> Result<Outcome> {
        let length = &self.args.length;
        let tokenizer = self.tokenizer.as_ref();
        let started = Instant::now();
        let bar = prefill_bar(self.args, self.prompt.len(), self.engine.options().prefill_chunk);
        let progress = |done| bar.set_position(done as u64);
        let whole = prefill(session, &self.prompt, &self.interrupt, progress)?;
        bar.finish_and_clear();
        let prefill_time = started.elapsed();
        let prefill_reads = self.engine.store().counters();
        let prefill_uploads = self.engine.gpu().map(Gpu::counters);
        let prefill_timing = session.timing().clone();
        session.mark("prefill")?;
        let mut thinking = Thinking::after(session.tokens(), tokenizer, length.think_budget);
        let mut sampler = Sampler::new(self.sampling.clone(), session.tokens())?;

        let mut answer = Answer::new(io::stdout().lock(), show(self.args), tokenizer, &length.stop);
        let limits =
            Limits { eos: &self.eos, max_tokens: length.max_tokens, interrupt: &self.interrupt };
        let mut first_token = prefill_time;
        let (tokens, finish) = match whole {
            true => generate(session, &mut sampler, &mut thinking, &mut answer, &limits, || {
                first_token = started.elapsed();
            })?,
            false => (Vec::new(), Finish::Interrupted),
        };
        if session.position() > self.end_of_prompt() {
            session.mark("decode")?;
        }
        let (text, thinking) = answer.finish(thinking.is_inside()).context("standard output")?;
        let whole = started.elapsed();
        Ok(Outcome {
            tokens,
            finish,
            text,
            thinking,
            prefill_time,
            first_token,
            whole,
            prefill_reads,
            prefill_uploads,
            prefill_timing,
        })
    }

    /// Position at which the answer begins.
    fn end_of_prompt(&self) -> usize {
        self.start + self.prompt.len()
    }

    /// Writes the state of prompt and answer. The last token of the answer was shown and need not
    /// have been taken, since nothing followed it.
    fn keep(&self, session: &mut Session, answer: &[TokenId], file: NewState) -> Result<()> {
        if session.position() < self.end_of_prompt() {
            tell!("flash-moe: note: no state saved: the prompt was interrupted");
            return file.discard();
        }
        let is_full = session.position() == self.engine.context();
        match answer.last() {
            Some(_) if session.position() == self.end_of_prompt() + answer.len() => {}
            Some(_) if is_full => {
                let what = "the context is full: the answer's last token is not in the state";
                tell!("flash-moe: note: {what}");
            }
            Some(&last) => session.step(last)?,
            None => {}
        }
        file.write(|to| session.write_state(to))
    }

    /// Prints what was asked for beside the answer.
    fn tell(&self, session: &Session, outcome: Outcome) -> Result<ExitCode> {
        let finish = outcome.finish;
        let decode_timing = session.timing().since(&outcome.prefill_timing);
        if self.args.output.timing {
            let decoded = session.position().saturating_sub(self.end_of_prompt());
            let prompt = self.prompt.len();
            tell!("{}", report::timing_table("prefill", &outcome.prefill_timing, prompt));
            tell!("{}", report::timing_table("decode", &decode_timing, decoded));
        }
        let report = self.report(session, outcome, &decode_timing);
        if let (true, Some(video)) = (self.args.output.timing, &report.video_memory) {
            tell!("{}", video.line(session.position().saturating_sub(self.end_of_prompt())));
        }
        if !self.args.output.quiet {
            tell!("{}", report.summary());
        }
        if self.args.output.json {
            let mut out = io::stdout().lock();
            serde_json::to_writer_pretty(&mut out, &report).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        Ok(match finish {
            Finish::Interrupted => ExitCode::from(interrupt::EXIT_STATUS),
            _ => ExitCode::SUCCESS,
        })
    }

    fn report(&self, session: &Session, outcome: Outcome, decode_timing: &Timing) -> Report {
        let engine = &self.engine;
        let ids = |tokens: &[TokenId]| tokens.iter().map(|t| t.0).collect::<Vec<u32>>();
        let decoded = session.position().saturating_sub(self.end_of_prompt());
        let decode_time = outcome.whole - outcome.first_token;
        Report {
            model: engine.container().manifest().name.clone(),
            state_tokens: self.start,
            prompt_tokens: ids(&self.prompt),
            generated_tokens: ids(&outcome.tokens),
            finish_reason: outcome.finish,
            text: outcome.text,
            thinking: outcome.thinking,
            timings: Timings {
                load_ms: ms(self.loaded),
                prefill_ms: ms(outcome.prefill_time),
                ttft_ms: ms(outcome.first_token),
                decode_ms: ms(decode_time),
            },
            prefill_tokens_per_second: rate(self.prompt.len(), outcome.prefill_time),
            decode_tokens_per_second: rate(decoded, decode_time),
            counters: Counters::new(outcome.prefill_reads, engine.store().counters(), decoded),
            video_memory: (engine.gpu().zip(outcome.prefill_uploads))
                .map(|(gpu, prefill)| Video::new(gpu, prefill)),
            peak_memory_bytes: report::peak_memory(),
            stages: serde_json::json!({
                "prefill": report::stages(&outcome.prefill_timing),
                "decode": report::stages(decode_timing),
            }),
            settings: self.settings(),
            lossy: self.args.engine.lossy(engine.container()),
        }
    }

    fn settings(&self) -> Settings {
        let (engine, options) = (&self.engine, self.engine.options());
        Settings {
            sampling: report::sampling(&self.sampling),
            device: engine.gpu().map_or("cpu".into(), |gpu| gpu.budget().adapter.clone()),
            experts_in_video_memory: engine.gpu().map(|gpu| gpu.budget().slots_each),
            threads: options.threads,
            isa: options.isa.name(),
            activations: engine.options().arithmetic.name(),
            kv_cache: options.kv_cache.to_string(),
            io: engine.store().choice().name(),
            io_why: engine.store().choice().why.clone(),
            readers: options.readers,
            lookahead: options.lookahead.name(),
            hot_set: self.hot_set.as_ref().map(|file| file.path().display().to_string()),
            reader: engine.store().reader().name(),
            memory_bytes: engine.budget().limit,
            cached_experts: engine.budget().slots,
            context: engine.context(),
            prefill_chunk: options.prefill_chunk,
            experts_per_token: engine.top_k(),
            max_tokens: self.args.length.max_tokens,
            think_budget: self.args.length.think_budget,
        }
    }
}

fn trace_file(args: &RunArgs) -> Result<Option<TraceFile>> {
    let Some(path) = &args.output.trace else { return Ok(None) };
    if !args.prompt.raw && args.prompt.prompt_tokens.is_none() {
        bail!("--trace needs --raw or --prompt-tokens, so that the tokens are the ones you gave");
    }
    TraceFile::create(path).map(Some)
}

fn check_length(
    (before, tokens): (usize, usize),
    budget: &Budget,
    max_positions: usize,
) -> Result<()> {
    let context = budget.context;
    if before + tokens <= context {
        return Ok(());
    }
    let advice = match before + tokens <= max_positions {
        true => format!("; raise --context, up to {max_positions}"),
        false if context == max_positions => ", which is all this model takes".into(),
        false => format!("; this model takes at most {max_positions}"),
    };
    let state = if before > 0 { format!("the state has {before} tokens, ") } else { String::new() };
    bail!("{state}the prompt has {tokens} tokens, the context holds {context}{advice}");
}

fn show(args: &RunArgs) -> Show {
    match (args.output.json, args.output.quiet) {
        (true, _) => Show::Nothing,
        (_, true) => Show::Answer,
        _ if environment::may_style() => Show::Dimmed,
        _ => Show::Tagged,
    }
}

/// Whether a person watches who wants to see progress.
fn is_watched(args: &RunArgs) -> bool {
    !args.output.quiet && environment::errors_are_seen()
}

fn spinner(args: &RunArgs, name: &str, budget: &Budget) -> ProgressBar {
    if !is_watched(args) {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner();
    spinner.set_message(format!("loading {name}: {}", gib(budget.fixed_bytes())));
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// A bar that moves with each chunk, or a sign of life while there is only one.
fn prefill_bar(args: &RunArgs, tokens: usize, chunk: usize) -> ProgressBar {
    if !is_watched(args) {
        return ProgressBar::hidden();
    }
    let style = match tokens > chunk {
        true => "reading the prompt {bar:30} {pos}/{len} tokens, {per_sec}, {eta} left",
        false => "{spinner} reading the prompt, {len} tokens",
    };
    let style = ProgressStyle::with_template(style).expect("a constant template");
    let bar = ProgressBar::new(tokens as u64).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
