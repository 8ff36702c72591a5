//! Runs the built program as a user would, in a home of its own.
//!
//! Owns the scratch home, the conversion of a tiny model, and the reading of `--json` summaries and
//! `--trace` files. Every test of the whole program stands on these few calls.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

/// A scratch directory that is also the program's HOME.
pub struct Home {
    dir: TempDir,
}

impl Home {
    /// An empty home.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a scratch directory") }
    }

    /// A path inside it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file inside it and gives its path.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("a scratch file");
        text(&path)
    }

    /// The program with its arguments, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flash-moe"));
        command.args(args).env("HOME", self.dir.path()).env_remove("XDG_CACHE_HOME");
        command.env_remove("XDG_DATA_HOME").env_remove("XDG_CONFIG_HOME");
        command
            .env_remove("FLASH_MOE_CACHE")
            .env("NO_COLOR", "1")
            .stdin(std::process::Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the program starts")
    }

    /// Runs the program, which must succeed.
    pub fn succeed(&self, args: &[&str]) -> Output {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        output
    }

    /// Runs the program, which must refuse with exit code 1, and gives what it said.
    pub fn refuse(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", stderr(&output));
        let said = stderr(&output);
        assert!(said.contains("flash-moe: "), "{args:?}: no error in {said:?}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
        said
    }

    /// Runs `run --json` and gives the summary.
    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["run", "--json", "--quiet"];
        all.extend_from_slice(args);
        let output = self.succeed(&all);
        serde_json::from_slice(&output.stdout).expect("one JSON object on stdout")
    }
}

/// What the program said on stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A path as text.
pub fn text(path: &Path) -> String {
    path.to_str().expect("scratch paths are UTF-8").to_string()
}

/// Ids as the `--prompt-tokens` file wants them.
pub fn id_list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// The arrays of a `--trace` file.
pub struct TraceFile {
    bytes: Vec<u8>,
}

impl TraceFile {
    /// Reads a trace.
    pub fn open(path: &Path) -> Self {
        Self { bytes: std::fs::read(path).expect("a trace file") }
    }

    /// Shape and values of an f32 array.
    pub fn floats(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let (shape, data) = self.array(name, Dtype::F32);
        (
            shape,
            data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        )
    }

    /// Shape and values of an i32 array.
    pub fn ids(&self, name: &str) -> (Vec<usize>, Vec<u32>) {
        let (shape, data) = self.array(name, Dtype::I32);
        (
            shape,
            data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        )
    }

    /// Names of all arrays.
    pub fn names(&self) -> Vec<String> {
        let file = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        file.names().into_iter().map(ToString::to_string).collect()
    }

    fn array(&self, name: &str, dtype: Dtype) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        let view = file.tensor(name).unwrap_or_else(|e| panic!("trace array {name}: {e}"));
        assert_eq!(view.dtype(), dtype, "{name}");
        (view.shape().to_vec(), view.data().to_vec())
    }
}
