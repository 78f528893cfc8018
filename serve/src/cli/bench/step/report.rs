//! What was measured of steps: for a file, and for the eye.

use std::time::Duration;

use dsa80_model::measure::ReadBytes;
use serde::{Deserialize, Serialize};

use crate::cli::bench::environment::Environment;
use crate::cli::bench::spread::{Spread, digits};
use crate::cli::bench::table::Table;
use crate::cli::size;

use super::published::Published;

/// A run of `bench step`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct StepReport {
    pub(in crate::cli::bench) environment: Environment,
    pub(in crate::cli::bench) settings: StepSettings,
    pub(in crate::cli::bench) notes: Vec<String>,
    pub(in crate::cli::bench) cases: Vec<CaseReport>,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct StepSettings {
    pub(in crate::cli::bench) model: String,
    pub(in crate::cli::bench) tp: usize,
    pub(in crate::cli::bench) rank: usize,
    /// Ranks that stepped together, from that one on.
    #[serde(default = "one")]
    pub(in crate::cli::bench) live: usize,
    /// What summed over them.
    #[serde(default)]
    pub(in crate::cli::bench) between: String,
    /// From how many new tokens on attention was expanded, where that was said.
    #[serde(default)]
    pub(in crate::cli::bench) expand_from: Option<usize>,
    pub(in crate::cli::bench) num_hidden_layers: usize,
    pub(in crate::cli::bench) hidden_size: usize,
    pub(in crate::cli::bench) vocab_size: usize,
    /// Columns of what ranks gather in every layer.
    #[serde(default)]
    pub(in crate::cli::bench) gathered: Vec<usize>,
    #[serde(default)]
    pub(in crate::cli::bench) dtype: String,
    pub(in crate::cli::bench) kv_cache_dtype: String,
    pub(in crate::cli::bench) page_size: usize,
    pub(in crate::cli::bench) num_pages: usize,
    pub(in crate::cli::bench) weight_bytes: u64,
    pub(in crate::cli::bench) cache_bytes_per_token: usize,
}

fn one() -> usize {
    1
}

/// What collectives between live ranks take of a step, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct CollectivesOfStep {
    /// The step without them, on the slowest rank.
    pub(in crate::cli::bench) alone_ms: Spread,
    /// What they add to it, waiting for each other included.
    pub(in crate::cli::bench) added_ms: f64,
    /// That, of the step.
    pub(in crate::cli::bench) share: f64,
    /// Their kernels by themselves, where those are ours.
    pub(in crate::cli::bench) kernels_ms: Option<f64>,
}

/// What ranks wait for each other in a step, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct WaitsOfStep {
    /// Lost to skew: the mean over ranks of what they wait in all collectives for the one that comes last.
    pub(in crate::cli::bench) lost_ms: Spread,
    /// The collectives, each as long as on that one.
    pub(in crate::cli::bench) collectives_ms: Spread,
    /// What every rank waits. The slowest waits least.
    pub(in crate::cli::bench) of_ranks_ms: Vec<f64>,
}

/// Where a step's time goes, from the step to its tokens: together 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct Shares {
    /// The slowest rank's own kernels.
    pub(in crate::cli::bench) kernels: f64,
    /// What collectives add to them.
    pub(in crate::cli::bench) collectives: f64,
    /// What is lost to skew, by marks that make a step slower: about as much as that, where all ranks lose alike.
    pub(in crate::cli::bench) skew: Option<f64>,
    /// What is not the device's.
    pub(in crate::cli::bench) host: f64,
}

