//! Qwen 2 and 2.5 (`Qwen2ForCausalLM` of Transformers): Llama with biases on queries, keys and values only.

use std::num::NonZeroU32;

use kvasir_kernels::device::Activation;

use super::{Base, Defaults, expect_activation, sliding_layers};
use crate::model::LoadError;
use crate::model::fields::Fields;
use crate::model::spec::{Attention, DecoderSpec, Layer, Norms};

pub(super) fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    expect_activation(config, "hidden_act", "silu")?;
    let base = Base::read(
        config,
        &Defaults {
            max_position_embeddings: Some(32_768),
            ..Defaults::default()
        },
    )?;
    let window = windows(config, base.n_layers)?;
    Ok(base.decoder(vec![base.rope(config)?], |i| Layer {
        attention: Attention {
            window: window[i],
            ..base.attention(true, false)
        },
        mlp: base.mlp(Activation::Silu, false),
        norms: Norms::BEFORE,
    }))
}

/// The window of each layer: of those from `max_window_layers` on, where `use_sliding_window` is set. Qwen 3 has the same
/// fields.
pub(super) fn windows(
    config: &Fields,
    n_layers: usize,
) -> Result<Vec<Option<NonZeroU32>>, LoadError> {
    if !config.flag("use_sliding_window", false)? {
        return Ok(vec![None; n_layers]);
    }
    let window = config.optional_size("sliding_window")?;
    let sliding = match sliding_layers(config, n_layers)? {
        Some(sliding) => sliding,
        None => {
            let n_full = match config.get("max_window_layers").map(|n| n.as_u64()) {
                None => 28,
                Some(Some(n)) => n as usize,
                Some(None) => {
                    return Err(config.unexpected("max_window_layers", "a number of layers"));
                }
            };
            (0..n_layers).map(|i| i >= n_full).collect()
        }
    };
    let of_layer = |slides: bool| window.filter(|_| slides);
    Ok(sliding.into_iter().map(of_layer).collect())
}
