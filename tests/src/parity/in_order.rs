//! A device on which nothing overlaps: what one that may overlap must compute as well.

use dsa80_cuda::{Device, Gemm, Launch, Limits};
use dsa80_reference::Result;

/// The device, but for launches aside, which it does not know.
#[derive(Debug)]
pub struct InOrder<D>(pub D);

impl<D: Device> Device for InOrder<D> {
    type Buffer = D::Buffer;
    type Graph = D::Graph;

    fn limits(&self) -> &Limits {
        self.0.limits()
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<D::Buffer> {
        self.0.alloc(name, bytes)
    }

    fn write(&self, buffer: &D::Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        self.0.write(buffer, offset, bytes)
    }

    fn read(&self, buffer: &D::Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.0.read(buffer, offset, bytes)
    }

    fn launch(&self, launch: &Launch<'_, D::Buffer>) -> Result<()> {
        self.0.launch(launch)
    }

    fn capture(&self, launches: impl FnMut() -> Result<()>) -> Result<D::Graph> {
        self.0.capture(launches)
    }

    fn replay(&self, graph: &D::Graph) -> Result<()> {
        self.0.replay(graph)
    }

    fn gemm(&self, product: &Gemm<'_, D::Buffer>) -> Result<bool> {
        self.0.gemm(product)
    }
}
