//! The oracle: every kernel in plain Rust, generic over f32 and f64, rayon over rows.

mod communicator;
mod real;
mod tensor;

pub use communicator::ThreadCommunicator;
pub use real::Real;
pub use tensor::CpuTensor;

/// The CPU backend.
///
/// In f64 it judges every other backend; in f32 it serves on a machine without a GPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu<F> {
    rounds: bool,
    float: std::marker::PhantomData<F>,
}

impl<F: Real> Cpu<F> {
    /// The oracle without intermediate rounding.
    pub fn new() -> Self {
        Self { rounds: false, float: std::marker::PhantomData }
    }

    /// The oracle that rounds to bf16 exactly where the contract says that GPU backends do.
    pub fn rounding_to_bf16() -> Self {
        Self { rounds: true, float: std::marker::PhantomData }
    }

    /// Applies a rounding point of the contract.
    #[inline(always)]
    pub(crate) fn act(&self, value: F) -> F {
        if self.rounds { value.round_bf16() } else { value }
    }
}
