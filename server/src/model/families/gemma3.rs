//! Gemma 3 (`Gemma3ForCausalLM` of Transformers), text only: local and global layers, each kind with its own rotary
//! embedding; norms around both halves and on heads, stored less 1; a scaled embedding; a GELU gate.

use std::num::NonZeroU32;

use kvasir_kernels::device::Activation;
use kvasir_kernels::shape::RopeId;

use super::{Base, Defaults, beside_images, expect_activation, nothing, sliding_layers};
use crate::model::LoadError;
use crate::model::fields::Fields;
use crate::model::rope::{self, ContextRope, RopeDefaults};
use crate::model::spec::{Attention, DecoderSpec, Layer, Norms};

const GLOBAL: RopeId = RopeId(0);
const LOCAL: RopeId = RopeId(1);

pub(super) fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    expect_activation(config, "hidden_activation", "gelu_pytorch_tanh")?;
    config.refuse("final_logit_softcapping", &nothing())?;
    config.refuse("use_bidirectional_attention", &nothing())?;
    let base = Base::read(
        config,
        &Defaults {
            vocab_size: Some(262_208),
            n_heads: Some(8),
            n_kv_heads: Some(4),
            head_dim: Some(256),
            max_position_embeddings: Some(131_072),
            tie_word_embeddings: true,
        },
    )?;
    let soft_cap = match config.get("attn_logit_softcapping") {
        None => None,
        Some(_) => Some(config.positive("attn_logit_softcapping", None)? as f32),
    };
    let query_scalar = config.positive("query_pre_attn_scalar", Some(256.0))? as f32;
    let bias = config.flag("attention_bias", false)?;
    let window = NonZeroU32::new(config.size("sliding_window", Some(4096))? as u32);
    let period = config.size("sliding_window_pattern", Some(6))?;
    let sliding = sliding_layers(config, base.n_layers)?;
    let is_local = |i: usize| match &sliding {
        Some(sliding) => sliding[i],
        None => !(i + 1).is_multiple_of(period),
    };
    let decoder = base.decoder(ropes(config, base.rope_defaults())?, |i| Layer {
        attention: Attention {
            scale: query_scalar.powf(-0.5),
            soft_cap,
            head_norms: true,
            rope: Some(if is_local(i) { LOCAL } else { GLOBAL }),
            window: window.filter(|_| is_local(i)),
            ..base.attention(bias, bias)
        },
        mlp: base.mlp(Activation::GeluTanh, false),
        norms: Norms::AROUND,
    });
    Ok(DecoderSpec {
        embedding_scale: (base.hidden_size as f32).sqrt(),
        norm_offset: 1.0,
        ..decoder
    })
}

pub(super) fn decoder_beside_images(config: &Fields) -> Result<DecoderSpec, LoadError> {
    beside_images(config, decoder)
}

/// The rotary embeddings of global and of local layers, as Transformers 5 (one object for each kind of layer) or 4 (scaling
/// is the global layers' only) writes them.
fn ropes(config: &Fields, defaults: RopeDefaults) -> Result<Vec<ContextRope>, LoadError> {
    let global = RopeDefaults {
        theta: 1e6,
        ..defaults
    };
    if let Some(parameters) = config.object("rope_parameters")? {
        let of = |kind, defaults| rope::scaled(config, parameters.object(kind)?.as_ref(), defaults);
        return Ok(vec![
            of("full_attention", global)?,
            of("sliding_attention", defaults)?,
        ]);
    }
    let scaling = config.object("rope_scaling")?;
    let theta = config.positive("rope_local_base_freq", Some(defaults.theta))?;
    let local = rope::unscaled(theta, defaults.head_dim);
    Ok(vec![
        rope::scaled(config, scaling.as_ref(), global)?,
        local.into(),
    ])
}
