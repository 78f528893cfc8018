//! `latent_rope`.

use super::launch::{Binding, Launch};
use super::paged::cut;
use super::quantise_rows::Layout;
use super::rope::rotary_dim;
use super::shader::{Shader, shader};
use super::tensor::WgpuTensor;
use super::{Wgpu, WgpuBatch, quantise_rows};
use crate::error::Result;
use crate::fp8::MlaRow;
use crate::tensor::{DType, DeviceTensor};

static SHADER: Shader = shader!("latent_rope");

const KERNEL: &str = "latent_rope";

pub(super) fn latent_rope(
    wgpu: &Wgpu,
    batch: &WgpuBatch,
    x: &WgpuTensor,
    weight: &WgpuTensor,
    eps: f64,
    cos_sin: &WgpuTensor,
    cache: &mut WgpuTensor,
) -> Result<()> {
    let tokens = batch.host().num_tokens();
    let [rank] = weight.dims(KERNEL, "weight")?;
    weight.expect_weight(KERNEL, "weight")?;
    let rope = rotary_dim(KERNEL, cos_sin, tokens)?;
    x.expect(KERNEL, "x", x.shape() == [tokens, rank + rope], || format!("[{tokens}, {rank} + {rope}]"))?;
    x.expect_act(KERNEL, "x")?;
    x.expect_even(KERNEL, "x")?;
    let layout = MlaRow { kv_lora_rank: rank, rope };
    let page_size = batch.host().page_size;
    let (windows, page) = cut(wgpu, KERNEL, page_size, cache, (rank + rope, layout.row_bytes()))?;
    let fp8 = cache.dtype() == DType::Fp8;
    if fp8 {
        quantise_rows::check(KERNEL, Layout::Mla(layout))?;
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
                ("WORKGROUP", wgpu.workgroup(((rank + rope) / 2).min(256)).into()),
                ("WEIGHT", weight.weight_type()),
                ("STAGED", fp8.into()),
            ],
            bindings: &[batch.slot_mapping.reads(), x.reads(), weight.reads(), cos_sin.reads(), out],
            params: &[
                tokens as u32,
                rank as u32,
                rope as u32,
                first_slot as u32,
                slots as u32,
                (eps as f32).to_bits(),
            ],
            groups: wgpu.fold(tokens),
            shape: format!("{tokens} tokens, {rank} + {rope} columns, {slots} slots"),
        })
    };
    if fp8 {
        let mut rows = wgpu.tensor(DType::Act, &[tokens, rank + rope])?;
        launch(0, tokens, rows.writes())?;
        return quantise_rows::quantise_rows(wgpu, KERNEL, batch, &rows, Layout::Mla(layout), cache);
    }
    windows.into_iter().try_for_each(|pages| {
        let (first_slot, slots) = (pages.start * page_size, pages.len() * page_size);
        launch(first_slot, slots, cache.writes_window(pages.start * page..pages.end * page))
    })
}
