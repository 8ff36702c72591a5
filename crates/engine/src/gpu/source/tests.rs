//! Every kernel in every layout of weights, handed to the translators of all the backends.
//!
//! What Metal or Direct3D could not take fails here, on a machine that has neither.

use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};

use super::*;
use crate::gpu::layout::Layout;
use crate::shape::Shape;

/// All layouts that the kernels know.
fn precisions() -> Vec<Precision> {
    let affine = |bits, group, scales| Precision::Affine { bits, group, scales };
    let mut all = vec![Precision::Bf16, Precision::F16, Precision::F32];
    for (bits, group, scales) in [
        (2, 32, ScaleKind::Bf16),
        (3, 64, ScaleKind::F16),
        (4, 64, ScaleKind::Bf16),
        (4, 128, ScaleKind::F32),
        (5, 64, ScaleKind::Bf16),
        (6, 32, ScaleKind::F16),
        (8, 64, ScaleKind::Bf16),
    ] {
        all.push(affine(bits, group, scales));
    }
    all
}

fn slabs(shape: &Shape, precision: Precision, slabs: usize) -> Slabs {
    let layout =
        RecordLayout::new(shape.hidden, shape.moe.width, [precision; 3]).expect("a layout");
    let slot_words = layout.record_bytes().div_ceil(16) * 4;
    Slabs { layout, slabs, slots_each: 5, slot_words }
}

fn sources(shape: &Shape, rows: usize, subgroups: bool) -> Sources {
    Sources {
        declarations: Layout::new(shape, shape.moe.top_k, rows).declarations(shape),
        precisions: precisions(),
        subgroups,
        tensor: None,
    }
}

/// Names and sources of all kernels of a model.
fn kernels(shape: &Shape, subgroups: bool) -> Vec<(String, String)> {
    let sources = |rows| sources(shape, rows, subgroups);
    let (one, many) = (sources(1), sources(64));
    let mut all = vec![
        ("delta".to_string(), one.delta()),
        ("combine".to_string(), one.combine()),
        ("route".to_string(), one.route()),
        ("read".to_string(), READ.to_string()),
        ("norm_rows".to_string(), many.norm_rows()),
        ("heads_rows".to_string(), many.heads_rows()),
        ("delta_rows".to_string(), many.delta_rows()),
        ("delta_pairs".to_string(), many.delta_pairs()),
        ("delta_scan".to_string(), many.delta_scan()),
        ("join_rows".to_string(), many.join_rows()),
        ("combine_rows".to_string(), many.combine_rows()),
    ];
    for halves in [false, true] {
        all.push((format!("turn {halves}"), one.turn(halves)));
        all.push((format!("attend {halves}"), one.attend(halves)));
        let head_dim = shape.attention.head_dim;
        all.push((format!("attend_rows {halves}"), many.attend_rows(halves, head_dim)));
        all.push((format!("attend_rows_part {halves}"), many.attend_rows_part(halves, head_dim)));
    }
    for input in [Input::Norm, Input::KeptNorm, Input::Plain, Input::Heads, Input::Gated] {
        for (give, cols, rows) in [(Give::Store, 512, 1), (Give::Add, 8192, 4)] {
            all.push((format!("mat_vec {input:?}"), one.by_vector(input, give, cols, rows)));
        }
    }
    all.extend(dense_products(&many));
    let sizes = (shape.hidden, shape.moe.width);
    for precision in precisions() {
        for count in [1, 4] {
            let slabs = slabs(shape, precision, count);
            let shared = (count == 1).then_some(precision);
            all.push((format!("up {precision:?}"), one.experts_up(&slabs, shape.hidden, 2)));
            all.push((format!("down {precision:?}"), one.experts_down(&slabs, shared, 4608, 2)));
            all.extend(expert_products(&many, &slabs, sizes));
        }
    }
    all
}

fn dense_products(many: &Sources) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for rows in [Rows::Normed, Rows::Mixed, Rows::Gated, Rows::Shared] {
        for tile in [Tile::Short, Tile::Tall] {
            all.push((format!("gemm {rows:?}"), many.by_rows(rows, Give::Add, 256, tile)));
        }
    }
    all
}

