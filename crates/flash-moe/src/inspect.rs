//! x
use crate::options::convert::InspectArgs;
use anyhow::Result;
pub fn run(_args: &InspectArgs) -> Result<()> {
    anyhow::bail!("not here yet")
}
