//! Llama 2 and 3 (`LlamaForCausalLM` of Transformers), and the many models that are published as such.

use kvasir_kernels::device::Activation;

use super::{Base, Defaults, expect_activation, nothing};
use crate::model::LoadError;
use crate::model::fields::Fields;
use crate::model::spec::{DecoderSpec, Layer, Norms};

pub(super) fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    expect_activation(config, "hidden_act", "silu")?;
    config.refuse("sliding_window", &nothing())?;
    let base = Base::read(config, &Defaults::default())?;
    let attention_bias = config.flag("attention_bias", false)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    Ok(base.decoder(vec![base.rope(config)?], |_| Layer {
        attention: base.attention(attention_bias, attention_bias),
        mlp: base.mlp(Activation::Silu, mlp_bias),
        norms: Norms::BEFORE,
    }))
}
