//! What fits, what is said of what doesn't, and that it is what a device takes.

use kvasir_kernels::choice::{CountedDevice, DeviceChoice};
use kvasir_kernels::cpu::CpuDevice;
use kvasir_kernels::device::Device;
use std::num::NonZeroUsize;

use super::super::tests::options;
use super::super::{ModelFiles, load, plan};
use super::*;
use crate::engine::groups::GroupKind;

fn figures(max_model_len: u32) -> ModelFigures {
    let block_size = NonZeroU32::new(16).unwrap();
    ModelFigures {
        n_parameters: 100,
        precision: Precision::BF16,
        max_model_len,
        groups: CacheGroups::new(block_size, 64, vec![GroupKind::Full]),
    }
}

fn memory(limit: u64) -> Memory {
    Memory {
        limit,
        weights: 200,
        workspace: 60,
        other: 40,
    }
}

#[test]
fn blocks_are_what_the_memory_leaves() {
    for (why, limit, n_blocks, max_model_len, want) in [
        (
            "half the limit, less what is taken",
            2_600,
            None,
            None,
            Ok((10, 128, 1)),
        ),
        (
            "no more than the rows of the table can hold",
            1 << 40,
            None,
            None,
            Ok((32, 128, 4)),
        ),
        (
            "a small pool shortens the context",
            1_000,
            None,
            None,
            Ok((2, 32, 1)),
        ),
        (
            "unless its length was asked for",
            1_000,
            None,
            Some(128),
            Err(
                "the model needs 2.2 KiB of memory, and there are 1000 bytes: 200 bytes of weights, 60 bytes of workspace, 40 bytes taken by others, 800 bytes for the KV cache of one request of 128 tokens, and 50 % of the limit may be used; give the replica 2.2 KiB, or raise --gpu-memory-utilization, or lower --max-model-len to 32",
            ),
        ),
        (
            "nothing is left",
            100,
            None,
            None,
            Err("the model needs 801 bytes of memory, and there are 100 bytes"),
        ),
        (
            "the override counts, not the memory",
            0,
            Some(5),
            None,
            Ok((5, 80, 1)),
        ),
        (
            "but must hold what was asked for",
            0,
            Some(5),
            Some(128),
            Err("--num-gpu-blocks-override is 5, expected at least 8 blocks of 16 tokens"),
        ),
    ] {
        let options = options(n_blocks, max_model_len);
        let plan = MemoryPlan::new(&options, &figures(128), memory(limit), 100);
        assert_eq!(plan.kv_bytes_per_token, 7, "{why}");
        match (plan.fit, want) {
            (Ok(found), Ok(want)) => {
                let found = (
                    found.n_blocks,
                    found.max_model_len,
                    found.requests_at_context,
                );
                assert_eq!(found, want, "{why}");
            }
            (Err(found), Err(want)) => {
                let found = LoadError::from(found).to_string();
                assert!(found.starts_with(want), "{why}: {found}");
            }
            (found, want) => panic!("{why}: {found:?}, expected {want:?}"),
        }
    }
}

#[test]
fn what_it_says_is_needed_is_enough_and_a_byte_block_less_is_not() {
    for max_model_len in [None, Some(48), Some(128)] {
        for block_bytes in [1, 100, 4096, 1 << 20] {
            let options = options(None, max_model_len);
            let with = |limit| MemoryPlan::new(&options, &figures(128), memory(limit), block_bytes);
            let MemoryPlan {
                least_bytes,
                context_bytes,
                ..
            } = with(0);
            assert!(
                with(least_bytes).fit.is_ok(),
                "{max_model_len:?} {block_bytes}"
            );
            assert!(
                with(least_bytes - 2 * block_bytes - 2).fit.is_err(),
                "{max_model_len:?} {block_bytes}"
            );
            let whole = with(context_bytes).fit.unwrap();
            assert_eq!(whole.max_model_len, 128, "{max_model_len:?} {block_bytes}");
        }
    }
}

#[test]
fn the_plan_counts_what_the_device_takes() {
    let files = ModelFiles::demo();
    let two = NonZeroUsize::new(2).unwrap();
    for precision in [Precision::BF16, Precision::F32] {
        let options = LoadOptions {
            precision: Some(precision),
            ..options(Some(64), None)
        };
        let counted = CountedDevice::imagined(DeviceChoice::Cpu, 0).unwrap();
        let planned = plan(&files, &options, |options| counted.make(options, two)).unwrap();
        let make = |options| Ok(Box::new(CpuDevice::new(options, two)?) as Box<dyn Device>);
        let loaded = load(&files, &options, make, |_| {}).map_err(|error| error.to_string());
        let loaded = loaded.map(|loaded| (loaded.memory, loaded.plan)).unwrap();
        let of = |memory: Memory| (memory.weights, memory.workspace);
        assert_eq!(of(planned.memory), of(loaded.0), "{precision:?}");
        assert_eq!(of(planned.memory), of(loaded.1.memory), "{precision:?}");
        assert_eq!(planned.block_bytes, loaded.1.block_bytes);
        assert_eq!(planned.n_parameters, loaded.1.n_parameters);
        assert_eq!(planned.fit, loaded.1.fit);
    }
}

#[test]
fn a_memory_of_any_size_can_be_planned_for() {
    let two = NonZeroUsize::new(2).unwrap();
    for limit in [1 << 36, 1 << 50] {
        let options = LoadOptions {
            memory_limit: Some(limit),
            ..options(None, None)
        };
        let counted = CountedDevice::imagined(DeviceChoice::Cpu, limit).unwrap();
        let found = plan(&ModelFiles::demo(), &options, |options| {
            counted.make(options, two)
        });
        let found = found.unwrap();
        assert_eq!(found.memory.limit, limit, "whatever this machine has");
        assert_eq!(found.fit.unwrap().max_model_len, 2048);
    }
}

#[cfg(feature = "cuda-shim")]
#[test]
fn the_plan_counts_what_a_gpu_takes() {
    use kvasir_kernels::cuda::{CudaDevice, counting::Counting, shim::Shim};
    let case = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let mut n_cases = 0;
    for entry in std::fs::read_dir(case).unwrap() {
        let Ok(files) = ModelFiles::directory(entry.unwrap().path()) else {
            continue;
        };
        let options = LoadOptions {
            precision: Some(Precision::BF16),
            ..options(Some(64), None)
        };
        let make = |options| {
            let device = CudaDevice::new(Shim::default(), options)?;
            Ok(Box::new(device) as Box<dyn Device>)
        };
        // Others have heads that no kernel is made for.
        let Ok(loaded) = load(&files, &options, make, |_| {}) else {
            continue;
        };
        let planned = plan(&files, &options, |options| {
            let gpu = Counting::like(&Shim::default())?;
            Ok(Box::new(CudaDevice::new(gpu, options)?) as Box<dyn Device>)
        });
        // The shim counts host memory too.
        let of = |memory: Memory| (memory.limit, memory.weights, memory.workspace);
        let planned = planned.unwrap();
        assert_eq!(of(planned.memory), of(loaded.plan.memory), "{files}");
        assert_eq!(planned.block_bytes, loaded.plan.block_bytes, "{files}");
        n_cases += 1;
    }
    assert!(n_cases >= 3, "the golden files are there");
}
