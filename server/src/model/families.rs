//! The registry: from `architectures` of config.json to the file that knows the family. And what most families share.
//!
//! A family's file says in data what its layer is; it names nothing of a device and no bytes.

mod gemma3;
mod llama;
mod mistral;
mod mixtral;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use kvasir_kernels::device::Activation;
use serde_json::Value;

use super::LoadError;
use super::fields::Fields;
use super::rope::{self, ContextRope, RopeDefaults};
use super::spec::{Attention, DecoderSpec, Layer, Linear, Mlp};

type Family = fn(&Fields) -> Result<DecoderSpec, LoadError>;

/// Every architecture that is served.
const FAMILIES: [(&str, Family); 10] = [
    ("Gemma3ForCausalLM", gemma3::decoder),
    (
        "Gemma3ForConditionalGeneration",
        gemma3::decoder_beside_images,
    ),
    ("LlamaForCausalLM", llama::decoder),
    (
        "Mistral3ForConditionalGeneration",
        mistral::decoder_beside_images,
    ),
    ("MistralForCausalLM", mistral::decoder),
    ("MixtralForCausalLM", mixtral::decoder),
    ("Phi3ForCausalLM", phi3::decoder),
    ("Qwen2ForCausalLM", qwen2::decoder),
    ("Qwen3ForCausalLM", qwen3::decoder),
    ("Qwen3MoeForCausalLM", qwen3_moe::decoder),
];

/// The decoder that config.json describes.
pub fn decoder(config: &Fields) -> Result<DecoderSpec, LoadError> {
    let named = config.texts("architectures")?.unwrap_or_default();
    let family = FAMILIES.iter().find(|(name, _)| named.contains(name));
    let Some((_, family)) = family else {
        let served: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
        let expected = format!("one of {}", served.join(", "));
        return Err(config.unexpected("architectures", &expected));
    };
    family(config)
}

/// Sizes that every family has, and the parts of a layer that follow from them alone.
struct Base {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    norm_epsilon: f32,
    tie_word_embeddings: bool,
    max_position_embeddings: u32,
}

/// What a family's configuration class has where config.json says nothing. `None`: it must be said, or follows.
#[derive(Default)]
struct Defaults {
    vocab_size: Option<usize>,
    n_heads: Option<usize>,
    n_kv_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: bool,
}

impl Base {
    fn read(config: &Fields, defaults: &Defaults) -> Result<Self, LoadError> {
        let hidden_size = config.size("hidden_size", None)?;
        let n_heads = config.size("num_attention_heads", defaults.n_heads)?;
        let kv_heads = defaults.n_kv_heads.unwrap_or(n_heads);
        let n_kv_heads = config.size("num_key_value_heads", Some(kv_heads))?;
        if n_heads % n_kv_heads != 0 {
            let multiple = format!("a multiple of num_key_value_heads, {n_kv_heads}");
            return Err(config.wrong(format!(
                "num_attention_heads is {n_heads}, expected {multiple}"
            )));
        }
        let head_dim = match (config.get("head_dim"), defaults.head_dim) {
            (None, None) if hidden_size % n_heads != 0 => {
                return Err(config.wrong(format!(
                    "head_dim is missing, and hidden_size, {hidden_size}, is no multiple of num_attention_heads, {n_heads}"
                )));
            }
            (None, None) => hidden_size / n_heads,
            (_, default) => config.size("head_dim", default)?,
        };
        if head_dim % 2 != 0 || head_dim > 1 << 16 {
            return Err(config.wrong(format!(
                "head_dim is {head_dim}, expected an even number up to 65536"
            )));
        }
        let epsilon = config.number("rms_norm_eps", Some(1e-6))?;
        if !(0.0..1.0).contains(&epsilon) {
            return Err(config.unexpected("rms_norm_eps", "0 or more and below 1"));
        }
        let longest = defaults.max_position_embeddings.unwrap_or(2048);
        Ok(Self {
            vocab_size: config.size("vocab_size", defaults.vocab_size)?,
            hidden_size,
            intermediate_size: config.size("intermediate_size", None)?,
            n_layers: config.size("num_hidden_layers", None)?,
            n_heads,
            n_kv_heads,
            head_dim,
            norm_epsilon: epsilon as f32,
            tie_word_embeddings: config
                .flag("tie_word_embeddings", defaults.tie_word_embeddings)?,
            max_position_embeddings: config.size("max_position_embeddings", Some(longest))? as u32,
        })
    }

    /// The rotary embedding of the whole head.
    fn rope(&self, config: &Fields) -> Result<ContextRope, LoadError> {
        rope::rope(config, self.rope_defaults())
    }

    fn rope_defaults(&self) -> RopeDefaults {
        RopeDefaults {
            head_dim: self.head_dim,
            theta: 10_000.0,
            partial_rotary_factor: 1.0,
            max_position_embeddings: self.max_position_embeddings,
        }
    }