impl Shares {
    /// Of a step of `step_ms`, of which the device has `device_ms`, `alone_ms` of that without collectives, and the host `host_ms` where
    /// that was measured by itself.
    pub(super) fn of(
        step_ms: f64,
        device_ms: f64,
        alone_ms: f64,
        host_ms: Option<f64>,
        lost_ms: Option<f64>,
    ) -> Self {
        // Measured one after the other: a replay may have taken longer than the step.
        let whole_ms = step_ms.max(device_ms + host_ms.unwrap_or(0.0));
        Self {
            kernels: alone_ms / whole_ms,
            collectives: (device_ms - alone_ms) / whole_ms,
            skew: lost_ms.map(|ms| ms / whole_ms),
            host: (whole_ms - device_ms) / whole_ms,
        }
    }

    fn words(&self) -> String {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let skew = self.skew.map_or_else(String::new, |skew| format!(" ({} lost to skew)", percent(skew)));
        let Self { kernels, collectives, host, .. } = self;
        format!(
            "kernels {}, collectives {}{skew}, host {}",
            percent(*kernels),
            percent(*collectives),
            percent(*host)
        )
    }
}

/// One step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct CaseReport {
    /// `decode` or `prefill`.
    pub(in crate::cli::bench) kind: String,
    pub(in crate::cli::bench) sequences: usize,
    /// Tokens in every sequence's context, the new ones included.
    pub(in crate::cli::bench) context: usize,
    /// The same, as it was asked for: what the caches did not hold was cut.
    pub(in crate::cli::bench) wanted_context: usize,
    /// New tokens.
    pub(in crate::cli::bench) tokens: usize,
    /// Of the device where it has a clock, of the host elsewhere.
    pub(in crate::cli::bench) tokens_per_s: f64,
    /// From the step to its tokens, by the host's clock.
    pub(in crate::cli::bench) step_ms: Option<Spread>,
    /// What of that is the host's, in microseconds; of a decode that is replayed.
    pub(in crate::cli::bench) host_us: Option<Spread>,
    /// Replayed from a graph, by the device's clock.
    pub(in crate::cli::bench) device_ms: Option<Spread>,
    pub(in crate::cli::bench) read: ReadBytes,
    pub(in crate::cli::bench) read_bytes: u64,
    pub(in crate::cli::bench) read_gb_s: f64,
    /// Of the measured ceiling.
    pub(in crate::cli::bench) read_share: Option<f64>,
    pub(in crate::cli::bench) flops: f64,
    /// Of the measured ceiling of `mma.sync`.
    pub(in crate::cli::bench) mma_share: Option<f64>,
    /// Different experts of a sparse layer, the median over layers.
    pub(in crate::cli::bench) experts_a_layer: Option<f64>,
    /// Of live ranks.
    #[serde(default)]
    pub(in crate::cli::bench) collectives: Option<CollectivesOfStep>,
    /// Of live ranks whose collectives are watched.
    #[serde(default)]
    pub(in crate::cli::bench) waits: Option<WaitsOfStep>,
    /// Of a step that a device's clock has timed.
    #[serde(default)]
    pub(in crate::cli::bench) shares: Option<Shares>,
    /// Of the whole model on a card for every rank.
    #[serde(default)]
    pub(in crate::cli::bench) published: Option<Published>,
    /// The sum of the kernels' times.
    pub(in crate::cli::bench) kernels_ms: Option<f64>,
    pub(in crate::cli::bench) kernels: Vec<KernelReport>,
}

/// One kernel on one shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::cli::bench) struct KernelReport {
    pub(in crate::cli::bench) name: String,
    pub(in crate::cli::bench) shape: String,
    pub(in crate::cli::bench) launches: usize,
    /// Microseconds of all its launches.
    pub(in crate::cli::bench) us: f64,
    /// Of the step on the device.
    pub(in crate::cli::bench) share: f64,
}

