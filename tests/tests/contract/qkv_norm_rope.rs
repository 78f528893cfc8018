//! `qkv_norm_rope` against the kernels that it is made of, which are compared with the oracle by themselves.

use dsa80_reference::{DType, IndexKeys, Kernels, RopeLayout};
use dsa80_tests::parity::contract;
use dsa80_tests::parity::{BatchCase, Values, assert_same};

use crate::rotary::turns;

#[test]
fn is_what_its_kernels_are() {
    contract::on_wgpu(|kernels| {
        let batch = BatchCase::of(16, &[(3, 4), (0, 2)]);
        let (rows, eps, layout) = (batch.batch.num_tokens(), 1e-5, RopeLayout::Half);
        let act = |width: usize, seed| {
            contract::numbers(kernels, DType::Act, &[rows, width], &Values::Normal.take(seed, rows * width)).1
        };
        let weight = |width: usize, seed| {
            contract::weight(kernels, DType::Bf16, &[width], &Values::Normal.take(seed, width)).1
        };
        let cache = |width: usize| {
            let shape = [batch.pages, batch.batch.page_size, width];
            contract::numbers(kernels, DType::Act, &shape, &vec![7.0; shape.iter().product()]).1
        };
        let (q_a, kv_a, x) = (act(48, 1), act(40, 2), act(16, 3));
        let (q_weight, kv_weight, key_weight, bias) =
            (weight(48, 4), weight(32, 5), weight(16, 6), weight(16, 7));
        let cos_sin = turns(kernels, rows, 8, 8).1;
        let on_device = contract::batch(kernels, &batch.batch).1;
        for with_keys in [false, true] {
            let run = |together: bool| {
                let (mut rows_of_mla, mut keys) = (cache(40), cache(16));
                let mut q_latent = contract::output(kernels, DType::Act, &[rows, 48]).1;
                let index =
                    IndexKeys { x: &x, weight: &key_weight, bias: &bias, eps, layout, cache: &mut keys };
                if together {
                    let index = with_keys.then_some(index);
                    kernels
                        .qkv_norm_rope(
                            &on_device,
                            &q_a,
                            &q_weight,
                            &mut q_latent,
                            &kv_a,
                            &kv_weight,
                            &mut rows_of_mla,
                            eps,
                            &cos_sin,
                            index,
                        )
                        .unwrap();
                } else {
                    kernels.rms_norm(&q_a, &q_weight, eps, &mut q_latent).unwrap();
                    kernels
                        .latent_rope(&on_device, &kv_a, &kv_weight, eps, &cos_sin, &mut rows_of_mla)
                        .unwrap();
                    if with_keys {
                        kernels
                            .layer_norm_rope(
                                &on_device,
                                &x,
                                &key_weight,
                                &bias,
                                eps,
                                layout,
                                &cos_sin,
                                index.cache,
                            )
                            .unwrap();
                    }
                }
                [&q_latent, &rows_of_mla, &keys].map(|tensor| kernels.read(tensor).unwrap()).concat()
            };
            assert_same("everything", 1, &run(true), &run(false));
        }
    });
}
