//! How a checkpoint's weights are quantized, as `quantization_config` of config.json says: the forms that are read.
//!
//! It knows no tensors; `weights` finds them by these names.

use super::LoadError;
use super::fields::Fields;

const BUILT: &str = "\"fp8\", \"gptq\", \"awq\" or \"compressed-tensors\"";

/// How linear layers are stored. A module that a checkpoint leaves unquantized is dense under any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// Floating-point numbers of at least 16 bits.
    None,
    /// E4M3 with one scale for each block of rows and columns, for each row or for all, named `weight_scale`, or for
    /// blocks `weight_scale_inv` (DeepSeek's form; it is multiplied all the same).
    Fp8 {
        /// `[rows, cols]`; `None`: what the scales' shape says, one a row or one in all.
        block: Option<[usize; 2]>,
    },
    /// 4-bit integers: `qweight`, `qzeros`, `scales`, `g_idx`.
    Gptq {
        /// Inputs that share a scale; `None`: all.
        group_size: Option<usize>,
    },
    /// 4-bit integers: `qweight`, `qzeros`, `scales`.
    Awq {
        /// Inputs that share a scale; `None`: all.
        group_size: Option<usize>,
    },
    /// 4-bit integers: `weight_packed`, `weight_scale`, `weight_zero_point`.
    PackQuantized {
        /// Inputs that share a scale; `None`: all.
        group_size: Option<usize>,
        /// There are zero points.
        has_zeros: bool,
    },
}

impl Quantization {
    /// What config.json says.
    pub fn parse(config: &Fields) -> Result<Self, LoadError> {
        let Some(fields) = config.object("quantization_config")? else {
            return Ok(Self::None);
        };
        match fields.text("quant_method")? {
            Some("fp8") => fp8(&fields),
            Some("gptq") => gptq(&fields),
            Some("awq") => awq(&fields),
            Some("compressed-tensors") => compressed_tensors(&fields),
            _ => Err(fields.unexpected("quant_method", BUILT)),
        }
    }
}

fn fp8(fields: &Fields) -> Result<Quantization, LoadError> {
    if fields.text("fmt")?.is_some_and(|fmt| fmt != "e4m3") {
        return Err(fields.unexpected("fmt", "\"e4m3\""));
    }
    Ok(Quantization::Fp8 {
        block: block(fields, "weight_block_size")?,
    })
}

/// Rows and columns that share a scale, where the field is there.
fn block(fields: &Fields, name: &str) -> Result<Option<[usize; 2]>, LoadError> {
    if fields.get(name).is_none() {
        return Ok(None);
    }
    match fields.positive_list(name, 2)?[..] {
        [rows, cols] if rows.fract() == 0.0 && cols.fract() == 0.0 => {
            Ok(Some([rows as usize, cols as usize]))
        }
        _ => Err(fields.unexpected(name, "two whole numbers")),
    }
}

fn gptq(fields: &Fields) -> Result<Quantization, LoadError> {
    expect_four_bits(fields, "bits")?;
    if fields
        .text("checkpoint_format")?
        .is_some_and(|format| format != "gptq")
    {
        return Err(fields.unexpected("checkpoint_format", "\"gptq\""));
    }
    Ok(Quantization::Gptq {
        group_size: group_size(fields, "group_size")?,
    })
}

fn awq(fields: &Fields) -> Result<Quantization, LoadError> {
    let (bits, group) = match fields.get("bits") {
        Some(_) => ("bits", "group_size"),
        None => ("w_bit", "q_group_size"),
    };
    expect_four_bits(fields, bits)?;
    let version = fields.text("version")?.map(str::to_lowercase);
    if version.is_some_and(|version| version != "gemm") {
        return Err(fields.unexpected("version", "\"gemm\""));
    }
    Ok(Quantization::Awq {
        group_size: group_size(fields, group)?,
    })
}

