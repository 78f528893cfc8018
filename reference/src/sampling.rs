//! What a row of `sample` is asked to do, and where its random numbers come from.

/// How one sequence's next token is chosen. The default is plain sampling at temperature 1.
///
/// Order of operations, each on what the one before left: banned tokens, `logit_bias`, repetition penalty,
/// frequency and presence penalties, temperature, `min_p`, `top_k`, `top_p`, draw. Log-probabilities that are
/// reported are those of the raw logits, before any of it.
///
/// `top_p` measures the probability that `min_p` and `top_k` have left; at least one token is always kept.
/// Edges:
/// * a NaN logit counts as negative infinity, in the choice and in log-probabilities; when all are NaN, token
///   0 is chosen and every log-probability is NaN;
/// * logits of positive infinity share all probability equally;
/// * when nothing is left to choose (every token is banned), the highest raw logit is chosen, banned or not;
/// * ids outside the vocabulary in `logit_bias`, `prompt`, `output` or `banned` name no logit and do nothing.
///
/// `sample` refuses values that mean nothing: a negative temperature, `top_p` or `min_p` outside 0 to 1, a
/// repetition penalty that is not positive, anything that is not finite, and a forced token outside the
/// vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy: the highest logit after penalties, ties to the lower token id.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all. Ties at the boundary go to the lower token id.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this share of the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once for each time a token stands in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from every token that stands in the output; 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seeds the draw. Equal seeds give equal tokens, whatever else is in the batch.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// One row of `sample`.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// How to choose.
    pub params: &'a SamplingParams,
    /// The prompt's tokens (for the repetition penalty).
    pub prompt: &'a [u32],
    /// The tokens generated so far (for all three penalties).
    pub output: &'a [u32],
    /// Tokens that must not be chosen (end-of-sequence ids while `min_tokens` is not reached).
    pub banned: &'a [u32],
    /// The counter of the random draw: the position that the new token will take in its sequence.
    pub position: u32,
    /// When set, nothing is drawn: the row reports this token and its log-probability (scoring a prompt).
    pub forced: Option<u32>,
}

/// The uniform number in (0, 1) that `sample` uses for `token` at `position` under `seed`.
///
/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key `seed` (low
/// word first) and counter `[token / 4, position, 0, 0]`; output word `token % 4`; its top 23 bits plus one
/// half, times 2^-23, which f32 holds exactly (with 24 bits the largest would round to 1, whose Gumbel noise
/// is infinite).
pub fn uniform(seed: u64, position: u32, token: u32) -> f32 {
    let words = philox4x32([token / 4, position, 0, 0], [seed as u32, (seed >> 32) as u32]);
    open_unit(words[(token % 4) as usize])
}

/// A random word as a number in `2^-24 ..= 1 - 2^-24`.
fn open_unit(word: u32) -> f32 {
    ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

/// Ten rounds of Philox4x32.
fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution's `kat_vectors`.
    #[test]
    fn philox_matches_the_published_vectors() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_stays_inside_the_open_interval() {
        assert_eq!(open_unit(0), 2f32.powi(-24));
        assert_eq!(open_unit(u32::MAX), 1.0 - 2f32.powi(-24));
        let mean = (0..4096).map(|token| f64::from(uniform(7, 3, token))).sum::<f64>() / 4096.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
    }
}
