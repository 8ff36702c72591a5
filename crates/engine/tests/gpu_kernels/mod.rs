//! Single kernels of the GPU on random data, against the CPU's arithmetic, on every adapter of the machine.
//!
//! A part of the engine's own unit tests, since kernels are private, but kept here: it prints SKIP where
//! there is no adapter and fails instead where `FLASH_MOE_GPU_TESTS` is set. Sizes are odd on purpose:
//! rows that fill no team, tokens that fill no tile. References are summed in f64 over what the CPU's
//! kernels unpack, and a bound is the number of f32 roundings on the way times the size of what is added.

mod blocks;
mod experts;
mod pipelines;
mod products;
mod tensor;

use std::env;

use flash_moe_kernels::Isa;
use wgpu::{BindGroup, BindGroupLayout, Buffer};

use super::adapters;
use super::device::{Device, Tensor};
use super::kernels::Views;
use super::layout::Layout;
use super::sample::Random;
use super::source::{Rows, Sources};
use crate::container::{Container, Matrix, Precision, ScaleKind};
use crate::shape::{DeltaNet, Shape};

/// An adapter, with teams in subgroups or in workgroup memory, and with products on tensor cores or not.
pub struct Stand {
    device: Device,
    views: Views,
    subgroups: bool,
    tensor: Option<Tensor>,
}

/// Every adapter of the machine, in both forms where its subgroups are large enough for a team, and once
/// more with tensor cores where it has them.
fn stands() -> Vec<Stand> {
    let all = adapters();
    if all.is_empty() {
        assert!(env::var_os("FLASH_MOE_GPU_TESTS").is_none(), "a GPU test needs an adapter");
        println!("SKIP: no adapter");
    }
    let mut stands = Vec::new();
    for adapter in &all {
        let device = Device::open(&adapter.adapter).expect("a device");
        let mut forms = vec![(false, None)];
        match device.subgroups {
            true => forms.push((true, None)),
            false => println!(
                "SKIP: {}: no subgroups of 32 lanes, teams in workgroup memory alone",
                adapter.name
            ),
        }
        match device.tensor {
            Some(_) => forms.push((device.subgroups, device.tensor)),
            None => println!("SKIP: {}: no tensor cores, products in f32 alone", adapter.name),
        }
        for (subgroups, tensor) in forms {
            let device = Device::open(&adapter.adapter).expect("a device");
            stands.push(Stand { views: Views::new(&device), device, subgroups, tensor });
        }
    }
    stands
}

/// Kernels of one shape on a stand, with their scratch.
struct Bench<'a> {
    stand: &'a Stand,
    shape: &'a Shape,
    layout: Layout,
    sources: Sources,
    scratch: Buffer,
    group: BindGroup,
}

impl<'a> Bench<'a> {
    /// For so many tokens at once; a token alone for 1.
    fn new(stand: &'a Stand, shape: &'a Shape, precisions: &[Precision], tokens: usize) -> Self {
        let layout = Layout::new(shape, shape.moe.top_k, tokens);
        let scratch = stand.device.buffer("scratch", layout.bytes()).expect("memory");
        Self {
            group: stand.device.group(&stand.views.scratch, &[&scratch]).expect("a group"),
            sources: Sources {
                declarations: layout.declarations(shape),
                precisions: precisions.to_vec(),
                subgroups: stand.subgroups,
                tensor: stand.tensor,
            },
            stand,
            shape,
            layout,
            scratch,
        }
    }

    fn put(&self, name: &str, values: &[f32]) {
        let at = self.layout.at(name) as u64 * 4;
        self.stand.device.write(&self.scratch, at, bytemuck::cast_slice(values));
    }

    fn put_numbers(&self, name: &str, numbers: &[usize]) {
        let words: Vec<f32> = numbers.iter().map(|n| f32::from_bits(*n as u32)).collect();
        self.put(name, &words);
    }

    fn get(&self, name: &str, count: usize) -> Vec<f32> {
        self.floats(&self.scratch, self.layout.at(name), count)
    }

    fn floats(&self, buffer: &Buffer, first: usize, count: usize) -> Vec<f32> {
        let mut values = vec![0f32; count];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        self.stand.device.read(buffer, first as u64 * 4, bytes).expect("read back");
        values
    }

    /// A buffer with these contents, which kernels read.
    fn group(&self, contents: &[f32]) -> BindGroup {
        let device = &self.stand.device;
        let buffer = device.filled("test", bytemuck::cast_slice(contents)).expect("memory");
        self.stand.views.read_group(device, &buffer).expect("a group")
    }

    /// Splits the rows that a product takes, where it takes split ones.
    fn split(&self, rows: Rows, cols: usize, count: usize) {
        if self.sources.tensor.is_some() {
            self.run(&self.sources.split(rows, cols), &[], &[(&[], [count, 1, 1])]);
        }
    }

