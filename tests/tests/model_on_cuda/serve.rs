//! The server over the backend.

use dsa80_model::launch::{Device, LaunchOptions};
use dsa80_tests::bodies;
use dsa80_tests::parity::devices;

#[tokio::test(flavor = "multi_thread")]
async fn the_server_answers_on_a_gpu() {
    if devices::gpu().is_some() {
        let launch = LaunchOptions { device: Device::Cuda, ..LaunchOptions::default() };
        bodies::the_server_answers(launch).await;
    }
}
