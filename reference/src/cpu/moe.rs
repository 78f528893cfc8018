//! `moe`: routed experts in any mix of formats,
//! `out[t] = shared[t] + sum_k topk_weights[t, k] * expert_e(x[t])`, `e = topk_ids[t, k]`,
//! `expert_e(x) = down_e(silu(gate_e x) * up_e x)`.
//!
//! Tokens are grouped by expert, so that an expert's weights are read once a step and those of an expert that
//! nobody chose not at all. What the experts give is kept per (token, k) and summed in the order of `k`: a
//! token's result does not depend on who shares its experts. Rounds after `silu * up` and at the end. An
//! expert that does not exist is an error; a repeated one counts twice.

use super::any_linear::AnyLinear;
use super::checks::Check;
use super::parallel::for_rows;
use super::silu_mul::swiglu;
use super::{Cpu, CpuTensor, Real};
use crate::error::{Error, Result};
use crate::tensor::{HostExpert, HostLinear};

/// The routed experts of one layer, each projection in its own format.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuExperts {
    experts: Vec<Expert>,
    hidden: usize,
    moe_intermediate: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct Expert {
    gate_proj: AnyLinear,
    up_proj: AnyLinear,
    down_proj: AnyLinear,
}

impl CpuExperts {
    pub(super) fn from_host(experts: Vec<HostExpert>) -> Result<Self> {
        upload(experts, "upload_experts")
    }

    /// Refuses what [`check_int4`] does.
    pub(super) fn from_host_int4(experts: Vec<HostExpert>) -> Result<Self> {
        check_int4(&experts)?;
        upload(experts, "upload_experts_int4")
    }
}

/// Refuses what `moe_int4` does not take: a dense projection, or group sizes that differ between experts
/// or between gate and up.
pub(crate) fn check_int4(experts: &[HostExpert]) -> Result<()> {
    let mut group_sizes = [None; 2];
    for (e, expert) in experts.iter().enumerate() {
        for (name, weight) in projections(expert) {
            let refuse = |expected: String, found: String| Error::Value {
                kernel: "upload_experts_int4",
                name,
                expected,
                found: format!("{found} in expert {e}"),
            };
            match weight.int4_group_size() {
                None => {
                    return Err(refuse("INT4 (use `upload_experts` and `moe`)".into(), "unquantised".into()));
                }
                Some(group_size) => {
                    let of = &mut group_sizes[usize::from(name == "down_proj")];
                    let first = *of.get_or_insert(group_size);
                    if group_size != first {
                        let found = format!("groups of {group_size}");
                        return Err(refuse(format!("groups of {first} as in expert 0"), found));
                    }
                }
            }
        }
    }
    Ok(())
}

fn projections(expert: &HostExpert) -> [(&'static str, &HostLinear); 3] {
    [("gate_proj", &expert.gate_proj), ("up_proj", &expert.up_proj), ("down_proj", &expert.down_proj)]
}

/// Fails unless there are experts, all of the same dimensions: `(moe_intermediate, hidden)`.
pub(crate) fn check_dims(experts: &[HostExpert], kernel: &'static str) -> Result<(usize, usize)> {
    let Some(first) = experts.first() else {
        return Err(Check(kernel).bad_value("experts", "at least one".into(), 0));
    };
    first.gate_proj.check(kernel, "gate_proj")?;
    let (moe_intermediate, hidden) = first.gate_proj.dims();
    for expert in experts {
        for (tensor, weight) in projections(expert) {
            weight.check(kernel, tensor)?;
            let transposed = tensor == "down_proj";
            let expected = if transposed { (hidden, moe_intermediate) } else { (moe_intermediate, hidden) };
            let (out_features, in_features) = weight.dims();
            if (out_features, in_features) != expected {
                return Err(Error::Shape {
                    kernel,
                    tensor,
                    expected: format!("{:?}", [expected.0, expected.1]),
                    found: vec![out_features, in_features],
                });
            }
        }
    }
    Ok((moe_intermediate, hidden))
}

fn upload(experts: Vec<HostExpert>, kernel: &'static str) -> Result<CpuExperts> {
    let (moe_intermediate, hidden) = check_dims(&experts, kernel)?;
    let experts = experts.into_iter().map(|expert| {
        Ok(Expert {
            gate_proj: AnyLinear::from_host(expert.gate_proj)?,
            up_proj: AnyLinear::from_host(expert.up_proj)?,
            down_proj: AnyLinear::from_host(expert.down_proj)?,
        })
    });
    Ok(CpuExperts { experts: experts.collect::<Result<_>>()?, hidden, moe_intermediate })
}

pub(super) fn moe<F: Real>(
    cpu: &Cpu<F>,
    x: &CpuTensor<F>,
    topk_ids: &CpuTensor<F>,
    topk_weights: &CpuTensor<F>,
    experts: &CpuExperts,
    shared: Option<&CpuTensor<F>>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    routed(cpu, "moe", x, topk_ids, topk_weights, experts, shared, out)
}

/// The tokens of one expert and the place for their results.
struct Task<'a, F> {
    expert: &'a Expert,
    /// Pairs `t * K + k`.
    pairs: &'a [usize],
    /// `[pairs, hidden]`.
    out: &'a mut [F],
}

