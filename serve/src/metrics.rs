//! Prometheus metrics of one server.
//!
//! The recorder belongs to the server, not to the process: two servers in one process (tests) do not mix.
//! Handles are registered once; recording through them is a few atomic operations, with no lock and no
//! lookup.

use dsa80_model::engine::EngineStats;
use metrics::{Counter, Gauge, Histogram, Key, Level, Metadata, Recorder as _, SharedString, Unit};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

/// Upper bounds in seconds. One list serves a token of 2 ms and a prompt of ten minutes.
const SECONDS: [f64; 22] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
    40.0, 80.0, 160.0, 320.0, 640.0,
];

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

/// Handles to all metrics.
#[derive(Debug)]
pub struct Metrics {
    prometheus: PrometheusHandle,
    /// From arrival until the engine took the request up.
    pub queue_time: Histogram,
    /// From arrival to the first token of each choice.
    pub time_to_first_token: Histogram,
    /// Between two tokens of a choice.
    pub inter_token_latency: Histogram,
    /// From arrival to the end of each choice.
    pub e2e_latency: Histogram,
    /// HTTP requests whose response has not ended.
    pub http_in_flight: Gauge,
    /// Clients that went away before their response ended.
    pub disconnected: Counter,
    engine: EngineMetrics,
}

#[derive(Debug)]
struct EngineMetrics {
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    pages_total: Gauge,
    pages_used: Gauge,
    pages_cached: Gauge,
    steps: Counter,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    generated_tokens: Counter,
    preemptions: Counter,
    finished: Counter,
    cancelled: Counter,
    failed: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        // Only an empty list is refused; then summaries would be rendered.
        let builder = PrometheusBuilder::new();
        let builder = builder.set_buckets(&SECONDS).unwrap_or_default();
        let recorder = builder.build_recorder();
        Self {
            prometheus: recorder.handle(),
            queue_time: seconds(
                &recorder,
                "dsa80_queue_time_seconds",
                "From arrival until the engine took the request up.",
            ),
            time_to_first_token: seconds(
                &recorder,
                "dsa80_time_to_first_token_seconds",
                "From arrival to the first token of each choice.",
            ),
            inter_token_latency: seconds(
                &recorder,
                "dsa80_inter_token_latency_seconds",
                "Between two tokens of a choice.",
            ),
            e2e_latency: seconds(
                &recorder,
                "dsa80_e2e_request_latency_seconds",
                "From arrival to the end of each choice.",
            ),
            http_in_flight: gauge(
                &recorder,
                "dsa80_http_requests_in_flight",
                "HTTP requests whose response has not ended.",
            ),
            disconnected: counter(
                &recorder,
                "dsa80_http_disconnects_total",
                "Clients that went away before their response ended.",
            ),
            engine: EngineMetrics {
                running: gauge(&recorder, "dsa80_requests_running", "Requests that take part in steps."),
                waiting: gauge(&recorder, "dsa80_requests_waiting", "Requests in the queue."),
                kv_usage: gauge(
                    &recorder,
                    "dsa80_kv_cache_usage_ratio",
                    "Share of the cache pages that running requests hold, 0 to 1.",
                ),
                pages_total: gauge(&recorder, "dsa80_kv_cache_pages", "Pages of the paged caches."),
                pages_used: gauge(
                    &recorder,
                    "dsa80_kv_cache_pages_used",
                    "Pages that running requests hold.",
                ),
                pages_cached: gauge(
                    &recorder,
                    "dsa80_kv_cache_pages_cached",
                    "Pages that no request holds and the prefix cache could still serve.",
                ),
                steps: counter(&recorder, "dsa80_engine_steps_total", "Model steps made."),
                prompt_tokens: counter(
                    &recorder,
                    "dsa80_prompt_tokens_total",
                    "Prompt tokens computed (those found in the prefix cache not counted).",
                ),
                cached_tokens: counter(
                    &recorder,
                    "dsa80_cached_tokens_total",
                    "Prompt tokens found in the prefix cache.",
                ),
                generated_tokens: counter(&recorder, "dsa80_generated_tokens_total", "Tokens generated."),
                preemptions: counter(
                    &recorder,
                    "dsa80_preemptions_total",
                    "Requests put back into the queue because pages ran out.",
                ),
                finished: counter(
                    &recorder,
                    "dsa80_requests_finished_total",
                    "Requests that ended by themselves.",
                ),
                cancelled: counter(
                    &recorder,
                    "dsa80_requests_cancelled_total",
                    "Requests cancelled by their caller.",
                ),
                failed: counter(
                    &recorder,
                    "dsa80_requests_failed_total",
                    "Requests that the engine gave up.",
                ),
            },
        }
    }
}

