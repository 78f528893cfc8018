//! dsa80