/// `moe` under the name of the kernel that was called.
pub(super) fn routed<F: Real>(
    cpu: &Cpu<F>,
    kernel: &'static str,
    x: &CpuTensor<F>,
    topk_ids: &CpuTensor<F>,
    topk_weights: &CpuTensor<F>,
    experts: &CpuExperts,
    shared: Option<&CpuTensor<F>>,
    out: &mut CpuTensor<F>,
) -> Result<()> {
    let check = Check(kernel);
    let hidden = experts.hidden;
    let [tokens, top_k] = topk_ids.dims(kernel, "topk_ids")?;
    x.expect_shape(kernel, "x", &[tokens, hidden])?;
    topk_weights.expect_shape(kernel, "topk_weights", &[tokens, top_k])?;
    out.expect_shape(kernel, "out", &[tokens, hidden])?;
    if let Some(shared) = shared {
        shared.expect_shape(kernel, "shared", &[tokens, hidden])?;
    }
    let x = check.act("x", x)?;
    let ids = topk_ids.indices(kernel, "topk_ids")?;
    let topk_weights = check.float("topk_weights", topk_weights)?;
    let shared = shared.map(|shared| check.act("shared", shared)).transpose()?;
    let out = check.act_mut("out", out)?;

    let groups = group_by_expert(check, ids, experts.experts.len())?;
    let mut results = vec![F::zero(); ids.len() * hidden];
    let mut tasks = Vec::new();
    let mut rest = results.as_mut_slice();
    for (expert, pairs) in experts.experts.iter().zip(groups.pairs_by_expert()) {
        let (out, tail) = rest.split_at_mut(pairs.len() * hidden);
        rest = tail;
        if !pairs.is_empty() {
            tasks.push(Task { expert, pairs, out });
        }
    }
    let ops = 3 * ids.len() * hidden * experts.moe_intermediate;
    for_rows(&mut tasks, 1, ops, |_, task| {
        for task in task {
            run(cpu, x, top_k, experts, task);
        }
    });

    for_rows(out, hidden, ids.len() * hidden, |t, out| {
        out.fill(F::zero());
        for pair in t * top_k..(t + 1) * top_k {
            let result = &results[groups.places[pair] * hidden..][..hidden];
            for (out, &value) in out.iter_mut().zip(result) {
                *out += topk_weights[pair] * value;
            }
        }
        for (i, out) in out.iter_mut().enumerate() {
            let shared = shared.map_or(F::zero(), |shared| shared[t * hidden + i]);
            *out = cpu.act(shared + *out);
        }
    });
    Ok(())
}

