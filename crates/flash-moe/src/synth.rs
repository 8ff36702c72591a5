//! x
use crate::options::convert::SynthArgs;
use anyhow::Result;
pub fn run(_args: &SynthArgs) -> Result<()> {
    anyhow::bail!("not here yet")
}
