//! Tensors on the device: conversions, and refusals in the oracle's words.

use dsa80_cuda::Cuda;
use dsa80_reference::cpu::Cpu;
use dsa80_reference::{Batch, DType, DeviceTensor, Error, HostData, HostTensor, Kernels, SequenceSlice};
use dsa80_tests::parity::TestDevice;
use half::{bf16, f16};

use super::{emulated, on_gpu};

fn on_every_device(body: impl Fn(&Cuda<TestDevice>)) {
    emulated().iter().chain(&on_gpu()).for_each(body);
}

#[test]
fn what_is_written_is_read_rounded_to_its_type() {
    // To nearest even, once: 1 + 2^-8 is half way between bf16's 1 and 1 + 2^-7; a little more is not.
    let values = [0.1, 1.0 + 2f64.powi(-8), 1.0 + 2f64.powi(-8) + 2f64.powi(-40), -0.0, f64::INFINITY];
    on_every_device(|cuda| {
        for (dtype, expected) in [
            (DType::Act, values.map(|x| bf16::from_f64(x).to_f64())),
            (DType::Float, values.map(|x| f64::from(x as f32))),
        ] {
            let mut tensor = cuda.alloc(dtype, &[values.len()]).unwrap();
            cuda.write(&values, &mut tensor).unwrap();
            assert_eq!(cuda.read(&tensor).unwrap(), expected);
        }
        let mut index = cuda.alloc(DType::Index, &[2]).unwrap();
        cuda.write_index(&[-1, i32::MAX], &mut index).unwrap();
        assert_eq!(cuda.read_index(&index).unwrap(), [-1, i32::MAX]);
        let mut bytes = cuda.alloc(DType::Fp8, &[3]).unwrap();
        cuda.write_bytes(&[0, 0x7f, 0xff], &mut bytes).unwrap();
        assert_eq!(cuda.read_bytes(&bytes).unwrap(), [0, 0x7f, 0xff]);
    });
}

#[test]
fn weights_keep_their_type_and_value() {
    let values = [1.5_f32, -0.25, 1.0 / 3.0];
    let weights = [
        HostData::F32(values.to_vec().into()),
        HostData::F16(values.map(f16::from_f32).to_vec().into()),
        HostData::Bf16(values.map(bf16::from_f32).to_vec().into()),
    ];
    on_every_device(|cuda| {
        for data in weights.clone() {
            let host = HostTensor { shape: vec![3, 1], data };
            let tensor = cuda.upload(host.clone()).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (host.dtype(), &[3, 1][..]));
            let expected: Vec<f64> = host.to_f32().into_iter().map(f64::from).collect();
            assert_eq!(cuda.read(&tensor).unwrap(), expected);
        }
    });
}

/// The same mistakes on both backends give the same words, but for the backend's name.
#[test]
fn refusals_are_the_oracles() {
    fn refusals<K: Kernels>(kernels: &K) -> Vec<Error> {
        let alloc = |dtype| kernels.alloc(dtype, &[2]).unwrap();
        let (mut index, mut float, mut bytes) = (alloc(DType::Index), alloc(DType::Float), alloc(DType::Fp8));
        let short = HostTensor { shape: vec![2, 2], data: HostData::F32(vec![0.0; 3].into()) };
        vec![
            kernels.read(&index).unwrap_err(),
            kernels.read(&bytes).unwrap_err(),
            kernels.read_index(&float).unwrap_err(),
            kernels.read_bytes(&float).unwrap_err(),
            kernels.write(&[0.0; 2], &mut index).unwrap_err(),
            kernels.write(&[0.0; 3], &mut float).unwrap_err(),
            kernels.write_index(&[0; 2], &mut float).unwrap_err(),
            kernels.write_index(&[0], &mut index).unwrap_err(),
            kernels.write_bytes(&[1], &mut bytes).unwrap_err(),
            kernels.write_bytes(&[1, 2], &mut float).unwrap_err(),
            float.set_shape(&[3]).unwrap_err(),
            kernels.upload(short).err().unwrap(),
        ]
    }
    on_every_device(|cuda| assert_eq!(refusals(cuda), refusals(&Cpu::<f32>::new())));
}

#[test]
fn absurd_sizes_and_batches_that_are_too_large_are_errors() {
    on_every_device(|cuda| {
        for shape in [[usize::MAX, 2], [1 << 40, 1 << 40]] {
            let error = cuda.alloc(DType::Float, &shape).err().unwrap();
            assert!(error.to_string().contains("not enough memory"), "{error}");
        }
        let slice = SequenceSlice { token_ids: &[1, 2, 3], computed_len: 0, pages: &[4, 5] };
        let batch = Batch::new(2, &[slice]).unwrap();
        cuda.upload_batch(&batch, &mut cuda.alloc_batch(3, 1, 2).unwrap()).unwrap();
        for (max_tokens, max_seqs, max_blocks) in [(2, 1, 2), (3, 0, 2), (3, 1, 1)] {
            let mut device = cuda.alloc_batch(max_tokens, max_seqs, max_blocks).unwrap();
            assert!(matches!(cuda.upload_batch(&batch, &mut device), Err(Error::Capacity { .. })));
        }
    });
}
