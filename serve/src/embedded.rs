//! The checkpoint that is served when no other is named, inside the binary.

/// Its folder, from this crate's.
macro_rules! folder {
    () => {
        "/../fixtures/trained/"
    };
}

macro_rules! files {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), folder!(), $name)))),+]
    };
}

/// Its files, by name.
pub(crate) const FILES: &[(&str, &[u8])] = files![
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "prompts.json",
    "hf_bf16.json",
];

/// The name under which it is served.
pub(crate) const NAME: &str = "dsa80-tiny";
