//! A session whose blocks a GPU computes.
//!
//! The memories are on the device from the first token on, in a timeline of its own; a checkpoint, a
//! state file and a trace see the CPU's form of them, copied here. What the CPU still does for a token
//! is to unpack its embedding, to form its rotation and to look at what came out.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use super::{Memory, Session, Wanted};
use crate::compute::all_finite;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::gpu::{ChunkInput, Gpu, Logits, Token};
use crate::shape::TokenId;
use crate::timing::Stage;
use crate::trace::Recorder;

impl Session {
    /// As `forward`, on the device.
    pub(super) fn forward_on_device(
        &mut self,
        tokens: &[TokenId],
        mut wanted: Wanted,
    ) -> Result<()> {
        let engine = Arc::clone(&self.engine);
        let gpu = engine.gpu.as_ref().expect("asked for where a GPU computes");
        self.go_to(gpu)?;
        if let [token] = tokens {
            return self.token_on_device(&engine, gpu, *token, &mut wanted);
        }
        let pieces = tokens.chunks(gpu.chunk_tokens()).len();
        for (i, piece) in tokens.chunks(gpu.chunk_tokens()).enumerate() {
            if self.is_given_up() {
                return Err(Error::Stopped);
            }
            let mut more = Wanted::No;
            let is_last = i + 1 == pieces;
            let wants = matches!(wanted, Wanted::Every(_)) || is_last;
            self.chunk_on_device(&engine, gpu, piece, if wants { &mut wanted } else { &mut more })?;
        }
        Ok(())
    }

    /// Unpacks embeddings and forms rotations: what the device is given.
    fn embed_for_device(&mut self, engine: &Engine, tokens: &[TokenId]) {
        let started = Instant::now();
        let first = self.position();
        let hidden = engine.shape().hidden;
        let s = &mut self.scratch;
        s.h.resize(tokens.len() * hidden, 0.0);
        for (token, h) in tokens.iter().zip(s.h.chunks_exact_mut(hidden)) {
            engine.compute.isa.unpack_row(&engine.weights.embed.rows(), token.0 as usize, h);
        }
        s.rotation.fill(&engine.shape().attention, first..first + tokens.len());
        if let Some(recorder) = &mut self.recorder {
            recorder.floats("embed", None, hidden, &s.h);
        }
        self.timing.add(Stage::Embed, started, 0);
    }

    fn token_on_device(
        &mut self,
        engine: &Engine,
        gpu: &Gpu,
        token: TokenId,
        wanted: &mut Wanted,
    ) -> Result<()> {
        self.embed_for_device(engine, &[token]);
        let logits = self.recorder.is_some() || !matches!(wanted, Wanted::No);
        let s = &self.scratch;
        let (cos, sin) = s.rotation.tables();
        let timeline = self.timeline.as_ref().expect("the memories are on the device");
        let input = Token { h: &s.h, cos, sin, position: self.tokens.len() };
        let into = if logits { Logits::Into(&mut self.logits) } else { Logits::No };
        match &mut self.recorder {
            None => gpu.step(&engine.host(), timeline, &input, into, None)?,
            Some(recorder) => {
                let mut watch = watch(recorder, engine);
                gpu.step(&engine.host(), timeline, &input, into, Some(&mut watch))?;
            }
        }
        self.tokens.push(token);
        gpu.time(&mut self.timing)?;
        let h = if logits && self.recorder.is_none() { Vec::new() } else { gpu.hidden()? };
        self.look_at(engine, &h)?;
        self.give_logits(engine, wanted, 1)
    }

    fn chunk_on_device(
        &mut self,
        engine: &Engine,
        gpu: &Gpu,
        tokens: &[TokenId],
        wanted: &mut Wanted,
    ) -> Result<()> {
        self.embed_for_device(engine, tokens);
        let s = &self.scratch;
        let (cos, sin) = s.rotation.tables();
        let timeline = self.timeline.as_ref().expect("the memories are on the device");
        let input = ChunkInput { h: &s.h, cos, sin, position: self.tokens.len() };
        let mut rows = vec![0.0; s.h.len()];
        match &mut self.recorder {
            None => gpu.chunk(&engine.host(), timeline, &input, &mut rows, None)?,
            Some(recorder) => {
                let mut watch = watch(recorder, engine);
                gpu.chunk(&engine.host(), timeline, &input, &mut rows, Some(&mut watch))?;
            }
        }
        self.tokens.extend_from_slice(tokens);
        gpu.time(&mut self.timing)?;
        self.look_at(engine, &rows)?;
        let hidden = engine.shape().hidden;
        let first = match wanted {
            Wanted::Every(_) => 0,
            _ if self.recorder.is_some() => 0,
            Wanted::Last => tokens.len() - 1,
            Wanted::No => tokens.len(),
        };
        for (i, row) in rows.chunks_exact(hidden).enumerate().skip(first) {
            gpu.logits(row, &mut self.logits)?;
            gpu.time(&mut self.timing)?;
            self.give_logits(engine, wanted, tokens.len() - i)?;
        }
        Ok(())
    }

