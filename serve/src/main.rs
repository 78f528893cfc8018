//! dsa80
fn main() {}