fn compressed_tensors(fields: &Fields) -> Result<Quantization, LoadError> {
    let groups = fields.object("config_groups")?;
    let group = match &groups {
        Some(groups) => match groups.names()[..] {
            [only] => groups.object(only)?,
            _ => None,
        },
        None => None,
    };
    let weights = group
        .map(|group| group.object("weights"))
        .transpose()?
        .flatten();
    let Some(weights) = weights else {
        return Err(fields.unexpected("config_groups", "one group with weights"));
    };
    let bits = weights.size("num_bits", None)?;
    match (weights.text("type")?, bits) {
        (Some("float"), 8) => {
            let block = match weights.text("strategy")? {
                Some("tensor" | "channel") => None,
                Some("block") => block(&weights, "block_structure")?,
                _ => {
                    let built = "\"tensor\", \"channel\" or \"block\"";
                    return Err(weights.unexpected("strategy", built));
                }
            };
            Ok(Quantization::Fp8 { block })
        }
        (Some("int"), 4) => {
            let format = fields.text("format")?;
            if format.is_some_and(|format| format != "pack-quantized") {
                return Err(fields.unexpected("format", "\"pack-quantized\""));
            }
            Ok(Quantization::PackQuantized {
                group_size: match weights.text("strategy")? {
                    Some("channel") => None,
                    _ => group_size(&weights, "group_size")?,
                },
                has_zeros: !weights.flag("symmetric", true)?,
            })
        }
        _ => Err(weights.wrong(format!(
            "num_bits is {bits}, expected 8 with type \"float\" or 4 with type \"int\""
        ))),
    }
}

fn expect_four_bits(fields: &Fields, name: &str) -> Result<(), LoadError> {
    match fields.size(name, None)? {
        4 => Ok(()),
        _ => Err(fields.unexpected(name, "4")),
    }
}

/// -1 and null are one group of all inputs.
fn group_size(fields: &Fields, name: &str) -> Result<Option<usize>, LoadError> {
    match fields.get(name).map(|value| value.as_i64()) {
        None | Some(Some(-1)) => Ok(None),
        Some(_) => fields.size(name, None).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_tools_write_is_read_and_the_rest_is_one_sentence() {
        let parse = |json: &str| {
            let config = format!(r#"{{"quantization_config":{json}}}"#);
            Quantization::parse(&Fields::parse("config.json", config.as_bytes())?)
        };
        let group_size = Some(128);
        for (json, want) in [
            (
                r#"{"quant_method":"fp8","fmt":"e4m3","weight_block_size":[128,128]}"#,
                Quantization::Fp8 {
                    block: Some([128, 128]),
                },
            ),
            (
                r#"{"quant_method":"gptq","bits":4,"group_size":128,"desc_act":true,"sym":true}"#,
                Quantization::Gptq { group_size },
            ),
            (
                r#"{"quant_method":"awq","bits":4,"group_size":128,"version":"gemm"}"#,
                Quantization::Awq { group_size },
            ),
            (
                r#"{"quant_method":"awq","w_bit":4,"q_group_size":-1,"version":"GEMM"}"#,
                Quantization::Awq { group_size: None },
            ),
            (
                r#"{"quant_method":"compressed-tensors","format":"pack-quantized","config_groups":{"group_0":
                    {"weights":{"num_bits":4,"type":"int","strategy":"group","group_size":128,"symmetric":false}}}}"#,
                Quantization::PackQuantized {
                    group_size,
                    has_zeros: true,
                },
            ),
            (
                r#"{"quant_method":"compressed-tensors","format":"float-quantized","config_groups":{"group_0":
                    {"weights":{"num_bits":8,"type":"float","strategy":"channel"}}}}"#,
                Quantization::Fp8 { block: None },
            ),
        ] {
            assert_eq!(parse(json).unwrap(), want, "{json}");
        }
        for (json, want) in [
            (
                r#"{"quant_method":"mxfp4"}"#,
                "config.json: quantization_config.quant_method is \"mxfp4\", expected \"fp8\", \"gptq\", \"awq\" or \"compressed-tensors\"",
            ),
            (
                r#"{"bits":4}"#,
                "config.json: quantization_config.quant_method is missing, expected \"fp8\", \"gptq\", \"awq\" or \"compressed-tensors\"",
            ),
            (
                r#"{"quant_method":"gptq","bits":8,"group_size":128}"#,
                "config.json: quantization_config.bits is 8, expected 4",
            ),
        ] {
            assert_eq!(parse(json).unwrap_err().to_string(), want, "{json}");
        }
    }
}
