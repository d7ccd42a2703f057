//! Rotary position embeddings as config.json describes them, with the scalings that are built.
//!
//! Field names are those of Transformers; versions 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`, one object,
//! or one for each kind of layer) are both read. Frequencies are computed as modeling_rope_utils.py computes them. It
//! knows no layers.

use std::f64::consts::PI;

use kvasir_kernels::shape::Rope;

use super::LoadError;
use super::fields::Fields;

const BUILT: &str = "\"default\", \"linear\", \"llama3\", \"yarn\" or \"longrope\"";

/// What a family knows of its rotary embedding beside config.json.
#[derive(Clone, Copy, Debug)]
pub struct RopeDefaults {
    /// Elements of a head.
    pub head_dim: usize,
    /// Base, where none is named.
    pub theta: f64,
    /// Of a head, the share that is rotated, where none is named.
    pub partial_rotary_factor: f64,
    /// Longest context that the model was made for.
    pub max_position_embeddings: u32,
}

/// A rotary embedding. Some scalings have one for contexts up to a length and another for longer ones; which is served
/// follows from the longest context that is, so that a position means the same however long a sequence grows.
#[derive(Clone, Debug, PartialEq)]
pub struct ContextRope {
    rope: Rope,
    /// For contexts of at most so many tokens.
    short: Option<(u32, Rope)>,
}

impl ContextRope {
    /// The one for contexts of at most `max_model_len` tokens.
    pub fn serving(&self, max_model_len: u32) -> &Rope {
        match &self.short {
            Some((longest, short)) if max_model_len <= *longest => short,
            _ => &self.rope,
        }
    }
}

impl From<Rope> for ContextRope {
    fn from(rope: Rope) -> Self {
        Self { rope, short: None }
    }
}

/// The model's only rotary embedding.
pub fn rope(config: &Fields, defaults: RopeDefaults) -> Result<ContextRope, LoadError> {
    match config.object("rope_parameters")? {
        Some(parameters) => scaled(config, Some(&parameters), defaults),
        None => scaled(config, config.object("rope_scaling")?.as_ref(), defaults),
    }
}

/// The rotary embedding that `parameters` describe, with the fields of `config` where they lack one.
pub fn scaled(
    config: &Fields,
    parameters: Option<&Fields>,
    defaults: RopeDefaults,
) -> Result<ContextRope, LoadError> {
    let empty = parameters.is_none();
    let parameters = parameters.unwrap_or(config);
    let theta = parameters.number(
        "rope_theta",
        Some(config.number("rope_theta", Some(defaults.theta))?),
    )?;
    if !(theta.is_finite() && theta > 1.0) {
        return Err(config.unexpected("rope_theta", "more than 1"));
    }
    let factor = "partial_rotary_factor";
    let share = config.number(factor, Some(defaults.partial_rotary_factor))?;
    let share = parameters.number(factor, Some(share))?;
    let rotary_dim = (defaults.head_dim as f64 * share) as usize;
    if !(share > 0.0 && share <= 1.0) || rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
        return Err(config.wrong(format!(
            "{factor} is {share}, expected a share of head_dim, {}, that is an even number of elements",
            defaults.head_dim
        )));
    }
    let base = Base { theta, rotary_dim };
    if empty {
        return Ok(base.plain(1.0).into());
    }
    let name = if parameters.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    match parameters.text(name)? {
        None | Some("default") => Ok(base.plain(1.0).into()),
        Some("linear") => Ok(base.plain(parameters.positive("factor", None)?).into()),
        Some("llama3") => llama3(&base, parameters).map(ContextRope::from),
        // Old files of Phi-3 call LongRoPE so.
        Some("yarn") if parameters.get("long_factor").is_some() => {
            longrope(&base, config, parameters, defaults)
        }
        Some("yarn") => yarn(&base, config, parameters, defaults).map(ContextRope::from),
        Some("longrope" | "su") => longrope(&base, config, parameters, defaults),
        Some(_) => Err(parameters.unexpected(name, BUILT)),
    }
}

/// The rotary embedding of whole heads without any scaling.
pub fn unscaled(theta: f64, head_dim: usize) -> Rope {
    let base = Base {
        theta,
        rotary_dim: head_dim,
    };
    base.plain(1.0)
}

struct Base {
    theta: f64,
    rotary_dim: usize,
}