impl Metrics {
    /// The Prometheus text, with the engine's numbers of this moment.
    pub fn render(&self, stats: Option<EngineStats>) -> String {
        if let Some(stats) = stats {
            self.engine.set(&stats);
        }
        self.prometheus.render()
    }

    /// Folds recorded samples into the histograms. Without it they would pile up until somebody scrapes.
    pub fn upkeep(&self) {
        self.prometheus.run_upkeep();
    }
}

impl EngineMetrics {
    fn set(&self, stats: &EngineStats) {
        self.running.set(stats.running as f64);
        self.waiting.set(stats.waiting as f64);
        self.kv_usage.set(stats.pages_used as f64 / stats.pages_total.max(1) as f64);
        self.pages_total.set(stats.pages_total as f64);
        self.pages_used.set(stats.pages_used as f64);
        self.pages_cached.set(stats.pages_cached as f64);
        self.steps.absolute(stats.steps);
        self.prompt_tokens.absolute(stats.prompt_tokens);
        self.cached_tokens.absolute(stats.cached_tokens);
        self.generated_tokens.absolute(stats.generated_tokens);
        self.preemptions.absolute(stats.preemptions);
        self.finished.absolute(stats.finished);
        self.cancelled.absolute(stats.cancelled);
        self.failed.absolute(stats.failed);
    }
}

fn seconds(recorder: &PrometheusRecorder, name: &'static str, help: &'static str) -> Histogram {
    recorder.describe_histogram(name.into(), Some(Unit::Seconds), SharedString::const_str(help));
    recorder.register_histogram(&Key::from_static_name(name), &METADATA)
}

fn gauge(recorder: &PrometheusRecorder, name: &'static str, help: &'static str) -> Gauge {
    recorder.describe_gauge(name.into(), None, SharedString::const_str(help));
    recorder.register_gauge(&Key::from_static_name(name), &METADATA)
}

fn counter(recorder: &PrometheusRecorder, name: &'static str, help: &'static str) -> Counter {
    recorder.describe_counter(name.into(), None, SharedString::const_str(help));
    recorder.register_counter(&Key::from_static_name(name), &METADATA)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn histograms_gauges_and_the_engines_counters_are_rendered() {
        let metrics = Metrics::default();
        metrics.time_to_first_token.record(Duration::from_millis(30));
        metrics.http_in_flight.increment(2.0);
        let stats = EngineStats {
            running: 3,
            pages_total: 8,
            pages_used: 2,
            preemptions: 7,
            ..EngineStats::default()
        };
        let text = metrics.render(Some(stats));
        for line in [
            "dsa80_requests_running 3",
            "dsa80_kv_cache_usage_ratio 0.25",
            "# TYPE dsa80_preemptions_total counter",
            "dsa80_preemptions_total 7",
            "dsa80_http_requests_in_flight 2",
            "# TYPE dsa80_time_to_first_token_seconds histogram",
            "dsa80_time_to_first_token_seconds_bucket{le=\"0.02\"} 0",
            "dsa80_time_to_first_token_seconds_bucket{le=\"0.04\"} 1",
            "dsa80_time_to_first_token_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn two_servers_do_not_mix() {
        let (one, two) = (Metrics::default(), Metrics::default());
        one.disconnected.increment(1);
        assert!(one.render(None).contains("dsa80_http_disconnects_total 1"));
        assert!(!two.render(None).contains("dsa80_http_disconnects_total 1"));
    }
}
