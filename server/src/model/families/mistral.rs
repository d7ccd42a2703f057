//! Mistral and Ministral (`MistralForCausalLM` of Transformers): Llama with a window, in all layers or in none; and the
//! decoder of Mistral Small 3.1 and later, which reads images too.

use std::num::NonZeroU32;

use kvasir_kernels::device::Activation;

use super::{Base, Defaults, beside_images, expect_activation, sliding_layers};
use crate::model::LoadError;
use crate::model::fields::Fields;
use crate::model::spec::{Attention, DecoderSpec, Layer, Norms};

pub(super) fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    expect_activation(config, "hidden_act", "silu")?;
    let base = Base::read(config, &defaults())?;
    let window = match config.has("sliding_window") {
        true => config.optional_size("sliding_window")?,
        false => NonZeroU32::new(4096),
    };
    let sliding = sliding_layers(config, base.n_layers)?;
    Ok(base.decoder(vec![base.rope(config)?], |i| Layer {
        attention: Attention {
            window: window.filter(|_| sliding.as_ref().is_none_or(|sliding| sliding[i])),
            ..base.attention(false, false)
        },
        mlp: base.mlp(Activation::Silu, false),
        norms: Norms::BEFORE,
    }))
}

pub(super) fn decoder_beside_images(config: &Fields) -> Result<DecoderSpec, LoadError> {
    beside_images(config, decoder)
}

/// What Mixtral's configuration has too.
pub(super) fn defaults() -> Defaults {
    Defaults {
        n_kv_heads: Some(8),
        max_position_embeddings: Some(4096 * 32),
        ..Defaults::default()
    }
}
