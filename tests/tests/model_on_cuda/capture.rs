//! Launches of the backend in a graph: not the first of their size, which allocates.

use dsa80_cuda::Cuda;
use dsa80_reference::{DType, HostTensor, Kernels};
use dsa80_tests::parity::devices;

#[test]
fn a_launch_can_be_captured_once_its_workspace_is_there() {
    if devices::gpu().is_none() {
        return;
    }
    let cuda = Cuda::open().unwrap();
    let weight: Vec<f32> = (0..16 * 32).map(|i| (i % 7) as f32 - 3.0).collect();
    let weight = cuda.upload(HostTensor::f32([16, 32], weight)).unwrap();
    let mut x = cuda.alloc(DType::Act, &[4, 32]).unwrap();
    cuda.write(&[1.0; 4 * 32], &mut x).unwrap();
    let mut out = cuda.alloc(DType::Float, &[4, 16]).unwrap();

    let error = cuda.device().capture(|| cuda.linear(&x, &weight, &mut out)).unwrap_err().to_string();
    assert!(error.contains("cannot be allocated while launches are captured"), "{error}");

    cuda.linear(&x, &weight, &mut out).unwrap();
    let expected = cuda.read(&out).unwrap();
    let graph = cuda.device().capture(|| cuda.linear(&x, &weight, &mut out)).unwrap();
    cuda.write(&[f64::NAN; 4 * 16], &mut out).unwrap();
    graph.launch().unwrap();
    assert_eq!(cuda.read(&out).unwrap(), expected);
}
