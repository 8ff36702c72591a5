//! Compiled kernels on disk.
//!
//! What one opening of a device leaves the next one reads; what is damaged counts as absent.

use std::fs;
use std::path::Path;

use super::super::adapters;
use super::super::device::Device;
use super::super::kernels::Views;
use super::super::pipelines::KeptPipelines;
use super::{Bench, Stand, shape, stands};

/// Opens an adapter with the kernels that a directory keeps and compiles one more: bytes that were read.
fn compile(adapter: &wgpu::Adapter, dir: &Path) -> Option<usize> {
    let mut device = Device::open(adapter).expect("a device");
    let kept = KeptPipelines::open(dir, adapter, &mut device)?;
    let shape = shape();
    let stand = Stand { views: Views::new(&device), device, subgroups: false, tensor: None };
    let bench = Bench::new(&stand, &shape, &[], 1);
    let groups = [&stand.views.scratch];
    stand.device.kernel("test", &bench.sources.combine(), &groups).expect("it compiles");
    kept.save(&stand.device);
    Some(kept.read_bytes())
}

#[test]
fn compiled_kernels_are_read_again_and_what_is_damaged_is_written_anew() {
    // Says why where there is nothing to test on.
    drop(stands());
    for adapter in adapters() {
        let temporary = tempfile::tempdir().expect("a directory");
        let dir = temporary.path().join("not/there/yet");
        let compile = |dir: &Path| compile(&adapter.adapter, dir);
        let Some(first) = compile(&dir) else {
            println!("SKIP: {} hands out no compiled kernels", adapter.name);
            continue;
        };
        assert_eq!(first, 0);
        let second = compile(&dir).expect("the same adapter");
        assert!(second > 0, "the second time it is read");
        let files: Vec<_> = fs::read_dir(&dir).expect("it is there").collect();
        let [Ok(file)] = &files[..] else { panic!("one file, whole: {files:?}") };
        let whole = fs::read(file.path()).expect("it is there");
        let mut damaged = whole.clone();
        *damaged.last_mut().expect("bytes") ^= 1;
        for wrong in [
            &damaged[..],
            &whole[..whole.len() / 2],
            &whole[..3],
            b"",
            b"another's file, longer than a header",
        ] {
            fs::write(file.path(), wrong).expect("it can be written");
            assert_eq!(compile(&dir), Some(0), "{} bytes that are no good", wrong.len());
            assert!(compile(&dir).expect("the same adapter") > 0, "written anew");
        }
        // A directory that cannot be: its place is taken by a file.
        assert_eq!(compile(&file.path().join("below")), Some(0));
    }
}
