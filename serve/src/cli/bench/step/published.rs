//! What others have published of this model on 8 A100, carried over to the cards that were measured.

use dsa80_model::config::ModelConfig;
use dsa80_model::dummy::GLM_5_2;
use dsa80_model::measure::GpuFacts;
use serde::{Deserialize, Serialize};

use super::report::CaseReport;
use crate::cli::bench::project::A100_READ_GB_S;

/// Tokens a second of decodes on 8 A100 by sequences, the best published, and how much more is aimed at on equal cards.
const ON_8_A100: [(usize, f64, Option<f64>); 5] =
    [(1, 56.0, Some(2.3)), (4, 186.0, None), (8, 335.0, None), (16, 548.0, None), (32, 625.0, Some(1.6))];
const CARDS: f64 = 8.0;

/// A decode beside what is published of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct Published {
    pub(in crate::cli::bench) tokens_per_s: f64,
    /// The same for the cards that were measured: by what the first of them read in this run, times their number, beside 8 A100 as
    /// others measured those.
    pub(in crate::cli::bench) scaled_tokens_per_s: f64,
    /// What was measured, of that: it speaks about the software.
    pub(in crate::cli::bench) ratio: f64,
    /// What is aimed at.
    pub(in crate::cli::bench) aim: Option<f64>,
}

impl Published {
    /// Beside a decode whose context is what was asked for, host and all: served streams wait for the host too.
    pub(super) fn of(case: &CaseReport, cards: usize, gpu: Option<&GpuFacts>) -> Option<Self> {
        let step_ms = case.step_ms.filter(|_| case.context == case.wanted_context)?.median;
        Self::beside(case.tokens as f64 / step_ms * 1e3, case.sequences, cards, gpu?)
    }

    /// Of a decode of `sequences` by `cards` like `gpu`, at `tokens_per_s` from the step to its tokens.
    fn beside(tokens_per_s: f64, sequences: usize, cards: usize, gpu: &GpuFacts) -> Option<Self> {
        let &(_, published, aim) = ON_8_A100.iter().find(|(published, ..)| *published == sequences)?;
        let scaled = published * (cards as f64 * gpu.read_gb_s?) / (CARDS * A100_READ_GB_S);
        Some(Self { tokens_per_s: published, scaled_tokens_per_s: scaled, ratio: tokens_per_s / scaled, aim })
    }

    pub(super) fn words(&self) -> String {
        let Self { tokens_per_s, scaled_tokens_per_s, ratio, aim } = self;
        let aim = aim.map_or_else(String::new, |aim| {
            format!(" (aim {aim}: {})", if *ratio >= aim { "met" } else { "missed" })
        });
        format!(
            "{tokens_per_s:.0} tokens/s are published for {CARDS} A100, {scaled_tokens_per_s:.0} for what these cards read beside \
             {CARDS} x {A100_READ_GB_S} GB/s; a step (those were served): {ratio:.2} times that{aim}"
        )
    }
}

/// Whether this is the model that the figures are of, whole.
pub(super) fn is_published(config: &ModelConfig) -> bool {
    ModelConfig::from_json(GLM_5_2).is_ok_and(|published| published == *config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::spread::Spread;

    fn gpu(read_gb_s: Option<f64>) -> GpuFacts {
        GpuFacts {
            name: "GPU".into(),
            compute_capability: "9.0".into(),
            multiprocessors: 1,
            l2_bytes: 1,
            memory_bytes: 1,
            cuda: "13.0".into(),
            nvrtc: "13.0".into(),
            driver: None,
            read_gb_s,
            mma_tflop_s: None,
        }
    }

    #[test]
    fn figures_are_scaled_by_what_all_cards_read() {
        let equal = gpu(Some(1850.0));
        assert_eq!(Published::beside(56.0, 1, 8, &equal).unwrap().ratio, 1.0);
        let twice = gpu(Some(2.0 * 1850.0));
        let eight = Published::beside(257.6, 1, 8, &twice).unwrap();
        assert_eq!((eight.tokens_per_s, eight.scaled_tokens_per_s), (56.0, 112.0));
        assert!((eight.ratio - 2.3).abs() < 1e-12 && eight.words().ends_with("times that (aim 2.3: met)"));
        // Half as many cards.
        let four = Published::beside(1000.0, 32, 4, &twice).unwrap();
        assert_eq!((four.scaled_tokens_per_s, four.ratio), (625.0, 1.6));
        assert!(Published::beside(999.0, 32, 4, &twice).unwrap().words().contains("missed"));
        // Nothing is published of it, or nothing was measured.
        assert_eq!(Published::beside(1.0, 2, 8, &twice), None);
        assert_eq!(Published::beside(1.0, 1, 8, &gpu(None)), None);
    }

    #[test]
    fn a_step_is_taken_with_its_host_and_not_where_its_context_was_cut() {
        let equal = gpu(Some(1850.0));
        let spread = |ms| Spread::of(&[ms], 1.0);
        let case = CaseReport {
            sequences: 1,
            tokens: 1,
            context: 64,
            wanted_context: 64,
            step_ms: spread(20.0),
            device_ms: spread(10.0),
            ..CaseReport::default()
        };
        let ratio = Published::of(&case, 8, Some(&equal)).unwrap().ratio;
        assert!((ratio - 50.0 / 56.0).abs() < 1e-12, "{ratio}");
        let cut = CaseReport { wanted_context: 128, ..case.clone() };
        assert_eq!(Published::of(&cut, 8, Some(&equal)), None);
        assert_eq!(Published::of(&case, 8, None), None);
    }

    #[test]
    fn only_the_whole_model_is_compared() {
        let whole = ModelConfig::from_json(GLM_5_2).unwrap();
        assert!(is_published(&whole));
        let fewer = GLM_5_2.replace("\"num_hidden_layers\": 78", "\"num_hidden_layers\": 50");
        assert!(!is_published(&ModelConfig::from_json(&fewer).unwrap()));
    }
}
