//! What activations are on the device.

use crate::tensor::DType;

/// The type of activations, and of caches of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActType {
    /// Rounded wherever the contract says so; `act_bf16.wgsl`.
    #[default]
    Bf16,
    /// Never rounded to bf16; `act_f32.wgsl`. Takes twice the memory, and no matrices of halves.
    F32,
}

impl ActType {
    /// Bytes of an element of `Act`.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// Bytes of an element on the device.
    pub(super) fn element_bytes(self, dtype: DType) -> usize {
        match dtype {
            DType::Fp8 => 1,
            DType::Act => self.bytes(),
            DType::Bf16 | DType::F16 => 2,
            DType::Float | DType::Index | DType::F32 => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::kernels::Kernels;
    use crate::tensor::{DType, HostTensor};
    use crate::wgpu::{ActType, Wgpu, WgpuContext};

    /// What a third is afterwards, and its square root of a mean of squares, which is itself.
    fn third(act: ActType) -> Option<[f64; 2]> {
        let wgpu = Wgpu::new(WgpuContext::of_tests_in(act)?);
        let (mut x, mut out) =
            (wgpu.alloc(DType::Act, &[1, 8]).unwrap(), wgpu.alloc(DType::Act, &[1, 8]).unwrap());
        wgpu.write(&[1.0 / 3.0; 8], &mut x).unwrap();
        let weight = wgpu.upload(HostTensor::f32([8], vec![1.0 / 3.0; 8])).unwrap();
        wgpu.rms_norm(&x, &weight, 0.0, &mut out).unwrap();
        Some([&x, &out].map(|tensor| wgpu.read(tensor).unwrap()[7]))
    }

    #[test]
    fn activations_are_rounded_in_bf16_alone() {
        let Some(rounded) = third(ActType::Bf16) else { return };
        let nearest = half::bf16::from_f64(1.0 / 3.0).to_f64();
        assert_eq!(rounded, [nearest; 2]);
        let [stored, normed] = third(ActType::F32).unwrap();
        assert_eq!(stored, f64::from(1.0_f32 / 3.0));
        assert!((normed - 1.0 / 3.0).abs() < 1e-7, "{normed}");
    }
}
