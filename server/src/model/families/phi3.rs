//! Phi-3, 3.5 and 4 (`Phi3ForCausalLM` of Transformers): fused projections, part of a head rotated.

use kvasir_kernels::device::Activation;

use super::{Base, Defaults, expect_activation};
use crate::model::LoadError;
use crate::model::fields::Fields;
use crate::model::spec::{Attention, DecoderSpec, Layer, Linear, Mlp, Norms};

pub(super) fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    expect_activation(config, "hidden_act", "silu")?;
    let base = Base::read(
        config,
        &Defaults {
            max_position_embeddings: Some(4096),
            ..Defaults::default()
        },
    )?;
    let window = config.optional_size("sliding_window")?;
    let qkv = (base.n_heads + 2 * base.n_kv_heads) * base.head_dim;
    let (hidden, inner) = (base.hidden_size, base.intermediate_size);
    Ok(base.decoder(vec![base.rope(config)?], |_| Layer {
        attention: Attention {
            window,
            qkv: Linear::new(hidden, false, &[("self_attn.qkv_proj", qkv)]),
            ..base.attention(false, false)
        },
        mlp: Mlp::Gated {
            gate_up: Linear::new(hidden, false, &[("mlp.gate_up_proj", 2 * inner)]),
            down: Linear::new(inner, false, &[("mlp.down_proj", hidden)]),
            activation: Activation::Silu,
        },
        norms: Norms::BEFORE,
    }))
}
