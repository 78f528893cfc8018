//! Two backends layer by layer: what one chooses is forced upon the other, so that only arithmetic differs.

use std::collections::BTreeMap;

use dsa80_model::runner::{Probe, Rank};
use dsa80_reference::{Batch, Kernels, Result, SequenceSlice};

/// What a step chose, and the residual stream that entered each layer (the last one: the final norm).
#[derive(Debug, Clone, Default)]
pub struct Trace {
    selections: BTreeMap<usize, Vec<i32>>,
    experts: BTreeMap<usize, (Vec<i32>, Vec<f64>)>,
    /// `[T, hidden]` by layer.
    pub hidden: Vec<Vec<f64>>,
}

/// Records a step.
impl Probe for Trace {
    fn topk_indices(&mut self, layer: usize, indices: &mut [i32]) -> bool {
        self.selections.insert(layer, indices.to_vec());
        false
    }

    fn experts(&mut self, layer: usize, ids: &mut [i32], weights: &mut [f64]) -> bool {
        self.experts.insert(layer, (ids.to_vec(), weights.to_vec()));
        false
    }

    fn hidden(&mut self, _layer: usize, hidden: &[f64]) {
        self.hidden.push(hidden.to_vec());
    }
}

/// Makes a step choose what another chose, and records the residual stream.
#[derive(Debug)]
pub struct Forced<'a> {
    choices: &'a Trace,
    /// `[T, hidden]` by layer.
    pub hidden: Vec<Vec<f64>>,
}

impl<'a> Forced<'a> {
    /// Forces the choices of a recorded step of the same batch.
    pub fn new(choices: &'a Trace) -> Self {
        Self { choices, hidden: Vec::new() }
    }
}

impl Probe for Forced<'_> {
    fn topk_indices(&mut self, layer: usize, indices: &mut [i32]) -> bool {
        indices.copy_from_slice(&self.choices.selections[&layer]);
        true
    }

    fn experts(&mut self, layer: usize, ids: &mut [i32], weights: &mut [f64]) -> bool {
        let (chosen, with) = &self.choices.experts[&layer];
        ids.copy_from_slice(chosen);
        weights.copy_from_slice(with);
        true
    }

    fn hidden(&mut self, _layer: usize, hidden: &[f64]) {
        self.hidden.push(hidden.to_vec());
    }
}

/// What `q_a_proj` and `kv_a_proj_with_mqa` of the first layer give, whose input no sum over ranks has rounded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FirstLatents {
    /// `[T, q_lora_rank]`.
    pub q_a: Vec<f64>,
    /// `[T, kv_lora_rank + rope]`.
    pub kv_a: Vec<f64>,
}

impl Probe for FirstLatents {
    fn wants_hidden(&self) -> bool {
        false
    }

    fn wants_latents(&self) -> bool {
        true
    }

    fn latents(&mut self, layer: usize, q_a: &[f64], kv_a: &[f64]) {
        if layer == 0 {
            *self = Self { q_a: q_a.to_vec(), kv_a: kv_a.to_vec() };
        }
    }
}

impl FirstLatents {
    /// Those of a prompt's first tokens, in one piece.
    ///
    /// # Errors
    /// Whatever the rank reports.
    pub fn of<K: Kernels>(
        rank: &mut Rank<K>,
        tokens: &[u32],
        pages: &[u32],
        page_size: usize,
    ) -> Result<Self> {
        let slice = SequenceSlice { token_ids: tokens, computed_len: 0, pages };
        let mut latents = Self::default();
        rank.forward(&Batch::new(page_size, &[slice])?, Some(&mut latents))?;
        Ok(latents)
    }
}

/// `|found - expected| / |expected|` at every layer; NaN where either has one.
pub fn relative_l2(found: &[Vec<f64>], expected: &[Vec<f64>]) -> Vec<f64> {
    assert_eq!(found.len(), expected.len(), "as many layers");
    let distance = |(found, expected): (&Vec<f64>, &Vec<f64>)| {
        assert_eq!(found.len(), expected.len(), "as many elements");
        let error: f64 = found.iter().zip(expected).map(|(a, b)| (a - b) * (a - b)).sum();
        let norm: f64 = expected.iter().map(|x| x * x).sum();
        if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
    };
    found.iter().zip(expected).map(distance).collect()
}