impl StepReport {
    /// What stands over the cases.
    pub(super) fn head(&self, loaded: Duration) -> String {
        let StepSettings { model, tp, rank, live, between, num_hidden_layers, page_size, num_pages, .. } =
            &self.settings;
        let ranks = match live {
            1 => format!("rank {rank} of {tp} of {model}, {num_hidden_layers} layers, alone"),
            _ => format!(
                "ranks {rank} to {} of {tp} of {model}, {num_hidden_layers} layers, together ({between})",
                rank + live - 1
            ),
        };
        format!(
            "{}\n{ranks}, random weights ({} a rank), made in {:.1} s; caches of {} tokens in {} ({} B a token)\n",
            self.environment.words(),
            size::show(self.settings.weight_bytes),
            loaded.as_secs_f64(),
            num_pages * page_size,
            self.settings.kv_cache_dtype,
            self.settings.cache_bytes_per_token,
        )
    }
}

impl CaseReport {
    /// In a few words: what it is.
    pub(in crate::cli::bench) fn title(&self) -> String {
        let Self { sequences, context, tokens, .. } = self;
        match self.kind.as_str() {
            "decode" if *sequences == 1 => format!("decode, 1 sequence, context {context}"),
            "decode" => format!("decode, {sequences} sequences, context {context}"),
            _ => format!("prefill, {tokens} new tokens, context {context}"),
        }
    }

    /// For the terminal.
    pub(super) fn text(&self, environment: &Environment) -> String {
        let mut text = format!("\n{}: {} tokens/s\n", self.title(), digits(self.tokens_per_s));
        if self.context < self.wanted_context {
            text.push_str(&format!(
                "  the caches do not hold {} tokens of context for each of them\n",
                self.wanted_context
            ));
        }
        let mut line = |name: &str, words: String| text.push_str(&format!("  {name:<8}{words}\n"));
        if let Some(device) = self.device_ms {
            line("device", format!("{} ms", device.words()));
        }
        if let Some(step) = self.step_ms {
            let host = self
                .host_us
                .map_or_else(String::new, |host| format!(", {:.0} us of it the host's", host.median));
            line("step", format!("{} ms{host}", step.words()));
        }
        if let Some(CollectivesOfStep { alone_ms, added_ms, share, kernels_ms }) = self.collectives {
            let kernels = kernels_ms
                .map_or_else(String::new, |ms| format!("; their kernels by themselves {} ms", digits(ms)));
            line("alone", format!("{} ms", alone_ms.words()));
            line(
                "sums",
                format!(
                    "collectives add {} ms, {:.1} % of the step{kernels}",
                    digits(added_ms),
                    100.0 * share
                ),
            );
        }
        if let Some(WaitsOfStep { lost_ms, collectives_ms, of_ranks_ms }) = &self.waits {
            let of_ranks: Vec<String> = of_ranks_ms.iter().map(|&ms| digits(ms)).collect();
            line(
                "skew",
                format!(
                    "{} ms lost to ranks that wait for a slower one (rank by rank {}), of {} ms of collectives and waits",
                    digits(lost_ms.median),
                    of_ranks.join(", "),
                    digits(lost_ms.median + collectives_ms.median)
                ),
            );
        }
        if let Some(shares) = &self.shares {
            line("shares", shares.words());
        }
        if let Some(published) = &self.published {
            line("beside", published.words());
        }
        line("read", self.read_words(environment));
        if let Some(share) = self.mma_share {
            line(
                "mma",
                format!("{:.1} TFLOP, {:.0} % of what mma.sync reaches", self.flops / 1e12, 100.0 * share),
            );
        }
        text + &self.kernel_table()
    }

    fn read_words(&self, environment: &Environment) -> String {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let ReadBytes { weights, experts, lm_head, latents, index_keys } = self.read;
        let of_ceiling = match (self.read_share, environment.gpu.as_ref().and_then(|gpu| gpu.read_gb_s)) {
            (Some(share), Some(ceiling)) => format!(", {:.0} % of {ceiling:.0}", 100.0 * share),
            _ => String::new(),
        };
        let a_layer = self.experts_a_layer.map_or_else(String::new, |count| format!(" ({count} a layer)"));
        format!(
            "{} GB = {} GB/s{of_ceiling}: weights {}, experts {}{a_layer}, lm_head {}, latents {}, index keys {}",
            digits(gb(self.read_bytes)),
            digits(self.read_gb_s),
            digits(gb(weights)),
            digits(gb(experts)),
            digits(gb(lm_head)),
            digits(gb(latents)),
            digits(gb(index_keys)),
        )
    }

