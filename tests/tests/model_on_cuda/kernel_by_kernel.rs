//! Steps recorded to be timed: as a whole, and the launches of every kernel by themselves.

use dsa80_cuda::Cuda;
use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::measure::greedy_step;
use dsa80_model::runner::RecordedStep;
use dsa80_reference::{Batch, DType, HostTensor, Kernels, RecordedKernel, SequenceSlice};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::judge;
use dsa80_tests::parity::TestDevice;

use super::{emulated, on_gpu};

const PAGE_SIZE: usize = 16;

/// Two products of one shape, one of another, and a norm: what replays of each write, and nothing else.
fn kernels_apart(cuda: &Cuda<TestDevice>) {
    let numbers = |count: usize| (0..count).map(|i| (i % 7) as f32 - 3.0).collect::<Vec<_>>();
    let weights =
        [16, 16, 32].map(|rows| cuda.upload(HostTensor::f32([rows, 32], numbers(rows * 32))).unwrap());
    let norm = cuda.upload(HostTensor::f32([32], vec![1.0; 32])).unwrap();
    let mut x = cuda.alloc(DType::Act, &[2, 32]).unwrap();
    cuda.write(&numbers(64).into_iter().map(f64::from).collect::<Vec<_>>(), &mut x).unwrap();
    let mut outs = [16, 16, 32].map(|columns| cuda.alloc(DType::Float, &[2, columns]).unwrap());
    let mut normed = cuda.alloc(DType::Act, &[2, 32]).unwrap();

    let mut launches = || {
        cuda.rms_norm(&x, &norm, 1e-5, &mut normed)?;
        weights.iter().zip(&mut outs).try_for_each(|(weight, out)| cuda.linear(&x, weight, out))
    };
    assert!(cuda.record(&mut launches).unwrap().is_some());
    let recorded = cuda.record_kernels(launches).unwrap();
    let launches: Vec<usize> = recorded.iter().map(|kernel| kernel.launches).collect();
    assert_eq!(launches, [1, 2, 1], "{recorded:?}");
    let shapes = |index: usize| (&recorded[index].name, &recorded[index].shape);
    assert!(recorded[0].name.contains("rms_norm") && recorded[1].name.contains("linear"), "{recorded:?}");
    assert!(shapes(1).0 == shapes(2).0 && shapes(1).1 != shapes(2).1, "{recorded:?}");

    let mut expected: Vec<Vec<f64>> = outs.iter().map(|out| cuda.read(out).unwrap()).collect();
    expected.insert(0, cuda.read(&normed).unwrap());
    // Which of the outputs each graph writes: the norm's, those of two products, that of the third.
    for (RecordedKernel { graph, name, .. }, writes) in recorded.iter().zip([
        [true, false, false, false],
        [false, true, true, false],
        [false, false, false, true],
    ]) {
        cuda.write(&[f64::NAN; 64], &mut normed).unwrap();
        for (out, columns) in outs.iter_mut().zip([16, 16, 32]) {
            cuda.write(&vec![f64::NAN; 2 * columns], out).unwrap();
        }
        let times = cuda.time_replays(graph, 2).unwrap();
        assert!(times.len() == 2 && times.iter().all(|&us| us > 0.0), "{times:?}");
        let mut found: Vec<Vec<f64>> = outs.iter().map(|out| cuda.read(out).unwrap()).collect();
        found.insert(0, cuda.read(&normed).unwrap());
        for ((found, expected), writes) in found.iter().zip(&expected).zip(writes) {
            let unwritten = found.iter().all(|value| value.is_nan());
            assert!(if writes { found == expected } else { unwritten }, "{name}: {found:?}");
        }
    }
}

/// A decode step of the whole model: its graph chooses the tokens that the engine's step chooses, and its kernels are all of its launches.
fn steps_apart(device: impl Fn() -> Option<Cuda<TestDevice>>) {
    let Some(cuda) = device() else { return };
    kernels_apart(&cuda);
    let fixture = Fixture::open(fixture::root().join("cases/int4_channel")).unwrap();
    let mut rank = judge::load(cuda, &fixture, PAGE_SIZE).unwrap();
    let (pages, tokens) = ([2, 0, 1], &fixture.tokens);
    let slice = |range: std::ops::Range<usize>| SequenceSlice {
        token_ids: &tokens[range.clone()],
        computed_len: range.start,
        pages: &pages,
    };
    rank.forward(&Batch::new(PAGE_SIZE, &[slice(0..20)]).unwrap(), None).unwrap();
    let step = greedy_step(Batch::new(PAGE_SIZE, &[slice(20..21)]).unwrap(), [0]);
    assert_eq!((step.targets[0].row, step.targets[0].position), (0, 21));
    let expected = rank.step(&step).unwrap();

    let RecordedStep { whole, kernels } = rank.record_step(&step, true).unwrap().unwrap();
    let layers = Checkpoint::open(&fixture.dir).unwrap().config().num_hidden_layers;
    let count = |name: &str| -> usize {
        kernels.iter().filter(|kernel| kernel.name.starts_with(name)).map(|kernel| kernel.launches).sum()
    };
    // Before attention and before the second half of every layer, and at the end.
    assert_eq!(count("rms_norm"), 2 * layers + 1, "{kernels:?}");
    assert_eq!((count("embed"), count("qkv_norm_rope")), (1, layers), "{kernels:?}");
    rank.kernels().replay(&whole).unwrap();
    assert_eq!(rank.step(&step).unwrap(), expected);

    // Nothing is sampled in the middle of a prompt.
    let middle = greedy_step(Batch::new(PAGE_SIZE, &[slice(20..24)]).unwrap(), []);
    let RecordedStep { kernels, .. } = rank.record_step(&middle, true).unwrap().unwrap();
    assert!(kernels.iter().all(|kernel| !kernel.name.contains("sample")), "{kernels:?}");
}

#[test]
fn launches_are_recorded_kernel_by_kernel_in_emulation() {
    steps_apart(emulated);
}

#[test]
fn launches_are_recorded_kernel_by_kernel_on_a_gpu() {
    steps_apart(on_gpu);
}
