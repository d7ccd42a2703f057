//! Qwen 3, dense (`Qwen3ForCausalLM` of Transformers): norms of query and key heads, whose size is explicit.

use kvasir_kernels::device::Activation;

use super::qwen2::windows;
use super::{Base, Defaults, expect_activation};
use crate::model::LoadError;
use crate::model::fields::Fields;
use crate::model::spec::{Attention, DecoderSpec, Layer, Norms};

pub(super) fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    expect_activation(config, "hidden_act", "silu")?;
    let base = Base::read(
        config,
        &Defaults {
            head_dim: Some(128),
            max_position_embeddings: Some(32_768),
            ..Defaults::default()
        },
    )?;
    let window = windows(config, base.n_layers)?;
    let bias = config.flag("attention_bias", false)?;
    Ok(base.decoder(vec![base.rope(config)?], |i| Layer {
        attention: Attention {
            head_norms: true,
            window: window[i],
            ..base.attention(bias, bias)
        },
        mlp: base.mlp(Activation::Silu, false),
        norms: Norms::BEFORE,
    }))
}