    fn kernel_table(&self) -> String {
        let (Some(sum), Some(device)) = (self.kernels_ms, self.device_ms) else { return String::new() };
        if self.kernels.is_empty() {
            return String::new();
        }
        let mut table = Table::new(2, ["kernel", "shape", "launches", "us", "each", "share"]);
        let mut kernels: Vec<_> = self.kernels.iter().collect();
        kernels.sort_by(|a, b| b.us.total_cmp(&a.us));
        for KernelReport { name, shape, launches, us, share } in kernels {
            table.row([
                name.clone(),
                beginning(shape),
                launches.to_string(),
                digits(*us),
                digits(us / *launches as f64),
                format!("{:.1} %", 100.0 * share),
            ]);
        }
        let together = 100.0 * sum / device.median;
        table.text("  ") + &format!("  together {} ms, {together:.1} % of the step\n", digits(sum))
    }
}

/// As much of a shape as a line has room for.
fn beginning(shape: &str) -> String {
    const MOST: usize = 72;
    match shape.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}..", &shape[..end]),
        None => shape.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_a_step_are_all_of_it() {
        let shares = Shares::of(10.0, 9.0, 7.0, None, Some(0.5));
        assert_eq!(shares, Shares { kernels: 0.7, collectives: 0.2, skew: Some(0.05), host: 0.1 });
        assert_eq!(shares.words(), "kernels 70.0 %, collectives 20.0 % (5.0 % lost to skew), host 10.0 %");
        // The host's part is known by itself where replays were slower than steps.
        let beside = Shares::of(6.16, 6.185, 5.355, Some(0.015), None);
        assert!((beside.host - 0.015 / 6.2).abs() < 1e-12 && (beside.kernels - 5.355 / 6.2).abs() < 1e-12);
        let one = Shares::of(8.0, 10.0, 10.0, None, None);
        assert_eq!((one.kernels, one.collectives, one.host), (1.0, 0.0, 0.0));
        assert!(!one.words().contains("skew"));
    }

    #[test]
    fn the_kernels_are_shown_longest_first_with_their_sum() {
        let kernel = |name: &str, us, share| KernelReport {
            name: name.into(),
            shape: "1 x 8".into(),
            launches: 2,
            us,
            share,
        };
        let case = CaseReport {
            kind: "decode".into(),
            sequences: 2,
            context: 80,
            wanted_context: 100,
            tokens: 2,
            tokens_per_s: 2000.0,
            device_ms: Some(Spread { median: 1.0, p10: 0.9, p90: 1.25, runs: 20 }),
            read_bytes: 1_500_000_000,
            read_gb_s: 1500.0,
            kernels_ms: Some(0.9),
            kernels: vec![kernel("a", 300.0, 0.3), kernel("b", 600.0, 0.6)],
            ..CaseReport::default()
        };
        assert_eq!(beginning(&"é".repeat(72)), "é".repeat(72));
        assert_eq!(beginning(&"é".repeat(73)), "é".repeat(72) + "..");
        let environment = Environment::of(None, None);
        expect_test::expect![[r#"

            decode, 2 sequences, context 80: 2000 tokens/s
              the caches do not hold 100 tokens of context for each of them
              device  1.000 (0.900 - 1.250) ms
              read    1.500 GB = 1500 GB/s: weights 0.000, experts 0.000, lm_head 0.000, latents 0.000, index keys 0.000
              kernel  shape  launches     us   each   share
              b       1 x 8         2  600.0  300.0  60.0 %
              a       1 x 8         2  300.0  150.0  30.0 %
              together 0.900 ms, 90.0 % of the step
        "#]].assert_eq(&case.text(&environment));
    }
}
