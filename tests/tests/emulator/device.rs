//! The device around the kernels: arguments, faults, blocks, compilers' complaints.

use dsa80_cuda::{Arg, Device, Launch, Program, Sources};
use dsa80_tests::emulator::{Emulator, Fault};

use crate::snippet::Snippet;

#[test]
fn arguments_fit_their_parameters() {
    let source = "KERNEL void kernel(float* a, const int32_t n, int64_t m, float x, const uint16_t* none) {
        a[0] = static_cast<float>(n) + static_cast<float>(m) + x + (none == nullptr ? 1.0f : 0.0f);
    }";
    let Some(snippet) = Snippet::new(source) else { return };
    let a = snippet.buffer("a", &[f32::NAN]);
    snippet
        .launch(1, 1, 0, &[Arg::Buffer(&a), Arg::I32(-2), Arg::I64(64), Arg::F32(0.5), Arg::Null])
        .unwrap();
    assert_eq!(snippet.values::<f32>(&a, 1), [63.5]);
    let error = snippet
        .launch(1, 1, 0, &[Arg::Buffer(&a), Arg::I64(-2), Arg::I32(64), Arg::F32(0.5), Arg::Null])
        .unwrap_err();
    assert!(error.contains("arguments plifp for parameters pilfp"), "{error}");
    let error = snippet.launch(1, 1, 0, &[Arg::Buffer(&a)]).unwrap_err();
    assert!(error.contains("arguments p for parameters pilfp"), "{error}");
}

#[test]
fn a_complaint_of_the_compiler_names_the_line() {
    let Some(snippet) = Snippet::new("\nKERNEL void kernel(float* a) { a[0] = nothing; }") else { return };
    let a = snippet.buffer("a", &[0.0f32]);
    let error = snippet.launch(1, 1, 0, &[Arg::Buffer(&a)]).unwrap_err();
    assert!(error.contains("snippet.cu:3") && error.contains("nothing"), "{error}");
}

#[test]
fn faults_are_planted_in_one_place() {
    if Emulator::available().is_err() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ptx.cuh"), include_str!("../../../cuda/kernels/ptx.cuh")).unwrap();
    let source = "#include \"ptx.cuh\"\nKERNEL void one(int32_t* a) { a[0] = 1 + 1 + 2; }";
    std::fs::write(folder.path().join("sums.cu"), source).unwrap();
    let emulator = || Emulator::from_sources(Sources::Folder(folder.path().to_owned())).unwrap();
    let fault = |find, replace| Fault { file: "sums.cu", find, replace };
    let launched = |emulator: &Emulator| {
        let a = emulator.alloc("a", 4).unwrap();
        let program = Program { source: "sums.cu", defines: Vec::new() };
        let args = [Arg::Buffer(&a)];
        let launch = Launch {
            program: &program,
            entry: "one",
            grid: [1, 1, 1],
            threads: 1,
            shared_bytes: 0,
            shape: String::new(),
            args: &args,
        };
        emulator.launch(&launch).unwrap();
        let mut out = [0; 4];
        emulator.read(&a, 0, &mut out).unwrap();
        i32::from_ne_bytes(out)
    };
    assert_eq!(launched(&emulator()), 4);
    assert_eq!(launched(&emulator().with_faults(&[fault("+ 2", "- 2")]).unwrap()), 0);
    let both = [fault("+ 2", "- 2"), fault("1 + 1", "7")];
    assert_eq!(launched(&emulator().with_faults(&both).unwrap()), 5);
    let error = emulator().with_faults(&[fault("1", "7")]).unwrap_err().to_string();
    assert!(error.contains("sums.cu has 2 of \"1\""), "{error}");
    assert!(emulator().with_faults(&[fault("+ 3", "7")]).is_err());
}

#[test]
fn the_last_block_sees_what_all_blocks_wrote() {
    let source = "struct Shared { uint32_t last; };
        KERNEL void kernel(const uint32_t* values, uint32_t* partial, uint32_t* arrived, uint32_t* total) {
            uint32_t& last = shared_memory<Shared>().last;
            const uint32_t sum = __reduce_add_sync(0xffffffffu, values[blockIdx.x * 32 + threadIdx.x]);
            if (threadIdx.x == 0) {
                partial[blockIdx.x] = sum;
                __threadfence();
                last = atomicAdd(arrived, 1u) == gridDim.x - 1;
            }
            __syncthreads();
            if (!last) return;
            uint32_t all = 0;
            for (uint32_t i = threadIdx.x; i < gridDim.x; i += 32) all += load_published(partial + i);
            all = __reduce_add_sync(0xffffffffu, all);
            if (threadIdx.x == 0) {
                *total = all;
                *arrived = 0;
            }
        }";
    let Some(snippet) = Snippet::new(source) else { return };
    let values: Vec<u32> = (0..500 * 32).map(|i| i * 7).collect();
    let (input, partial) = (snippet.buffer("values", &values), snippet.buffer("partial", &[u32::MAX; 500]));
    let (arrived, total) = (snippet.buffer("arrived", &[0u32]), snippet.buffer("total", &[0u32]));
    for seed in 0..20 {
        snippet.emulator.set_seed(seed);
        let args = [Arg::Buffer(&input), Arg::Buffer(&partial), Arg::Buffer(&arrived), Arg::Buffer(&total)];
        snippet.launch(500, 32, 4, &args).unwrap();
        assert_eq!(snippet.values::<u32>(&total, 1), [values.iter().sum::<u32>()]);
        assert_eq!(snippet.values::<u32>(&arrived, 1), [0]);
        snippet.emulator.write(&total, 0, &[0; 4]).unwrap();
    }
}

