//! Guesses at the next layer's experts, so that the disk is busy while a layer computes.
//!
//! `Router` applies the next layer's own norm and router to the residual stream as it is before this
//! layer's experts are added: the stream changes slowly, so most of the choice is already decided.
//! `Previous` guesses the experts that the last token used there. A guess only brings records in; it
//! never changes what is computed.

use crate::compute::{Compute, Temporary, sized};
use crate::layer::router::{Choice, Routes, route};
use crate::shape::{ExpertId, LayerId};
use crate::store::ExpertStore;
use crate::weights::MoeWeights;

/// How the next layer's experts are guessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookahead {
    /// Not at all.
    Off,
    /// By the next layer's own router.
    Router,
    /// The last token's experts.
    Previous,
}

impl Lookahead {
    /// The name of the flag's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Router => "router",
            Self::Previous => "previous",
        }
    }
}

/// The layer after the one that computes.
pub struct NextLayer<'a> {
    /// Which it is.
    pub layer: LayerId,
    /// Its norm before the router, `[hidden]`.
    pub norm: &'a [f32],
    /// Its router.
    pub weights: &'a MoeWeights,
    /// What the last token used there.
    pub previous: &'a [ExpertId],
    /// The residual stream, `[hidden]`.
    pub h: &'a [f32],
}

/// Buffers of a guess.
#[derive(Default)]
pub struct LookaheadScratch {
    x: Vec<f32>, // [hidden]
    routes: Routes,
}

/// Asks the store for the guessed experts.
pub fn look_ahead(
    compute: &Compute,
    store: &ExpertStore,
    (how, choice, eps): (Lookahead, Choice, f32),
    next: &NextLayer,
    scratch: &mut LookaheadScratch,
    tmp: &mut Temporary,
) {
    match how {
        Lookahead::Off => {}
        Lookahead::Previous => store.guess(next.layer, next.previous),
        Lookahead::Router => {
            let x = sized(&mut scratch.x, next.h.len());
            compute.norm(next.h, next.norm, eps, x);
            route(compute, &next.weights.router, choice, x, &mut scratch.routes, tmp);
            store.guess(next.layer, &scratch.routes.experts);
        }
    }
}