    /// Full attention with the first rotary embedding, q, k and v apart.
    fn attention(&self, qkv_bias: bool, output_bias: bool) -> Attention {
        let (q, kv) = (
            self.n_heads * self.head_dim,
            self.n_kv_heads * self.head_dim,
        );
        let qkv = [
            ("self_attn.q_proj", q),
            ("self_attn.k_proj", kv),
            ("self_attn.v_proj", kv),
        ];
        Attention {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            rope: Some(kvasir_kernels::shape::RopeId(0)),
            scale: (self.head_dim as f32).powf(-0.5),
            soft_cap: None,
            window: None,
            head_norms: false,
            qkv: Linear::new(self.hidden_size, qkv_bias, &qkv),
            output: Linear::new(q, output_bias, &[("self_attn.o_proj", self.hidden_size)]),
        }
    }

    /// A gated MLP of the model's own size, gate and up apart.
    fn mlp(&self, activation: Activation, bias: bool) -> Mlp {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let gate_up = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)];
        Mlp::Gated {
            gate_up: Linear::new(hidden, bias, &gate_up),
            down: Linear::new(inner, bias, &[("mlp.down_proj", hidden)]),
            activation,
        }
    }

    /// Experts with the names of a router and of an expert's gate, up and down projections.
    fn experts(
        &self,
        names: [&str; 4],
        n_experts: usize,
        inner: usize,
        top_k: usize,
        renormalize: bool,
    ) -> Mlp {
        let [router, gate, up, down] = names;
        let (hidden, name) = (self.hidden_size, |of: &str, e: usize| {
            of.replace("{}", &e.to_string())
        });
        let stacked = |cols, parts: &[(&str, usize)]| Linear {
            parts: (0..n_experts)
                .flat_map(|e| parts.iter().map(move |&(of, rows)| (name(of, e), rows)))
                .collect(),
            cols,
            bias: false,
        };
        Mlp::Experts {
            router: Linear::new(hidden, false, &[(router, n_experts)]),
            gate_up: stacked(hidden, &[(gate, inner), (up, inner)]),
            down: stacked(inner, &[(down, hidden)]),
            top_k,
            renormalize,
            activation: Activation::Silu,
        }
    }

    /// A decoder of these layers, named as Llama's.
    fn decoder(&self, ropes: Vec<ContextRope>, layer: impl Fn(usize) -> Layer) -> DecoderSpec {
        DecoderSpec {
            prefix: "model.",
            unused: &[],
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            embedding_scale: 1.0,
            tie_word_embeddings: self.tie_word_embeddings,
            head: "lm_head",
            norm_epsilon: self.norm_epsilon,
            norm_offset: 0.0,
            ropes,
            layers: (0..self.n_layers).map(layer).collect(),
            max_position_embeddings: self.max_position_embeddings,
        }
    }
}

/// The decoder of a model that also reads images, whose own fields stand in `text_config`. Images are not served.
fn beside_images(
    config: &Fields,
    decoder: fn(&Fields) -> Result<DecoderSpec, LoadError>,
) -> Result<DecoderSpec, LoadError> {
    Ok(DecoderSpec {
        prefix: "language_model.model.",
        head: "language_model.lm_head",
        unused: &["vision_tower.", "multi_modal_projector."],
        ..decoder(&config.nested("text_config")?)?
    })
}

/// Refuses an activation other than the one that the family is known by.
fn expect_activation(config: &Fields, field: &str, built: &str) -> Result<(), LoadError> {
    match config.text(field)? {
        Some(name) if name != built => Err(config.unexpected(field, &format!("\"{built}\""))),
        _ => Ok(()),
    }
}

/// Refuses numbers of experts that a token can't take.
fn expect_top_k(config: &Fields, field: &str, n_experts: usize) -> Result<usize, LoadError> {
    match config.size(field, None)? {
        top_k if top_k <= n_experts => Ok(top_k),
        _ => Err(config.unexpected(
            field,
            &format!("at most {n_experts}, the number of experts"),
        )),
    }
}

/// Whether layer `i` sees a window only, where `layer_types` says so for each layer.
fn sliding_layers(config: &Fields, n_layers: usize) -> Result<Option<Vec<bool>>, LoadError> {
    let Some(types) = config.texts("layer_types")? else {
        return Ok(None);
    };
    let sliding: Option<Vec<bool>> = types
        .iter()
        .map(|kind| match *kind {
            "sliding_attention" => Some(true),
            "full_attention" => Some(false),
            _ => None,
        })
        .collect();
    match sliding {
        Some(sliding) if sliding.len() == n_layers => Ok(Some(sliding)),
        _ => Err(config.unexpected(
            "layer_types",
            &format!("{n_layers} of \"full_attention\" and \"sliding_attention\""),
        )),
    }
}

/// What an absent or empty field looks like, for [`Fields::refuse`].
fn nothing() -> [Value; 2] {
    [Value::Null, Value::Bool(false)]
}

#[cfg(test)]
mod tests;