/// Blocks of two warps that signal before the second one has written are seen by the last one, with some seed.
#[test]
fn a_signal_that_comes_too_early_shows() {
    let source = "struct Shared { uint32_t last; };
        KERNEL void kernel(uint32_t* partial, uint32_t* arrived, uint32_t* wrong) {
            uint32_t& last = shared_memory<Shared>().last;
            partial[blockIdx.x * 64 + threadIdx.x] = 1;
            __threadfence();
            BARRIER
            if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == gridDim.x - 1;
            __syncthreads();
            if (!last) return;
            for (uint32_t i = threadIdx.x; i < gridDim.x * 64; i += 64)
                if (load_published(partial + i) != 1) atomicOr(wrong, 1u);
        }";
    for (barrier, expected) in [("__syncthreads();", false), ("", true)] {
        let Some(snippet) = Snippet::new(&source.replace("BARRIER", barrier)) else { return };
        let wrong = (0..200).any(|seed| {
            snippet.emulator.set_seed(seed);
            let partial = snippet.buffer("partial", &[0u32; 8 * 64]);
            let (arrived, wrong) = (snippet.buffer("arrived", &[0u32]), snippet.buffer("wrong", &[0u32]));
            snippet
                .launch(8, 64, 4, &[Arg::Buffer(&partial), Arg::Buffer(&arrived), Arg::Buffer(&wrong)])
                .unwrap();
            snippet.values::<u32>(&wrong, 1) != [0]
        });
        let alone = std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1);
        assert!(wrong == expected || alone, "{barrier:?}: {wrong}");
    }
}

#[test]
fn blocks_know_their_place() {
    let source = "KERNEL void kernel(uint32_t* a) {
        if (threadIdx.x == blockDim.x - 1)
            a[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z;
    }";
    let Some(snippet) = Snippet::new(source) else { return };
    let a = snippet.buffer("a", &[u32::MAX; 24]);
    snippet.launch_grid([4, 3, 2], 5, 0, &[Arg::Buffer(&a)]).unwrap();
    let expected: Vec<u32> = (0..24).map(|i| i % 4 + 10 * (i / 4 % 3) + 100 * (i / 12)).collect();
    assert_eq!(snippet.values::<u32>(&a, 24), expected);
}

#[test]
fn a_launch_that_no_gpu_takes_is_refused() {
    let Some(snippet) = Snippet::new("KERNEL void kernel(uint32_t* a) { a[0] = 0; }") else { return };
    let a = snippet.buffer("a", &[0u32]);
    let args = [Arg::Buffer(&a)];
    assert!(snippet.launch(1, 1, 163 * 1024, &args).is_ok());
    assert!(snippet.launch(1, 1, 163 * 1024 + 1, &args).unwrap_err().contains("shared memory"));
    assert!(snippet.launch(1, 1025, 0, &args).unwrap_err().contains("1025 threads"));
    assert!(snippet.launch(1, 0, 0, &args).is_err());
    assert!(snippet.launch(0, 32, 0, &args).is_err());
    assert!(snippet.launch_grid([1, 65536, 1], 32, 0, &args).is_err());
}

#[test]
fn a_captured_launch_runs_when_it_is_replayed_on_what_is_there_then() {
    let source =
        "KERNEL void kernel(const int32_t* a, int32_t* sum, int32_t factor) { sum[0] += factor * a[0]; }";
    let Some(snippet) = Snippet::new(source) else { return };
    let (a, sum) = (snippet.buffer("a", &[1i32]), snippet.buffer("sum", &[0i32]));
    let args = [Arg::Buffer(&a), Arg::Buffer(&sum), Arg::I32(2)];
    let device = &snippet.emulator;
    let captured = |launches: &dyn Fn() -> Result<(), String>| {
        let backend = |message| dsa80_reference::Error::Backend { backend: "test", message };
        device.capture(|| launches().map_err(backend)).map_err(|error| error.to_string())
    };
    let launch = || snippet.launch(1, 1, 0, &args);
    // As a GPU cannot load a program in the middle of a capture.
    let error = captured(&launch).unwrap_err();
    assert!(error.contains("launched for the first time while launches are captured"), "{error}");
    launch().unwrap();
    let graph = captured(&|| (0..3).try_for_each(|_| launch())).unwrap();
    assert_eq!(snippet.values::<i32>(&sum, 1), [2]);
    device.write(&a, 0, &10i32.to_ne_bytes()).unwrap();
    device.replay(&graph).unwrap();
    assert_eq!(snippet.values::<i32>(&sum, 1), [62]);
    for refused in [
        captured(&|| device.alloc("more", 4).map(drop).map_err(|error| error.to_string())),
        captured(&|| device.write(&a, 0, &[0]).map_err(|error| error.to_string())),
        captured(&|| device.replay(&graph).map_err(|error| error.to_string())),
    ] {
        assert!(refused.unwrap_err().contains("while launches are captured"));
    }
}