    /// Refuses rows of the residual stream that are not finite, and records their norm.
    fn look_at(&mut self, engine: &Engine, rows: &[f32]) -> Result<()> {
        if !all_finite(rows) {
            return Err(self.not_finite());
        }
        if let Some(recorder) = &mut self.recorder {
            let x = &mut self.scratch.x;
            x.resize(rows.len(), 0.0);
            engine.compute.norm(rows, &engine.weights.norm, engine.shape().rms_eps, x);
            recorder.floats("final_norm", None, engine.shape().hidden, x);
        }
        Ok(())
    }

    /// Hands over the logits of the token that is `back` from the end.
    fn give_logits(&mut self, engine: &Engine, wanted: &mut Wanted, back: usize) -> Result<()> {
        if matches!(wanted, Wanted::No) && self.recorder.is_none() {
            return Ok(());
        }
        if !all_finite(&self.logits) {
            return Err(self.not_finite());
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.floats("logits", None, self.logits.len(), &self.logits);
        }
        self.logits[engine.vocabulary()..].fill(f32::NEG_INFINITY);
        if let Wanted::Every(sink) = wanted {
            sink(self.position() - back, &self.logits);
        }
        Ok(())
    }

    /// Brings the memories to the device, where they are not there.
    pub(super) fn go_to(&mut self, gpu: &Gpu) -> Result<()> {
        if self.timeline.is_some() {
            return Ok(());
        }
        let timeline = gpu.timeline(self.engine.context())?;
        self.timeline = Some(timeline);
        let memories = std::mem::replace(&mut self.memories, Memory::all(&self.engine, 0));
        if self.position() > 0 {
            self.upload(gpu, &memories, self.position())?;
        }
        Ok(())
    }

    fn upload(&self, gpu: &Gpu, memories: &[Memory], position: usize) -> Result<()> {
        let timeline = self.timeline.as_ref().expect("the memories are on the device");
        for (layer, memory) in memories.iter().enumerate() {
            let mut parts = Vec::new();
            memory.each_part(&mut |bytes| -> Result<()> {
                parts.push(bytes.to_vec());
                Ok(())
            })?;
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            gpu.upload(timeline, layer, position, &parts)?;
        }
        Ok(())
    }

    /// What is remembered, in the CPU's form.
    pub(super) fn remembered(&self) -> Result<Cow<'_, [Memory]>> {
        let (Some(gpu), Some(timeline)) = (&self.engine.gpu, &self.timeline) else {
            return Ok(Cow::Borrowed(&self.memories));
        };
        let mut memories = Memory::all(&self.engine, self.position());
        for (layer, memory) in memories.iter_mut().enumerate() {
            let mut parts = Vec::new();
            memory.each_part(&mut |bytes| -> Result<()> {
                parts.push(vec![0; bytes.len()]);
                Ok(())
            })?;
            let mut whole: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
            gpu.download(timeline, layer, self.position(), &mut whole)?;
            let mut parts = parts.iter();
            memory.each_part_mut(&mut |bytes| -> Result<()> {
                bytes.copy_from_slice(parts.next().expect("as many parts as before"));
                Ok(())
            })?;
        }
        Ok(Cow::Owned(memories))
    }

    /// Brings the memories back here, if they are on a device.
    pub(super) fn bring_home(&mut self) -> Result<()> {
        if self.timeline.is_some() {
            self.memories = self.remembered()?.into_owned();
            self.timeline = None;
        }
        Ok(())
    }

    /// Remembers something else, of so many tokens.
    pub(super) fn replace(&mut self, memories: Vec<Memory>, position: usize) -> Result<()> {
        match (&self.engine.gpu, &self.timeline) {
            (Some(gpu), Some(_)) => self.upload(gpu, &memories, position),
            _ => {
                self.memories = memories;
                Ok(())
            }
        }
    }
}

/// Files what the device tells of.
fn watch<'a>(
    recorder: &'a mut Recorder,
    engine: &Engine,
) -> impl FnMut(&'static str, Option<usize>, &[f32]) + 'a {
    let (hidden, experts, top_k) =
        (engine.shape().hidden, engine.shape().moe.experts, engine.top_k());
    move |name, layer, values| match name {
        "router_indices" => {
            recorder.ids(name, layer, top_k, values.iter().map(|v| v.to_bits() as i32));
        }
        "router_weights" => recorder.floats(name, layer, top_k, values),
        "router_logits" => recorder.floats(name, layer, experts, values),
        _ => recorder.floats(name, layer, hidden, values),
    }
}
