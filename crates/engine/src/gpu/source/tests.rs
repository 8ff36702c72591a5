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

/// Names and sources of all kernels of a model.
fn kernels(shape: &Shape, subgroups: bool) -> Vec<(String, String)> {
    let sources = |rows| Sources {
        declarations: Layout::new(shape, shape.moe.top_k, rows).declarations(shape),
        precisions: precisions(),
        subgroups,
    };
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
    ];
    for halves in [false, true] {
        all.push((format!("turn {halves}"), one.turn(halves)));
        all.push((format!("attend {halves}"), one.attend(halves)));
        all.push((
            format!("attend_rows {halves}"),
            many.attend_rows(halves, shape.attention.head_dim),
        ));
    }
    for input in [Input::Norm, Input::KeptNorm, Input::Plain, Input::Heads, Input::Gated] {
        for (give, cols, rows) in [(Give::Store, 512, 1), (Give::Add, 8192, 4)] {
            all.push((format!("mat_vec {input:?}"), one.by_vector(input, give, cols, rows)));
        }
    }
    for rows in [Rows::Normed, Rows::Mixed, Rows::Gated, Rows::Shared] {
        for tile in [Tile::Short, Tile::Tall] {
            all.push((format!("gemm {rows:?}"), many.by_rows(rows, Give::Add, 256, tile)));
        }
    }
    let sizes = (shape.hidden, shape.moe.width);
    for precision in precisions() {
        for count in [1, 4] {
            let slabs = slabs(shape, precision, count);
            let shared = (count == 1).then_some(precision);
            all.push((format!("up {precision:?}"), one.experts_up(&slabs, shape.hidden, 2)));
            all.push((format!("down {precision:?}"), one.experts_down(&slabs, shared, 4608, 2)));
            for tile in [Tile::Short, Tile::Tall] {
                all.push((format!("gemm up {precision:?}"), many.gemm_up(&slabs, sizes, tile)));
                all.push((format!("gemm down {precision:?}"), many.gemm_down(&slabs, sizes, tile)));
            }
        }
    }
    all
}

fn translate(name: &str, source: &str) {
    let module = naga::front::wgsl::parse_str(source)
        .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    let info = validator.validate(&module).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let words = spv::write_vec(&module, &info, &spv::Options::default(), None);
    assert!(words.unwrap_or_else(|e| panic!("{name} to SPIR-V: {e}")).len() > 100);
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

#[test]
fn every_kernel_is_taken_by_vulkan_metal_and_direct3d() {
    let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    let container = crate::container::Container::open(&tiny).expect("the built-in model");
    let mut shape = container.shape().clone();
    // Whole groups of every layout.
    (shape.hidden, shape.moe.width) = (512, 256);
    for subgroups in [false, true] {
        for (name, source) in kernels(&shape, subgroups) {
            translate(&name, &source);
        }
    }
    // A model without a shared expert.
    shape.moe.shared_width = 0;
    let sources = Sources {
        declarations: Layout::new(&shape, shape.moe.top_k, 1).declarations(&shape),
        precisions: precisions(),
        subgroups: true,
    };
    let slabs = slabs(&shape, Precision::Bf16, 2);
    translate("down without shared", &sources.experts_down(&slabs, None, 1024, 1));
}
