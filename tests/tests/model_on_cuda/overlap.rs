//! Parts of a step that may overlap: bit for bit what they are one after the other.

use dsa80_cuda::{Cuda, Device, Tiles};
use dsa80_reference::{DType, Error, HostTensor, Kernels};
use dsa80_tests::fixture::{self, Fixture};
use dsa80_tests::parity::{InOrder, devices};
use dsa80_tests::prompt::Run;
use dsa80_tests::{judge, prompt};

use super::{emulated, graphs, on_gpu};

const PAGE_SIZE: usize = 16;

/// The prompt token by token, launched one by one.
fn eagerly<K: Kernels>(kernels: K, fixture: &Fixture, len: usize) -> Run {
    let mut rank = judge::load(kernels, fixture, PAGE_SIZE).unwrap();
    let pages = prompt::scattered_pages(&judge::limits(fixture, PAGE_SIZE), 2);
    prompt::run(&mut rank, &fixture.tokens, &pages, PAGE_SIZE, &prompt::pieces(len, 1)).unwrap()
}

fn in_order<D: Device>(device: D, tiles: Tiles) -> Cuda<InOrder<D>> {
    Cuda::new(InOrder(device), tiles)
}

/// In emulation they do not overlap, and what must not be shared is an error.
#[test]
fn no_part_uses_what_another_writes() {
    for case in ["int4_channel", "groups"] {
        let Some(cuda) = emulated() else { return };
        let fixture = Fixture::open(fixture::root().join("cases").join(case)).unwrap();
        // More than the indexer selects: its scores are computed aside.
        let len = 40;
        let Some(alone) = devices::emulator() else { return };
        let expected = eagerly(in_order(alone, Tiles::default()), &fixture, len);
        assert_eq!(eagerly(cuda, &fixture, len).logits, expected.logits, "{case}");
    }
}

#[test]
fn a_gpu_computes_the_same_in_order_and_not() {
    for case in ["int4_channel", "int4_asym_g32_tp8", "groups"] {
        let fixture = Fixture::open(fixture::root().join("cases").join(case)).unwrap();
        let len = fixture.tokens.len();
        let (Some(gpu), Some(launching), Some(replaying)) = (devices::gpu(), on_gpu(), on_gpu()) else {
            return;
        };
        let tiles = Tiles::for_gpu(&gpu.limits().name, None).unwrap();
        let expected = eagerly(in_order(gpu, tiles), &fixture, len).logits;
        assert_eq!(eagerly(launching, &fixture, len).logits, expected, "{case}");
        assert_eq!(graphs::by_replay(replaying, &fixture, len).logits, expected, "{case}");
    }
}

/// Two products at a time, whose sums several blocks share: each side has a workspace of its own. Either may fail.
fn sides<D: Device>(cuda: &Cuda<D>) {
    let (columns, features, tokens) = (4096, 16, 2);
    let weight = |factor: f32| {
        let numbers = (0..features * columns).map(|i| ((i % 13) as f32 - 6.0) * factor).collect();
        cuda.upload(HostTensor::f32([features, columns], numbers)).unwrap()
    };
    let (one, two) = (weight(0.5), weight(-0.25));
    let mut x = cuda.alloc(DType::Act, &[tokens, columns]).unwrap();
    cuda.write(&vec![1.0; tokens * columns], &mut x).unwrap();
    let [mut a, mut b, mut c, mut d] =
        std::array::from_fn(|_| cuda.alloc(DType::Float, &[tokens, features]).unwrap());
    cuda.linear(&x, &one, &mut c).unwrap();
    cuda.linear(&x, &two, &mut d).unwrap();
    let expected = (cuda.read(&c).unwrap(), cuda.read(&d).unwrap());
    let both = |a: &mut _, b: &mut _| {
        cuda.side_by_side(tokens, || cuda.linear(&x, &one, a), || cuda.linear(&x, &two, b))
    };
    for _ in 0..8 {
        both(&mut a, &mut b).unwrap();
        assert_eq!((cuda.read(&a).unwrap(), cuda.read(&b).unwrap()), expected);
    }

    let refused = || Err(Error::Backend { backend: "test", message: "no".into() });
    for failing in [0, 1] {
        let fails = |side: usize| if side == failing { refused() } else { Ok(()) };
        let of_sides = || {
            let first = || cuda.linear(&x, &one, &mut a).and(fails(0));
            cuda.side_by_side(tokens, first, || cuda.linear(&x, &two, &mut b).and(fails(1)))
        };
        assert_eq!(cuda.record(of_sides).err(), refused().err());
    }
    // Once more as a graph, and none the worse for what failed: neither side, nor the capture, is still open.
    let calls = std::cell::Cell::new(0);
    let failing_in_capture = || {
        calls.set(calls.get() + 1);
        let first = || cuda.linear(&x, &one, &mut a);
        cuda.side_by_side(tokens, first, || if calls.get() > 1 { refused() } else { Ok(()) })
    };
    assert_eq!(cuda.record(failing_in_capture).err(), refused().err());
    let graph = cuda.record(|| both(&mut a, &mut b)).unwrap().unwrap();
    cuda.write(&vec![0.0; tokens * features], &mut a).unwrap();
    cuda.write(&vec![0.0; tokens * features], &mut b).unwrap();
    cuda.replay(&graph).unwrap();
    assert_eq!((cuda.read(&a).unwrap(), cuda.read(&b).unwrap()), expected);
}

/// Two products at a time with one workspace are what `side_by_side` must not do: in emulation that is seen.
#[test]
fn a_workspace_that_both_sides_use_is_an_error() {
    let Some(cuda) = emulated() else { return };
    let weight = cuda.upload(HostTensor::f32([16, 4096], vec![0.5; 16 * 4096])).unwrap();
    let mut x = cuda.alloc(DType::Act, &[2, 4096]).unwrap();
    cuda.write(&[1.0; 2 * 4096], &mut x).unwrap();
    let [mut a, mut b] = std::array::from_fn(|_| cuda.alloc(DType::Float, &[2, 16]).unwrap());
    cuda.device().aside(|| cuda.linear(&x, &weight, &mut a)).unwrap();
    cuda.linear(&x, &weight, &mut b).unwrap();
    let error = cuda.device().join().unwrap_err().to_string();
    assert!(error.contains("`linear parts` is used by launches that may overlap"), "{error}");
}

#[test]
fn two_sides_are_joined_whether_they_fail_or_not() {
    if let Some(cuda) = emulated() {
        sides(&cuda);
    }
    if let Some(cuda) = on_gpu() {
        sides(&cuda);
    }
}
