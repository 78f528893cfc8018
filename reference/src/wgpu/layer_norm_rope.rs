//! `layer_norm_rope`.

use super::launch::{Binding, Launch};
use super::paged::cut;
use super::quantise_rows::Layout;
use super::rope::rotary_dim;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuBatch, quantise_rows};
use crate::error::Result;
use crate::fp8::IndexerPage;
use crate::kernels::RopeLayout;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("layer_norm_rope");

const KERNEL: &str = "layer_norm_rope";

pub(super) fn layer_norm_rope(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    x: &WgpuTensor,
    weight: &WgpuTensor,
    bias: &WgpuTensor,
    eps: f64,
    layout: RopeLayout,
    cos_sin: &WgpuTensor,
    cache: &mut WgpuTensor,
) -> Result<()> {
    let tokens = batch.host().num_tokens();
    let [rows, width] = x.dims(KERNEL, "x")?;
    x.expect(KERNEL, "x", rows == tokens && width > 0, || format!("[{tokens}, D]"))?;
    x.expect_act(KERNEL, "x")?;
    x.expect_even(KERNEL, "x")?;
    for (name, tensor) in [("weight", weight), ("bias", bias)] {
        tensor.expect_shape(KERNEL, name, &[width])?;
        tensor.expect_weight(KERNEL, name)?;
    }
    let dim = rotary_dim(KERNEL, cos_sin, tokens)?;
    cos_sin.expect(KERNEL, "cos_sin", dim <= width, || format!("at most {width} rotary columns"))?;
    let page_size = batch.host().page_size;
    let layout_of_page = IndexerPage { page_size, width };
    let (windows, page) = cut(wgpu, KERNEL, page_size, cache, (width, layout_of_page.row_bytes()))?;
    let fp8 = cache.dtype() == DType::Fp8;
    if fp8 {
        quantise_rows::check(KERNEL, Layout::Indexer(layout_of_page))?;
    }
    if tokens == 0 || cache.len() == 0 {
        return Ok(());
    }
    let launch = |first_slot: usize, slots: usize, out: Binding<'_>| {
        wgpu.launch(&Launch {
            kernel: KERNEL,
            shader: &SHADER,
            entry: "main",
            constants: &[
                ("WORKGROUP", wgpu.workgroup((width / 2).min(128)).into()),
                ("WEIGHT", weight.weight_type()),
                ("BIAS", bias.weight_type()),
                ("WIDTH", width as f64),
                ("DIM", dim as f64),
                ("HALF", (layout == RopeLayout::Half).into()),
                ("STAGED", fp8.into()),
            ],
            bindings: &[
                batch.slot_mapping.reads(),
                x.reads(),
                weight.reads(),
                bias.reads(),
                cos_sin.reads(),
                out,
            ],
            params: &[tokens as u32, first_slot as u32, slots as u32, (eps as f32).to_bits()],
            groups: wgpu.fold(tokens),
            shape: format!("{tokens} tokens of {width}, {dim} rotary, {slots} slots"),
        })
    };
    if fp8 {
        let mut rows = wgpu.tensor(DType::Act, &[tokens, width])?;
        launch(0, tokens, rows.writes())?;
        let layout = Layout::Indexer(layout_of_page);
        return quantise_rows::quantise_rows(wgpu, KERNEL, batch, &rows, layout, cache);
    }
    windows.into_iter().try_for_each(|pages| {
        let (first_slot, slots) = (pages.start * page_size, pages.len() * page_size);
        launch(first_slot, slots, cache.writes_window(pages.start * page..pages.end * page))
    })
}