fn expert_products(many: &Sources, slabs: &Slabs, sizes: (usize, usize)) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for tile in [Tile::Short, Tile::Tall] {
        let precision = slabs.layout.gate.precision;
        all.push((format!("gemm up {precision:?}"), many.gemm_up(slabs, sizes, tile)));
        all.push((format!("gemm down {precision:?}"), many.gemm_down(slabs, sizes, tile)));
    }
    all
}

/// What splits rows for tensor cores, which any device could do.
fn splits(many: &Sources, sizes: (usize, usize)) -> Vec<(String, String)> {
    let rows = [Rows::Normed, Rows::Mixed, Rows::Gated, Rows::Shared];
    let split = |rows| (format!("split {rows:?}"), many.split(rows, 256));
    let of_tile = |tile| (format!("split experts {tile:?}"), many.split_experts(sizes, tile));
    rows.map(split).into_iter().chain([Tile::Short, Tile::Tall].map(of_tile)).collect()
}

/// What naga makes of a kernel, which it gives to Vulkan.
fn to_vulkan(name: &str, source: &str) -> (naga::Module, naga::valid::ModuleInfo) {
    let module = naga::front::wgsl::parse_str(source)
        .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    let info = validator.validate(&module).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let words = spv::write_vec(&module, &info, &spv::Options::default(), None);
    assert!(words.unwrap_or_else(|e| panic!("{name} to SPIR-V: {e}")).len() > 100);
    (module, info)
}

fn translate(name: &str, source: &str) {
    let (module, info) = to_vulkan(name, source);
    let metal = msl::Options { lang_version: (2, 4), ..Default::default() };
    let text = msl::write_string(&module, &info, &metal, &msl::PipelineOptions::default());
    let (text, _) = text.unwrap_or_else(|e| panic!("{name} to Metal: {e}"));
    assert!(text.contains("kernel void"), "{name}");
    let mut text = String::new();
    let direct = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_0,
        fake_missing_bindings: true,
        special_constants_binding: Some(hlsl::BindTarget { space: 9, ..Default::default() }),
        ..Default::default()
    };
    let pipeline = hlsl::PipelineOptions::default();
    hlsl::Writer::new(&mut text, &direct, &pipeline)
        .write(&module, &info, None)
        .unwrap_or_else(|e| panic!("{name} to Direct3D: {e}"));
    assert!(text.contains("numthreads"), "{name}");
}

/// The built-in model's.
fn shape() -> Shape {
    let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    crate::container::Container::open(&tiny).expect("the built-in model").shape().clone()
}

/// Bytes of the workgroup memory of a kernel.
fn workgroup_bytes(source: &str) -> u32 {
    let module = naga::front::wgsl::parse_str(source).expect("it was taken");
    let sizes = (module.global_variables.iter())
        .filter(|(_, variable)| variable.space == naga::AddressSpace::WorkGroup)
        .map(|(_, variable)| module.types[variable.ty].inner.size(module.to_ctx()));
    sizes.sum()
}

#[test]
fn every_kernel_is_taken_by_vulkan_metal_and_direct3d() {
    let mut shape = shape();
    // Whole groups of every layout.
    (shape.hidden, shape.moe.width) = (512, 256);
    for subgroups in [false, true] {
        for (name, source) in kernels(&shape, subgroups) {
            translate(&name, &source);
        }
    }
    // A model without a shared expert.
    shape.moe.shared_width = 0;
    let sources = sources(&shape, 1, true);
    let slabs = slabs(&shape, Precision::Bf16, 2);
    translate("down without shared", &sources.experts_down(&slabs, None, 1024, 1));
}

#[test]
fn products_on_tensor_cores_are_taken_by_vulkan() {
    let mut shape = shape();
    let sizes = (512, 256);
    (shape.hidden, shape.moe.width) = sizes;
    for side in [8, 16] {
        let many = Sources { tensor: Some(Tensor { side }), ..sources(&shape, 64, true) };
        splits(&many, sizes).iter().for_each(|(name, source)| translate(name, source));
        let mut products = dense_products(&many);
        for (precision, count) in precisions().into_iter().zip([1, 4].into_iter().cycle()) {
            products.extend(expert_products(&many, &slabs(&shape, precision, count), sizes));
        }
        for (name, source) in products {
            assert!(source.contains("coopMultiplyAdd"), "{name}");
            drop(to_vulkan(&name, &source));
            let bytes = workgroup_bytes(&source);
            assert!(bytes <= 32 << 10, "{name}: {bytes} bytes of workgroup memory");
        }
    }
}