/// One expert on all of its tokens.
fn run<F: Real>(cpu: &Cpu<F>, x: &[F], top_k: usize, experts: &CpuExperts, task: &mut Task<'_, F>) {
    let (hidden, intermediate) = (experts.hidden, experts.moe_intermediate);
    let rows: Vec<F> =
        task.pairs.iter().flat_map(|pair| &x[pair / top_k * hidden..][..hidden]).copied().collect();
    let mut gate = vec![F::zero(); task.pairs.len() * intermediate];
    let mut up = gate.clone();
    let mut activated = gate.clone();
    task.expert.gate_proj.apply(&rows, &mut gate);
    task.expert.up_proj.apply(&rows, &mut up);
    swiglu(cpu, &gate, &up, &mut activated);
    task.expert.down_proj.apply(&activated, task.out);
}

/// (token, k) pairs sorted by expert; those of one expert stay in order.
struct Groups {
    /// `[E + 1]` offsets into `pairs`.
    starts: Vec<usize>,
    /// Pairs `t * K + k`.
    pairs: Vec<usize>,
    /// Where pair `p` lies in `pairs`.
    places: Vec<usize>,
}

impl Groups {
    fn pairs_by_expert(&self) -> impl Iterator<Item = &[usize]> {
        self.starts.windows(2).map(|range| &self.pairs[range[0]..range[1]])
    }
}

