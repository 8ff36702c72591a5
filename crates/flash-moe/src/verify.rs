//! x
use crate::options::convert::VerifyArgs;
use anyhow::Result;
pub fn run(_args: &VerifyArgs) -> Result<()> {
    anyhow::bail!("not here yet")
}