    /// Compiles a kernel and runs it once for each set of its buffers behind the scratch.
    fn run(&self, source: &str, views: &[&BindGroupLayout], runs: &[(&[&BindGroup], [usize; 3])]) {
        let device = &self.stand.device;
        let layouts = [&[&self.stand.views.scratch], views].concat();
        let kernel = device.kernel("test", source, &layouts).unwrap_or_else(|e| panic!("{e}"));
        let mut encoder = device.encoder();
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&kernel);
        pass.set_bind_group(0, &self.group, &[]);
        for (groups, counts) in runs {
            for (i, group) in (1..).zip(*groups) {
                pass.set_bind_group(i, *group, &[]);
            }
            let [x, y, z] = counts.map(|n| n as u32);
            pass.dispatch_workgroups(x, y, z);
        }
        drop(pass);
        device.submit(encoder);
        device.wait_for(None).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// The built-in model's shape with small numbers of our own.
fn shape() -> Shape {
    let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    let container = Container::open(&tiny).expect("the built-in model");
    let mut shape = container.shape().clone();
    shape.hidden = 96;
    shape.delta =
        Some(DeltaNet { key_heads: 2, value_heads: 4, key_dim: 24, value_dim: 64, conv_taps: 4 });
    shape
}

/// Every number of bits with every group, and each of both with every type of scales.
fn precisions() -> Vec<Precision> {
    let kinds = [ScaleKind::Bf16, ScaleKind::F16, ScaleKind::F32];
    let mut all = vec![Precision::Bf16, Precision::F16, Precision::F32];
    for (i, bits) in [2, 3, 4, 5, 6, 8].into_iter().enumerate() {
        for (j, group) in [32, 64, 128].into_iter().enumerate() {
            all.push(Precision::Affine { bits, group, scales: kinds[(i + j) % 3] });
        }
    }
    all
}

/// Rows times a vector, in f64 over what the CPU unpacks.
fn product(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
    let mut row = vec![0f32; matrix.cols()];
    let of_row = |r| {
        Isa::detect().unpack_row(&matrix.rows(), r, &mut row);
        row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
    };
    (0..matrix.row_count()).map(of_row).collect()
}

/// Values that a kernel gives, and what rounding may change in each.
#[derive(Clone, Default)]
struct Rounded {
    values: Vec<f64>,
    errors: Vec<f64>,
}

impl Rounded {
    /// Exact ones.
    fn exact(x: &[f32]) -> Self {
        Self { values: wide(x), errors: vec![0.0; x.len()] }
    }

    /// The rows of a matrix times them in so many roundings, of a form that adds up `more` than the
    /// weights.
    fn times(&self, matrix: &Matrix, (roundings, more): (usize, f64)) -> Self {
        let mut row = vec![0f32; matrix.cols()];
        let mut all = Self::default();
        for r in 0..matrix.row_count() {
            Isa::detect().unpack_row(&matrix.rows(), r, &mut row);
            let (mut value, mut error, mut size) = (0.0, 0.0, 0.0);
            for ((w, x), e) in wide(&row).iter().zip(&self.values).zip(&self.errors) {
                value += w * x;
                error += w.abs() * e;
                size += (w.abs() + more) * x.abs();
            }
            all.values.push(value);
            all.errors.push(error + rounding(roundings, size));
        }
        all
    }

    /// silu of these times others; the slope of silu is at most 1.1.
    fn gating(&self, up: &Self) -> Self {
        let (gates, ups) = (self.values.iter().zip(&self.errors), up.values.iter().zip(&up.errors));
        let pairs = gates.zip(ups).map(|((g, of_g), (u, of_u))| {
            let value = silu(*g) * u;
            let error = 1.1 * of_g * (u.abs() + of_u) + silu(*g).abs() * of_u;
            (value, error + rounding(20, value.abs()))
        });
        let (values, errors) = pairs.unzip();
        Self { values, errors }
    }

    fn scaled(mut self, factor: f64) -> Self {
        self.values.iter_mut().for_each(|x| *x *= factor);
        self.errors.iter_mut().for_each(|x| *x *= factor.abs());
        self
    }

    fn add(&mut self, other: &Self) {
        for (i, (value, error)) in other.values.iter().zip(&other.errors).enumerate() {
            self.values[i] += value;
            self.errors[i] += error + rounding(1, self.values[i].abs() + value.abs());
        }
    }

    fn check(&self, what: &str, got: &[f32]) {
        assert_eq!(got.len(), self.values.len(), "{what}");
        for (i, got) in got.iter().enumerate() {
            assert_close(&format!("{what}, {i}"), &[*got], &self.values[i..=i], self.errors[i]);
        }
    }
}

fn add(to: &mut [f64], values: &[f64]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += value);
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// What so many roundings to f32 one after the other may change in sums of this size.
fn rounding(roundings: usize, size: f64) -> f64 {
    roundings as f64 * f64::from(f32::EPSILON) / 2.0 * size
}

/// The largest product that a weight of [`Random::matrix`] enters on its way: the affine kernels form
/// `scale * 2^bits * (1 + q / 2^bits) x`, up to 2.5 * 2, and a bias of 1 at most.
fn size_of(x: &[f64]) -> f64 {
    6.0 * x.iter().map(|x| x.abs()).sum::<f64>()
}

/// What the kernels for one vector add up beside a weight: 1 where they take bits for a mantissa.
const MANTISSA: f64 = 5.0;

/// Roundings of a kernel for one vector of so many columns: a unit's eight products of four, the
/// affine form, a lane's units, the team's sum.
fn by_team(cols: usize) -> usize {
    12 + 8 + cols.div_ceil(1024) + 5
}

fn assert_close(what: &str, got: &[f32], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs();
        assert!(error <= bound, "{what}, {i}: {got}, expected {want} within {bound:e}");
    }
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
