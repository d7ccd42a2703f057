//! Qwen 3 with experts (`Qwen3MoeForCausalLM` of Transformers): Qwen 3's attention; layers are dense or of experts.

use kvasir_kernels::device::Activation;
use serde_json::Value;

use super::{Base, Defaults, expect_activation, expect_top_k};
use crate::model::LoadError;
use crate::model::fields::Fields;
use crate::model::spec::{Attention, DecoderSpec, Layer, Norms};

const NAMES: [&str; 4] = [
    "mlp.gate",
    "mlp.experts.{}.gate_proj",
    "mlp.experts.{}.up_proj",
    "mlp.experts.{}.down_proj",
];

pub(super) fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    expect_activation(config, "hidden_act", "silu")?;
    let base = Base::read(
        config,
        &Defaults {
            max_position_embeddings: Some(32_768),
            ..Defaults::default()
        },
    )?;
    let window = match config.flag("use_sliding_window", false)? {
        true => config.optional_size("sliding_window")?,
        false => None,
    };
    let bias = config.flag("attention_bias", false)?;
    // Transformers 5 writes the second name.
    let n_experts = config.size("num_local_experts", Some(128))?;
    let n_experts = config.size("num_experts", Some(n_experts))?;
    let top_k = expect_top_k(config, "num_experts_per_tok", n_experts)?;
    let inner = config.size("moe_intermediate_size", None)?;
    let renormalize = config.flag("norm_topk_prob", false)?;
    let step = config.size("decoder_sparse_step", Some(1))?;
    let dense = dense_layers(config)?;
    Ok(base.decoder(vec![base.rope(config)?], |i| Layer {
        attention: Attention {
            head_norms: true,
            window,
            ..base.attention(bias, bias)
        },
        mlp: match dense.contains(&i) || !(i + 1).is_multiple_of(step) {
            true => base.mlp(Activation::Silu, false),
            false => base.experts(NAMES, n_experts, inner, top_k, renormalize),
        },
        norms: Norms::BEFORE,
    }))
}

fn dense_layers(config: &Fields) -> Result<Vec<usize>, LoadError> {
    let Some(value) = config.get("mlp_only_layers") else {
        return Ok(Vec::new());
    };
    let index = |value: &Value| value.as_u64().map(|i| i as usize);
    let indices = value
        .as_array()
        .and_then(|list| list.iter().map(index).collect());
    indices.ok_or_else(|| config.unexpected("mlp_only_layers", "a list of layers"))
}
