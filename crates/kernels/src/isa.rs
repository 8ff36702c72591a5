//! Which instructions this CPU has, as a value that cannot be made without them.
//!
//! Owns the detection and the one match by which an operation finds its variant. Refuses to name
//! an instruction set that is absent: `parse` gives none, so holding an `Isa` is the proof on which
//! every unsafe call of a variant rests.

use std::fmt;

/// An instruction set that this CPU has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Isa(pub(crate) Kind);

/// The variants that exist for the architecture of this build.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

/// The plainest first.
const KINDS: &[Kind] = &[
    Kind::Scalar,
    #[cfg(target_arch = "x86_64")]
    Kind::Avx2,
    #[cfg(target_arch = "x86_64")]
    Kind::Avx512,
    #[cfg(target_arch = "x86_64")]
    Kind::Avx512Vnni,
    #[cfg(target_arch = "aarch64")]
    Kind::Neon,
    #[cfg(target_arch = "aarch64")]
    Kind::NeonDot,
];

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

    /// `scalar`, `avx2`, `avx512`, `avx512vnni`, `neon` or `neondot`.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot => "neondot",
        }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Kind {
    /// Asks for exactly the features that the variant's file enables.
    fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => {
                Self::Neon.is_available() && std::arch::is_aarch64_feature_detected!("dotprod")
            }
        }
    }
}

/// Calls the variant of an operation that the `Isa` stands for. Dot-product instructions take part
/// in nothing but the operations of `fixed`.
macro_rules! dispatch {
    ($isa:expr, $operation:ident($($argument:expr),*)) => {
        match $isa.0 {
            Kind::Scalar => crate::scalar::$operation($($argument),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this kind exists only if `is_available` found its features.
            Kind::Avx2 => unsafe { crate::avx2::$operation($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this kind exists only if `is_available` found its features.
            Kind::Avx512 | Kind::Avx512Vnni => unsafe {
                crate::avx512::$operation($($argument),*)
            },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: an `Isa` of this kind exists only if `is_available` found its features.
            Kind::Neon | Kind::NeonDot => unsafe { crate::neon::$operation($($argument),*) },
        }
    };
}
pub(crate) use dispatch;

/// Calls the variant of an operation of `fixed` that the `Isa` stands for.
macro_rules! dispatch_fixed {
    ($isa:expr, $operation:ident($($argument:expr),*)) => {
        match $isa.0 {
            Kind::Scalar => crate::fixed::scalar::$operation($($argument),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this kind exists only if `is_available` found its features.
            Kind::Avx2 => unsafe { crate::fixed::avx2::$operation($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this kind exists only if `is_available` found its features.
            Kind::Avx512 => unsafe { crate::fixed::avx512::$operation($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this kind exists only if `is_available` found its features.
            Kind::Avx512Vnni => unsafe { crate::fixed::vnni::$operation($($argument),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: an `Isa` of this kind exists only if `is_available` found its features.
            Kind::Neon => unsafe { crate::fixed::neon::$operation($($argument),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: an `Isa` of this kind exists only if `is_available` found its features.
            Kind::NeonDot => unsafe { crate::fixed::neon_dot::$operation($($argument),*) },
        }
    };
}
pub(crate) use dispatch_fixed;
