//! `flash-moe devices`: the GPUs of this machine, as `--device gpu:N` counts them.
//!
//! Lists what the engine sees and says what to install where it sees nothing. Opens no device, so it can
//! do no harm.

use anyhow::Result;
use flash_moe_engine::gpu;

use crate::say;

/// Runs the command.
///
/// # Errors
/// Standard output takes no more.
pub fn run() -> Result<()> {
    let adapters = gpu::adapters();
    if adapters.is_empty() {
        return say::line(gpu::NO_ADAPTER);
    }
    for (i, adapter) in adapters.iter().enumerate() {
        say::line(&format!("gpu:{i}  {adapter}"))?;
    }
    Ok(())
}
