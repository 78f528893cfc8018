//! Caches and logits of more bytes than the adapter binds at once.

use dsa80_reference::wgpu::Wgpu;
use dsa80_reference::{DType, Kernels, Result};
use dsa80_tests::parity::contract::{self, Backend};
use dsa80_tests::parity::{BatchCase, Values};

/// The backend with bindings of so many activations gives what the one with large ones gives.
fn assert_same_with_bindings_of(elements: usize, run: impl Fn(&Backend<'_, Wgpu>) -> Vec<f64>) {
    contract::with_small_bindings(elements, |small| {
        contract::on_wgpu(|large| {
            if small.context().name() == large.context().name() {
                assert_eq!(run(small), run(large));
            }
        });
    });
}

/// `kv_lora_rank` and columns of a row: for lanes alone, and for matrices where an adapter has them.
const NARROW: [usize; 2] = [64, 80];
const OF_MATRICES: [usize; 2] = [512, 576];

fn act(kernels: &Backend<'_, Wgpu>, shape: &[usize], seed: u64) -> <Wgpu as Kernels>::Tensor {
    contract::numbers(kernels, DType::Act, shape, &Values::Normal.take(seed, shape.iter().product())).1
}

/// Attention of two tokens at the end of `context` tokens: four rows of `width` numbers are a page.
fn attention(kernels: &Backend<'_, Wgpu>, context: usize, [rank, width]: [usize; 2]) -> Result<Vec<f64>> {
    let case = BatchCase::of(4, &[(context, 2)]);
    let batch = contract::batch(kernels, &case.batch).1;
    let (q, cache) = (act(kernels, &[2, 8, width], 1), act(kernels, &[case.pages, 4, width], 2));
    let places: Vec<i32> = (0..80).map(|i| (i * 7 % context) as i32).collect();
    let topk_indices = contract::index(kernels, &[2, 40], &places).1;
    let mut out = contract::output(kernels, DType::Act, &[2, 8, rank]).1;
    kernels.sparse_mla(&batch, &q, &cache, &topk_indices, 0.3, &mut out)?;
    kernels.read(&out)
}

#[test]
fn sparse_mla_gathers_from_all_of_them() {
    assert_same_with_bindings_of(2048, |kernels| attention(kernels, 85, NARROW).unwrap());
    assert_same_with_bindings_of(2048 * 576 / 80, |kernels| attention(kernels, 85, OF_MATRICES).unwrap());
}

#[test]
fn more_than_four_are_refused() {
    contract::with_small_bindings(2048, |kernels| {
        let error = attention(kernels, 120, NARROW).unwrap_err().to_string();
        assert!(
            error.contains("sparse_mla: `cache`") && error.contains("4 of the adapter's bindings"),
            "{error}"
        );
    });
}

#[test]
fn indexer_logits_reads_all_of_them() {
    logits_are_same(512, 16);
    // By matrices, where an adapter has them.
    logits_are_same(4096, 128);
}

fn logits_are_same(elements: usize, width: usize) {
    assert_same_with_bindings_of(elements, |kernels| {
        let case = BatchCase::of(4, &[(95, 2)]);
        let batch = contract::batch(kernels, &case.batch).1;
        let (q, cache) = (act(kernels, &[2, 4, width], 1), act(kernels, &[case.pages, 4, width], 2));
        let weights = contract::numbers(kernels, DType::Float, &[2, 4], &Values::Normal.take(3, 8)).1;
        // A column that nobody sees has the same poison on both.
        let mut logits = contract::numbers(kernels, DType::Float, &[2, 98], &[7.0; 196]).1;
        kernels.indexer_logits(&batch, 0..2, &q, &weights, &cache, 0.1, &mut logits).unwrap();
        kernels.read(&logits).unwrap()
    });
}

#[test]
fn top_k_reads_rows_of_all_of_them() {
    assert_same_with_bindings_of(512, |kernels| {
        let batch = contract::batch(kernels, &BatchCase::of(4, &[(40, 12)]).batch).1;
        let scores = Values::Normal.take(1, 12 * 64);
        let logits = contract::numbers(kernels, DType::Float, &[12, 64], &scores).1;
        let mut out = contract::index(kernels, &[12, 8], &[-7; 96]).1;
        kernels.top_k(&batch, 0..12, &logits, &mut out).unwrap();
        kernels.read_index(&out).unwrap().into_iter().map(f64::from).collect()
    });
}

/// Experts of more than one binding, and more tokens than one launch has.
#[test]
fn experts_of_several_bindings_are_those_of_one() {
    assert_same_with_bindings_of(8192, |kernels| {
        let (hidden, intermediate, experts, tokens, top_k) = (32, 32, 5, 70, 2);
        let weight = |out: usize, inner: usize, seed| {
            let values = Values::Normal.take(seed, out * inner);
            let values: Vec<f64> = values.iter().map(|x| 0.2 * x).collect();
            dsa80_reference::HostLinear::Dense(contract::host_weight(DType::F32, &[out, inner], &values))
        };
        let layer = (0..experts).map(|e| dsa80_reference::HostExpert {
            gate_proj: weight(intermediate, hidden, 10 * e),
            up_proj: weight(intermediate, hidden, 10 * e + 1),
            down_proj: weight(hidden, intermediate, 10 * e + 2),
        });
        let experts_on_device = kernels.upload_experts(layer.collect()).unwrap();
        let x = act(kernels, &[tokens, hidden], 1);
        let ids: Vec<i32> = (0..tokens * top_k).map(|i| (i * 3 % experts as usize) as i32).collect();
        let topk_ids = contract::index(kernels, &[tokens, top_k], &ids).1;
        let weights = Values::Normal.take(4, tokens * top_k);
        let topk_weights = contract::numbers(kernels, DType::Float, &[tokens, top_k], &weights).1;
        let mut out = contract::output(kernels, DType::Act, &[tokens, hidden]).1;
        kernels.moe(&x, &topk_ids, &topk_weights, &experts_on_device, None, &mut out).unwrap();
        kernels.read(&out).unwrap()
    });
}