impl Base {
    /// `theta^(2i / rotary_dim)`, in f32 as Transformers computes them.
    fn powers(&self) -> impl Iterator<Item = f32> {
        (0..self.rotary_dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / self.rotary_dim as f32;
            self.theta.powf(f64::from(exponent)) as f32
        })
    }

    fn frequencies(&self) -> impl Iterator<Item = f32> {
        self.powers().map(|power| 1.0 / power)
    }

    fn plain(&self, factor: f64) -> Rope {
        Rope {
            inverse_frequencies: self.frequencies().map(|f| f / factor as f32).collect(),
            scale: 1.0,
        }
    }
}

fn llama3(base: &Base, parameters: &Fields) -> Result<Rope, LoadError> {
    let positive = |field: &str| parameters.positive(field, None).map(|n| n as f32);
    let factor = positive("factor")?;
    let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
    let context = positive("original_max_position_embeddings")?;
    if low >= high {
        let less = format!("less than high_freq_factor, {high}");
        return Err(parameters.unexpected("low_freq_factor", &less));
    }
    let scaled = base.frequencies().map(|frequency| {
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength < context / high {
            frequency
        } else if wavelength > context / low {
            frequency / factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            (1.0 - smooth) * (frequency / factor) + smooth * frequency
        }
    });
    Ok(Rope {
        inverse_frequencies: scaled.collect(),
        scale: 1.0,
    })
}

/// YaRN (arXiv 2309.00071), section 3.
fn yarn(
    base: &Base,
    config: &Fields,
    parameters: &Fields,
    defaults: RopeDefaults,
) -> Result<Rope, LoadError> {
    let longest = f64::from(defaults.max_position_embeddings);
    let original = "original_max_position_embeddings";
    let context = parameters.positive(original, Some(config.positive(original, Some(longest))?))?;
    let factor = parameters.positive("factor", Some(longest / context))?;
    let mscale = |scale: f64| match factor > 1.0 {
        true => 0.1 * scale * factor.ln() + 1.0,
        false => 1.0,
    };
    let of = |name: &str| parameters.number(name, Some(0.0));
    let (numerator, denominator) = (of("mscale")?, of("mscale_all_dim")?);
    let default = if numerator != 0.0 && denominator != 0.0 {
        mscale(numerator) / mscale(denominator)
    } else {
        mscale(1.0)
    };
    let scale = parameters.positive("attention_factor", Some(default))?;
    let dim = base.rotary_dim as f64;
    // The pair that turns `turns` times within the original context.
    let pair = |turns: f64| dim * (context / (turns * 2.0 * PI)).ln() / (2.0 * base.theta.ln());
    let mut low = pair(parameters.positive("beta_fast", Some(32.0))?);
    let mut high = pair(parameters.positive("beta_slow", Some(1.0))?);
    if parameters.flag("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let scaled = base.frequencies().enumerate().map(|(i, frequency)| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
        let interpolated = frequency / factor as f32;
        interpolated * ramp + frequency * (1.0 - ramp)
    });
    Ok(Rope {
        inverse_frequencies: scaled.collect(),
        scale: scale as f32,
    })
}

/// LongRoPE (arXiv 2402.13753): one list of factors for contexts up to the original length, one for longer ones.
fn longrope(
    base: &Base,
    config: &Fields,
    parameters: &Fields,
    defaults: RopeDefaults,
) -> Result<ContextRope, LoadError> {
    let longest = f64::from(defaults.max_position_embeddings);
    let original = "original_max_position_embeddings";
    let context = config.positive(original, Some(longest))?;
    let context = parameters.positive(original, Some(context))?;
    let factor = parameters.positive("factor", Some(longest / context))?;
    let attention_factor = match factor > 1.0 {
        true => (1.0 + factor.ln() / context.ln()).sqrt(),
        false => 1.0,
    };
    let scale = parameters.positive("attention_factor", Some(attention_factor))?;
    let with = |list: &str| {
        let n = base.rotary_dim / 2;
        let factors = parameters.positive_list(list, n)?;
        let frequencies = base.powers().zip(factors);
        let frequencies = frequencies.map(|(power, factor)| 1.0 / (factor as f32 * power));
        Ok::<_, LoadError>(Rope {
            inverse_frequencies: frequencies.collect(),
            scale: scale as f32,
        })
    };
    Ok(ContextRope {
        rope: with("long_factor")?,
        short: Some((context as u32, with("short_factor")?)),
    })
}
