//! The model that is served: engine, vocabulary, template, and what its makers said of sampling.
//!
//! Opened once, shared by every request and, but for the record of answers, never changed. Refuses a model without a tokenizer: a
//! server deals in text.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use flash_moe_engine::budget::{Budget, Demand};
use flash_moe_engine::chat_template::{CONFIG_FILE, ChatTemplate};
use flash_moe_engine::container::Container;
use flash_moe_engine::engine::{Engine, Options};
use flash_moe_engine::generation::GenerationConfig;
use flash_moe_engine::shape::TokenId;
use flash_moe_engine::tokenizer::Tokenizer;

use super::constrain::{BYTES_PER_TOKEN, Grammars};
use super::log;
use super::turns::Turns;
use crate::options::engine::EngineArgs;
use crate::options::serve::{AnswerArgs, PrefixArgs};

/// A model that is ready.
pub struct Model {
    /// The loaded weights.
    pub engine: Arc<Engine>,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text; `None` where the model has no template.
    pub template: Option<ChatTemplate>,
    /// Sampling where a request says nothing.
    pub config: GenerationConfig,
    /// Tokens that end a text.
    pub eos: Vec<TokenId>,
    /// Masks.
    pub grammars: Grammars,
    /// Its name in answers.
    pub name: String,
    /// When it was opened, in seconds since 1970.
    pub opened: u64,
    /// Tokens after which thinking is ended where a request says nothing; 0: never.
    pub think_budget: usize,
    /// Tokens of a prompt after which a checkpoint is kept, again and again; 0: none are.
    pub prefix_every: usize,
    /// Memory for checkpoints.
    pub prefix_bytes: PrefixBytes,
    /// Answers that were given, for conversations that repeat them.
    pub turns: Turns,
}

/// Memory for checkpoints, both part of the plan.
#[derive(Clone, Copy, Debug)]
pub struct PrefixBytes {
    /// Of those that are kept.
    pub kept: u64,
    /// Of those that wait to be written to disk.
    pub waiting: u64,
}

impl PrefixBytes {
    /// Whether states of so many bytes may wait together: within their bound, or one that waits `alone`
    /// within that of all, since those that are kept then make room for it.
    pub fn may_wait(self, bytes: u64, alone: bool) -> bool {
        bytes <= self.waiting + if alone { self.kept } else { 0 }
    }
}

/// Most memory for checkpoints where nobody says.
const PREFIX_BYTES_MAX: u64 = 2 << 30;
/// Memory of those that wait to be written is a quarter of the others', but not less.
const WAITING_BYTES_MIN: u64 = 64 << 20;

impl Model {
    /// Opens the model that the flags name, with memory for so many texts at once.
    ///
    /// # Errors
    /// What the container, the tokenizer, the template or the memory plan have to say.
    pub fn open(
        engine: &EngineArgs,
        answer: &AnswerArgs,
        prefix: &PrefixArgs,
        sessions: usize,
    ) -> Result<Self> {
        let model = engine.open()?;
        let dir = model.container.dir().to_path_buf();
        let mut options = engine.engine_options(&model, answer.context)?;
        for note in engine.lossy(&model.container) {
            log::note(&format!("note: lossy: {note}"));
        }
        let Some(tokenizer) = model.tokenizer else {
            bail!("{} has no tokenizer.json; conversations need one", dir.display());
        };
        let template = template(answer, &dir)?;
        let config = GenerationConfig::open(&dir)?;
        let eos = config.eos(model.container.shape());
        let grammars = Grammars::new(&tokenizer, &eos)?;
        options.sessions = sessions;
        options.other_bytes += tokenizer.count() as u64 * BYTES_PER_TOKEN;
        let prefix_bytes = prefix_bytes(prefix, &model.container, &options)?;
        options.kept_bytes = prefix_bytes.kept + prefix_bytes.waiting;
        let name = answer.alias.clone();
        let name = name.unwrap_or_else(|| model.container.manifest().name.clone());
        let opened = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let engine = Arc::new(Engine::open(model.container, &options)?);
        if let Some(gpu) = engine.gpu() {
            log::note(&format!("note: computing on {}", gpu.budget().adapter));
        }
        Ok(Self {
            engine,
            tokenizer,
            template,
            config,
            eos,
            grammars,
            name,
            opened,
            think_budget: answer.think_budget,
            prefix_every: prefix.prefix_every,
            prefix_bytes,
            turns: Turns::default(),
        })
    }
}

/// The bound of the flag, or a part of the memory that leaves the pool more than its floor.
fn prefix_bytes(
    args: &PrefixArgs,
    container: &Container,
    options: &Options,
) -> Result<PrefixBytes> {
    let waiting = |kept: u64| match args.state_dir {
        Some(_) => (kept / 4).max(WAITING_BYTES_MIN),
        None => 0,
    };
    if let Some(kept) = args.prefix_memory {
        return Ok(PrefixBytes { kept, waiting: waiting(kept) });
    }
    let plain = Budget::sized(&Demand::of(container), options)?;
    let spare = plain.limit.saturating_sub(plain.smallest());
    let kept = (plain.limit / 8).min(spare / 2).min(PREFIX_BYTES_MAX);
    Ok(PrefixBytes { kept, waiting: waiting(kept).min(spare / 2) })
}

/// The template of the flag, or the model's; none is a note, since completions need none.
fn template(args: &AnswerArgs, dir: &std::path::Path) -> Result<Option<ChatTemplate>> {
    if let Some(path) = &args.chat_template {
        let named = || path.display().to_string();
        let source = std::fs::read_to_string(path).with_context(named)?;
        let config = std::fs::read_to_string(dir.join(CONFIG_FILE)).unwrap_or("null".into());
        let config = serde_json::from_str(&config).context(CONFIG_FILE)?;
        return Ok(Some(ChatTemplate::new(source, &config).with_context(named)?));
    }
    match ChatTemplate::open(dir) {
        Ok(template) => Ok(Some(template)),
        Err(error) => {
            log::note(&format!("note: no conversations, completions alone: {error}"));
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_state_waits_beyond_the_memory_of_all() {
        let bounds = PrefixBytes { kept: 8, waiting: 2 };
        for (bytes, alone, may) in
            [(2, false, true), (3, false, false), (10, true, true), (11, true, false)]
        {
            assert_eq!(bounds.may_wait(bytes, alone), may, "{bytes} {alone}");
        }
        assert!(!PrefixBytes { kept: 0, waiting: 2 }.may_wait(3, true));
    }
}
