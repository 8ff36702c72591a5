//! A checkpoint as a stream of bytes: one file that a later process continues from.
//!
//! Owns the layout: magic, version, a header of JSON with its own checksum, then tokens, logits and
//! what each layer remembers, as they lie in memory, and a checksum of everything before it. The
//! header says whose state it is, so a foreign one is refused before memory is taken for it. Nothing
//! is held twice: bytes go from and to the pages themselves. Refuses every byte it does not expect.

use std::io::{ErrorKind, Read, Write};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::{Checkpoint, Identity, Memory, Session};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::shape::TokenId;

const MAGIC: [u8; 8] = *b"FMSTATE\n";
/// Version of the layout that this build reads and writes.
const VERSION: u32 = 1;
/// No header of ours is longer, in bytes.
const HEADER_BYTES_MAX: u32 = 64 << 10;
const AGAIN: &str = "make it again with --save-state";

#[derive(Serialize, Deserialize)]
struct Header {
    identity: Identity,
    position: usize,
}

/// A state whose header has been read and is sound; the rest follows in the stream.
pub struct StateReader<R> {
    from: Hashed<R>,
    header: Header,
}

impl<R: Read> StateReader<R> {
    /// Reads the header. `from` should be buffered.
    ///
    /// # Errors
    /// Not a state, of another version, damaged, or reading failed.
    pub fn new(from: R) -> Result<Self> {
        let mut from = Hashed::new(from);
        let mut magic = [0; MAGIC.len()];
        from.read(&mut magic)?;
        if magic != MAGIC {
            return Err(Error::State("this is no file of --save-state".into()));
        }
        let version = u32::from_le_bytes(from.array()?);
        if version != VERSION {
            return Err(Error::StateVersion { found: version, known: VERSION });
        }
        let length = u32::from_le_bytes(from.array()?);
        if length > HEADER_BYTES_MAX {
            return Err(damaged("the header"));
        }
        let mut text = vec![0; length as usize];
        from.read(&mut text)?;
        if u64::from_le_bytes(from.array()?) != xxh3_64(&text) {
            return Err(damaged("the header"));
        }
        let header = serde_json::from_slice(&text).map_err(|_| damaged("the header"))?;
        Ok(Self { from, header })
    }

    /// Tokens that the state has taken.
    pub fn position(&self) -> usize {
        self.header.position
    }

    /// What decides whether an engine may continue it.
    pub fn identity(&self) -> &Identity {
        &self.header.identity
    }

    /// Reads the tokens that the state has taken and nothing else. They are as the file has them: only
    /// [`StateReader::read`] reaches the checksum that covers them.
    ///
    /// # Errors
    /// The file is cut off; reading failed.
    pub fn tokens(mut self) -> Result<Vec<TokenId>> {
        self.take_tokens()
    }

    fn take_tokens(&mut self) -> Result<Vec<TokenId>> {
        let mut tokens = Vec::new();
        for _ in 0..self.header.position {
            tokens.push(TokenId(u32::from_le_bytes(self.from.array()?)));
        }
        Ok(tokens)
    }

    /// Reads the rest, for an engine that may continue it.
    ///
    /// # Errors
    /// The state belongs to another model or other settings, does not fit the context, is cut off,
    /// damaged or followed by something; reading failed.
    pub fn read(mut self, engine: &Engine) -> Result<Checkpoint> {
        self.header.identity.check(engine.container(), engine.options())?;
        let position = self.header.position;
        Checkpoint::check_length(position, engine.context())?;
        let tokens = self.take_tokens()?;
        let mut logits = vec![0f32; engine.shape().vocab];
        self.from.read(bytemuck::cast_slice_mut(&mut logits))?;
        let mut memories = Memory::all(engine, position);
        for memory in &mut memories {
            memory.each_part_mut(&mut |bytes| self.from.read(bytes))?;
        }
        let found = self.from.hash.digest();
        if u64::from_le_bytes(self.from.array()?) != found {
            return Err(damaged("the contents"));
        }
        let vocab = engine.shape().vocab;
        if tokens.iter().any(|token| token.0 as usize >= vocab) {
            return Err(damaged("a token"));
        }
        self.from.end()?;
        let previous = vec![Vec::new(); memories.len()];
        Ok(Checkpoint { identity: self.header.identity, tokens, memories, previous, logits })
    }
}

impl Checkpoint {
    /// Writes the checkpoint. What `--lookahead previous` guesses from is left out: it changes no
    /// number.
    ///
    /// # Errors
    /// What the writer has to say.
    pub fn write(&self, to: impl Write) -> std::io::Result<()> {
        let header = Header { identity: self.identity.clone(), position: self.position() };
        write(to, &header, (&self.tokens, &self.logits), &self.memories)
    }
}

impl Session {
    /// Writes what [`Session::checkpoint`] would keep, without a copy of it.
    ///
    /// # Errors
    /// This session met an error before, or what the writer has to say.
    pub fn write_state(&self, to: impl Write) -> std::io::Result<()> {
        self.check_whole().map_err(std::io::Error::other)?;
        let identity = Identity::of(self.engine.container(), self.engine.options());
        let header = Header { identity, position: self.position() };
        let memories = self.remembered().map_err(std::io::Error::other)?;
        write(to, &header, (&self.tokens, &self.logits), &memories)
    }
}

fn write(
    to: impl Write,
    header: &Header,
    (tokens, logits): (&[TokenId], &[f32]),
    memories: &[Memory],
) -> std::io::Result<()> {
    let mut to = Hashed::new(to);
    let text = serde_json::to_vec(header)?;
    to.write(&MAGIC)?;
    to.write(&VERSION.to_le_bytes())?;
    to.write(&(text.len() as u32).to_le_bytes())?;
    to.write(&text)?;
    to.write(&xxh3_64(&text).to_le_bytes())?;
    for token in tokens {
        to.write(&token.0.to_le_bytes())?;
    }
    to.write(bytemuck::cast_slice(logits))?;
    for memory in memories {
        memory.each_part(&mut |bytes| to.write(bytes))?;
    }
    let hash = to.hash.digest();
    to.write(&hash.to_le_bytes())?;
    to.stream.flush()
}

/// A stream and the hash of what has passed.
struct Hashed<S> {
    stream: S,
    hash: Xxh3Default,
}

impl<S> Hashed<S> {
    fn new(stream: S) -> Self {
        Self { stream, hash: Xxh3Default::new() }
    }
}

impl<W: Write> Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hash.update(bytes);
        self.stream.write_all(bytes)
    }
}

impl<R: Read> Hashed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.stream.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => Error::State(format!("the file is cut off; {AGAIN}")),
            _ => Error::StateUnread(error),
        })?;
        self.hash.update(bytes);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Whether nothing follows.
    fn end(&mut self) -> Result<()> {
        match self.array::<1>() {
            Ok(_) => Err(Error::State(format!("the file goes on after its end; {AGAIN}"))),
            Err(_) => Ok(()),
        }
    }
}

fn damaged(what: &str) -> Error {
    Error::State(format!("{what} of the file is damaged; {AGAIN}"))
}