/// A counting sort of `ids`, `[T, K]`, which must lie in `0..num_experts`.
fn group_by_expert(check: Check, ids: &[i32], num_experts: usize) -> Result<Groups> {
    let mut starts = vec![0; num_experts + 1];
    for &id in ids {
        let expert = usize::try_from(id).ok().filter(|&expert| expert < num_experts);
        let expert = expert
            .ok_or_else(|| check.bad_value("topk_ids", format!("an expert below {num_experts}"), id))?;
        starts[expert + 1] += 1;
    }
    for e in 0..num_experts {
        starts[e + 1] += starts[e];
    }
    let mut next = starts.clone();
    let (mut pairs, mut places) = (vec![0; ids.len()], vec![0; ids.len()]);
    for (pair, &id) in ids.iter().enumerate() {
        let place = &mut next[id as usize];
        (pairs[*place], places[pair]) = (pair, *place);
        *place += 1;
    }
    Ok(Groups { starts, pairs, places })
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::testing::{index, int4, randoms, read, tensor};
    use crate::kernels::Kernels;
    use crate::tensor::{DType, HostTensor};

    const HIDDEN: usize = 40;
    const INTERMEDIATE: usize = 24;
    const EXPERTS: usize = 5;

    fn int4_expert(e: usize) -> HostExpert {
        let seed = 100 * e as u64;
        HostExpert {
            gate_proj: HostLinear::Int4(int4(INTERMEDIATE, HIDDEN, 8, e % 2 == 1, seed)),
            up_proj: HostLinear::Int4(int4(INTERMEDIATE, HIDDEN, 8, false, seed + 10)),
            down_proj: HostLinear::Int4(int4(HIDDEN, INTERMEDIATE, 8, false, seed + 20)),
        }
    }

    fn int4_experts() -> Vec<HostExpert> {
        (0..EXPERTS).map(int4_expert).collect()
    }

    fn dense(weight: &HostLinear) -> HostTensor {
        weight.clone().dense()
    }

    /// `weight x` in f64, term by term.
    fn apply(weight: &HostLinear, x: &[f64]) -> Vec<f64> {
        let rows = dense(weight).to_f32();
        rows.chunks(x.len()).map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
    }

    /// The formula for one token, as it is written; `round` stands at the rounding points.
    fn naive(
        experts: &[HostExpert],
        x: &[f64],
        chosen: &[(i32, f64)],
        shared: &[f64],
        round: impl Fn(f64) -> f64,
    ) -> Vec<f64> {
        let mut out = vec![0.0; x.len()];
        for &(e, weight) in chosen {
            let expert = &experts[e as usize];
            let (gate, up) = (apply(&expert.gate_proj, x), apply(&expert.up_proj, x));
            let silu = |g: f64| g / (1.0 + (-g).exp());
            let activated: Vec<f64> = gate.iter().zip(&up).map(|(&g, up)| round(silu(g) * up)).collect();
            for (out, y) in out.iter_mut().zip(apply(&expert.down_proj, &activated)) {
                *out += weight * y;
            }
        }
        out.iter().zip(shared).map(|(out, shared)| round(shared + out)).collect()
    }

    /// A step of seven tokens, three experts each. Nobody chooses expert 3; token 0 chooses expert 1 twice.
    struct Step {
        x: Vec<f64>,
        ids: Vec<i32>,
        weights: Vec<f64>,
        shared: Vec<f64>,
    }

    const TOKENS: usize = 7;
    const TOP_K: usize = 3;

    fn step() -> Step {
        let mut ids: Vec<i32> = (0..TOKENS * TOP_K).map(|p| [4, 0, 1, 0, 2][(p * p + p / 3) % 5]).collect();
        (ids[0], ids[1]) = (1, 1);
        assert!(!ids.contains(&3));
        Step {
            x: randoms(1, TOKENS * HIDDEN),
            ids,
            weights: randoms(2, TOKENS * TOP_K),
            shared: randoms(3, TOKENS * HIDDEN),
        }
    }

    fn run_step<F: Real>(cpu: &Cpu<F>, experts: &CpuExperts, step: &Step, shared: bool) -> Vec<f64> {
        let tokens = step.x.len() / HIDDEN;
        let x = tensor(DType::Act, &[tokens, HIDDEN], &step.x);
        let ids = index(&[tokens, TOP_K], &step.ids);
        let weights = tensor(DType::Float, &[tokens, TOP_K], &step.weights);
        let shared = shared.then(|| tensor(DType::Act, &[tokens, HIDDEN], &step.shared));
        let mut out = tensor(DType::Act, &[tokens, HIDDEN], &vec![f64::NAN; step.x.len()]);
        cpu.moe(&x, &ids, &weights, experts, shared.as_ref(), &mut out).unwrap();
        read(&out)
    }

    fn naive_step(
        experts: &[HostExpert],
        step: &Step,
        shared: bool,
        round: impl Fn(f64) -> f64 + Copy,
    ) -> Vec<f64> {
        let mut expected = Vec::new();
        for (t, x) in step.x.chunks(HIDDEN).enumerate() {
            let pairs = t * TOP_K..(t + 1) * TOP_K;
            let chosen: Vec<_> = pairs.map(|p| (step.ids[p], step.weights[p])).collect();
            let shared: Vec<f64> =
                step.shared[t * HIDDEN..][..HIDDEN].iter().map(|&x| if shared { x } else { 0.0 }).collect();
            expected.extend(naive(experts, x, &chosen, &shared, round));
        }
        expected
    }

    fn assert_near(found: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!(
                (found - expected).abs() <= tolerance * expected.abs().max(1.0),
                "{i}: {found} {expected}"
            );
        }
    }

    #[test]
    fn int4_experts_match_the_naive_loop() {
        let (host, step) = (int4_experts(), step());
        let cpu = Cpu::<f64>::new();
        let experts = cpu.upload_experts_int4(host.clone()).unwrap();
        for shared in [false, true] {
            let expected = naive_step(&host, &step, shared, |x| x);
            assert_near(&run_step(&cpu, &experts, &step, shared), &expected, 1e-13);
        }
        let cpu = Cpu::<f32>::new();
        assert_near(&run_step(&cpu, &experts, &step, true), &naive_step(&host, &step, true, |x| x), 1e-5);
    }

    #[test]
    fn rounds_after_the_activation_and_at_the_end() {
        let (host, step) = (int4_experts(), step());
        let cpu = Cpu::<f64>::rounding_to_bf16();
        let experts = cpu.upload_experts(host.clone()).unwrap();
        let expected = naive_step(&host, &step, true, f64::round_bf16);
        // Bit for bit but where the order of a sum decides a tie, which these values have none of.
        assert_eq!(run_step(&cpu, &experts, &step, true), expected);
    }

    #[test]
    fn mixed_formats_match_the_naive_loop() {
        let mut host = int4_experts();
        host[0].gate_proj = HostLinear::Dense(dense(&host[0].gate_proj));
        let down = dense(&host[4].down_proj).to_f32().into_iter().map(bf16::from_f32).collect();
        host[4].down_proj = HostLinear::Dense(HostTensor::bf16([HIDDEN, INTERMEDIATE], down));
        let cpu = Cpu::<f64>::new();
        let experts = cpu.upload_experts(host.clone()).unwrap();
        let step = step();
        assert_near(&run_step(&cpu, &experts, &step, true), &naive_step(&host, &step, true, |x| x), 1e-13);
    }

    #[test]
    fn a_token_alone_has_the_bits_that_it_has_in_a_batch() {
        let step = step();
        let cpu = Cpu::<f32>::new();
        let experts = cpu.upload_experts(int4_experts()).unwrap();
        let together = run_step(&cpu, &experts, &step, true);
        for t in 0..TOKENS {
            let alone = Step {
                x: step.x[t * HIDDEN..][..HIDDEN].to_vec(),
                ids: step.ids[t * TOP_K..][..TOP_K].to_vec(),
                weights: step.weights[t * TOP_K..][..TOP_K].to_vec(),
                shared: step.shared[t * HIDDEN..][..HIDDEN].to_vec(),
            };
            assert_eq!(run_step(&cpu, &experts, &alone, true), together[t * HIDDEN..][..HIDDEN], "token {t}");
        }
    }

    #[test]
    fn an_empty_step_is_fine() {
        let cpu = Cpu::<f32>::new();
        let experts = cpu.upload_experts(int4_experts()).unwrap();
        let step = Step { x: vec![], ids: vec![], weights: vec![], shared: vec![] };
        assert!(run_step(&cpu, &experts, &step, true).is_empty());
    }

    #[test]
    fn an_expert_that_does_not_exist_is_refused_by_the_kernel_that_was_called() {
        let cpu = Cpu::<f32>::new();
        let experts = cpu.upload_experts_int4(int4_experts()).unwrap();
        let x = tensor(DType::Act, &[1, HIDDEN], &[0.0; HIDDEN]);
        let mut out = tensor(DType::Act, &[1, HIDDEN], &[0.0; HIDDEN]);
        for id in [-1, 5] {
            let (ids, weights) = (index(&[1, 1], &[id]), tensor(DType::Float, &[1, 1], &[1.0]));
            let error = cpu.moe_int4(&x, &ids, &weights, &experts, None, &mut out).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("moe_int4: `topk_ids` is {id}, expected an expert below 5")
            );
        }
    }

    #[test]
    fn uploads_name_what_they_refuse() {
        let cpu = Cpu::<f32>::new();
        let mut experts = int4_experts();
        experts[2].up_proj = HostLinear::Dense(dense(&experts[2].up_proj));
        let error = cpu.upload_experts_int4(experts.clone()).unwrap_err().to_string();
        assert_eq!(
            error,
            "upload_experts_int4: `up_proj` is unquantised in expert 2, expected INT4 (use `upload_experts` and `moe`)"
        );
        experts[2].up_proj = HostLinear::Int4(int4(INTERMEDIATE, HIDDEN, 20, false, 1));
        let error = cpu.upload_experts_int4(experts.clone()).unwrap_err().to_string();
        assert!(error.contains("groups of 20 in expert 2, expected groups of 8"), "{error}");
        experts[2].up_proj = HostLinear::Int4(int4(HIDDEN, INTERMEDIATE, 8, false, 1));
        let error = cpu.upload_experts(experts.clone()).unwrap_err().to_string();
        assert_eq!(error, "upload_experts: `up_proj` has shape [40, 24], expected [24, 40]");
        experts[2].up_proj = HostLinear::Dense(HostTensor::f32([3], vec![0.0; 3]));
        let error = cpu.upload_experts(experts).unwrap_err().to_string();
        assert_eq!(
            error,
            "upload_experts: `up_proj` has shape [3], expected the two dimensions of 3 elements"
        );
        assert!(cpu.upload_experts(vec![]).is_err());
    }
}
