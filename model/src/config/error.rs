//! Why a `config.json` is refused.

/// A `config.json` that cannot be served. Every message names the field, what was found and what is expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// A field without which the model's shape is unknown.
    #[error("`{field}` is missing; expected {expected}")]
    Missing {
        /// The field.
        field: String,
        /// What belongs there.
        expected: String,
    },
    /// A field that holds something else than it should.
    #[error("`{field}` is {found}; expected {expected}")]
    Invalid {
        /// The field.
        field: String,
        /// The value, shortened.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// Two fields that cannot both be true.
    #[error("`{field}` is {found}, which contradicts {other}; expected {expected}")]
    Contradiction {
        /// The field.
        field: String,
        /// The value, shortened.
        found: String,
        /// The other field and its value.
        other: String,
        /// What would agree.
        expected: String,
    },
    /// A tensor-parallel degree that does not divide the model.
    #[error(
        "tensor parallelism over {world_size} ranks is not possible: {reason}; degrees that divide this \
         model: {}",
        list(.valid)
    )]
    TensorParallel {
        /// The degree asked for.
        world_size: usize,
        /// What does not divide.
        reason: String,
        /// All degrees that would, ascending.
        valid: Vec<usize>,
    },
}

fn list(degrees: &[usize]) -> String {
    degrees.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
