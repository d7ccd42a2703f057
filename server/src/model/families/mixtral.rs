//! Mixtral (`MixtralForCausalLM` of Transformers): Mistral with a mixture of experts in every layer.

use super::{Base, expect_activation, expect_top_k, mistral};
use crate::model::LoadError;
use crate::model::fields::Fields;
use crate::model::spec::{Attention, DecoderSpec, Layer, Norms};

const NAMES: [&str; 4] = [
    "block_sparse_moe.gate",
    "block_sparse_moe.experts.{}.w1",
    "block_sparse_moe.experts.{}.w3",
    "block_sparse_moe.experts.{}.w2",
];

pub(super) fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    expect_activation(config, "hidden_act", "silu")?;
    let base = Base::read(config, &mistral::defaults())?;
    let window = config.optional_size("sliding_window")?;
    let n_experts = config.size("num_local_experts", Some(8))?;
    let top_k = expect_top_k(config, "num_experts_per_tok", n_experts)?;
    Ok(base.decoder(vec![base.rope(config)?], |_| Layer {
        attention: Attention {
            window,
            ..base.attention(false, false)
        },
        mlp: base.experts(NAMES, n_experts, base.intermediate_size, top_k, true),
        norms: Norms::BEFORE,
    }))
}
