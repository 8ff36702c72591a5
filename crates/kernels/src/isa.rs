//! Which instructions this CPU has, as a value that cannot be made without them.
//!
//! Owns the detection and the one match by which an operation finds its variant. Refuses to name
//! an instruction set that is absent: `parse` gives none, so holding an `Isa` is the proof on which
//! every unsafe call of a variant rests.

use std::fmt;

/// An instruction set that this CPU has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Isa(pub(crate) Kind);

/// The variants that exist for the architecture of this build, the plainest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Scalar,
}

const KINDS: &[Kind] = &[Kind::Scalar];

impl Isa {
    /// The fastest that this CPU has.
    pub fn detect() -> Self {
        Self::available().last().unwrap_or(Self::scalar())
    }

    /// The specification, which runs everywhere.
    pub const fn scalar() -> Self {
        Self(Kind::Scalar)
    }

    /// Everything that this CPU has, the plainest first.
    pub fn available() -> impl Iterator<Item = Self> {
        KINDS.iter().copied().filter(|kind| kind.is_available()).map(Self)
    }

    /// The instruction set of that name, if this CPU has it.
    pub fn parse(name: &str) -> Option<Self> {
        Self::available().find(|isa| isa.name() == name)
    }

    /// `scalar`, `avx2`, `avx512` or `neon`.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
        }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Kind {
    fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
        }
    }
}

/// Calls the variant of an operation that the `Isa` stands for.
macro_rules! dispatch {
    ($isa:expr, $operation:ident($($argument:expr),*)) => {
        match $isa.0 {
            Kind::Scalar => crate::scalar::$operation($($argument),*),
        }
    };
}
pub(crate) use dispatch;
