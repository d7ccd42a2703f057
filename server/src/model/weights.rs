//! The tensors of a model: one or many *.safetensors, their names, shapes and dtypes checked before any is used.
//!
//! It knows the container format (huggingface.co/docs/safetensors) and no architecture. Whatever bytes the files
//! hold, a mistake is one sentence and never a panic.

use std::collections::BTreeMap;

use kvasir_kernels::stored::{Dtype, Fp8, Int4, Int4Order, StoredMatrix, TensorView};
use safetensors::SafeTensors;
use serde_json::Value;

use super::LoadError;
use super::files::{FileBytes, ModelFiles};
use super::quantization::Quantization;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The open files.
#[derive(Debug)]
pub struct WeightFiles(Vec<(String, FileBytes)>);

/// A tensor and the file that it is in.
#[derive(Clone, Debug)]
struct Entry<'f> {
    file: &'f str,
    shape: Vec<usize>,
    dtype: safetensors::Dtype,
    bytes: &'f [u8],
}

/// All tensors by name. Each is taken once; what is left in the end is a mistake.
#[derive(Clone, Debug)]
pub struct Tensors<'f> {
    entries: BTreeMap<String, Entry<'f>>,
    /// Every tensor that is asked for is there, without bytes: for tests of configurations whose weights are elsewhere.
    #[cfg(test)]
    imagined: bool,
}

/// The names of the weights' files, which need not be there yet: model.safetensors, or the shards that
/// model.safetensors.index.json names.
pub fn weight_files(files: &ModelFiles) -> Result<Vec<String>, LoadError> {
    let Some(index) = files.open(INDEX)? else {
        return Ok(vec![SINGLE.to_owned()]);
    };
    let wrong = |message: String| LoadError::Weights {
        file: INDEX.to_owned(),
        message,
    };
    let index: Value = serde_json::from_slice(&index)
        .map_err(|error| wrong(format!("not valid JSON: {error}")))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| wrong("weight_map is missing, expected an object".to_owned()))?;
    let mut names = map
        .values()
        .map(|name| match name.as_str() {
            Some(name) if !name.is_empty() && !name.contains(['/', '\\', '\0']) => {
                Ok(name.to_owned())
            }
            _ => Err(wrong(format!(
                "weight_map holds {name}, expected a file name"
            ))),
        })
        .collect::<Result<Vec<_>, _>>()?;
    names.sort();
    names.dedup();
    Ok(names)
}

impl WeightFiles {
    /// Opens them.
    pub fn open(files: &ModelFiles) -> Result<Self, LoadError> {
        let open = |name: String| files.require(&name).map(|bytes| (name, bytes));
        let names = weight_files(files)?.into_iter();
        names.map(open).collect::<Result<_, _>>().map(Self)
    }

    /// Bytes of all files.
    pub fn n_bytes(&self) -> u64 {
        self.0.iter().map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// The name, the length and the header of each file, one after another.
    pub fn headers(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (name, bytes) in &self.0 {
            let n_header = (bytes.first_chunk()).map_or(0, |n| u64::from_le_bytes(*n) as usize);
            let end = n_header.saturating_add(8).min(bytes.len());
            for part in [name.as_bytes(), &bytes.len().to_le_bytes(), &bytes[..end]] {
                all.extend_from_slice(&part.len().to_le_bytes());
                all.extend_from_slice(part);
            }
        }
        all
    }

    /// Reads the headers.
    pub fn tensors(&self) -> Result<Tensors<'_>, LoadError> {
        let mut entries = BTreeMap::new();
        for (file, bytes) in &self.0 {
            let wrong = |message: String| LoadError::Weights {
                file: file.clone(),
                message,
            };
            let tensors = SafeTensors::deserialize(bytes)
                .map_err(|error| wrong(format!("not a whole safetensors file: {error}")))?;
            for (name, view) in tensors.tensors() {
                let entry = Entry {
                    file,
                    shape: view.shape().to_vec(),
                    dtype: view.dtype(),
                    bytes: view.data(),
                };
                if let Some(other) = entries.insert(name.clone(), entry) {
                    return Err(wrong(format!("tensor {name} is in {} too", other.file)));
                }
            }
        }
        Ok(Tensors {
            entries,
            #[cfg(test)]
            imagined: false,
        })
    }
}

impl<'f> Tensors<'f> {
    /// All that anybody asks for.
    #[cfg(test)]
    pub(super) fn imagined() -> Self {
        Self {
            entries: BTreeMap::new(),
            imagined: true,
        }
    }

    /// Takes the vector `name`, `[n]`.
    pub fn vector(&mut self, name: &str, n: usize) -> Result<TensorView<'f>, LoadError> {
        self.take_floats(name, &[n], [1, n])
    }

    /// Takes the matrix `{module}.weight`, `[rows, cols]`, in the form in which it is stored.
    pub fn matrix(
        &mut self,
        module: &str,
        shape: [usize; 2],
        quantization: Quantization,
    ) -> Result<StoredMatrix<'f>, LoadError> {
        let name = |what: &str| format!("{module}.{what}");
        let has = |what: &str| self.entries.contains_key(&name(what));
        let is_fp8 = || {
            let entry = self.entries.get(&name("weight"));
            entry.is_some_and(|entry| entry.dtype == safetensors::Dtype::F8_E4M3)
        };
        match quantization {
            Quantization::Fp8 { block } if is_fp8() => self.fp8(module, shape, block),
            Quantization::Gptq { group_size } if has("qweight") => {
                self.int4(module, shape, Int4Order::Gptq, group_size)
            }
            Quantization::Awq { group_size } if has("qweight") => {
                self.int4(module, shape, Int4Order::Awq, group_size)
            }
            Quantization::PackQuantized {
                group_size,
                has_zeros,
            } if has("weight_packed") => self.pack_quantized(module, shape, group_size, has_zeros),
            _ => Ok(self.take_floats(&name("weight"), &shape, shape)?.into()),
        }
    }

    /// Drops tensors that say nothing of their own: the model has them in another form, or not at all.
    pub fn ignore(&mut self, redundant: impl Fn(&str) -> bool) {
        self.entries.retain(|name, _| !redundant(name));
    }

    /// Drops the tensor `name` where all its bytes are zero.
    pub fn ignore_zeros(&mut self, name: &str) {
        if let Some(entry) = self.entries.get(name)
            && entry.bytes.iter().all(|&byte| byte == 0)
        {
            self.entries.remove(name);
        }
    }

    /// Refuses what nobody took: a tensor that the configuration doesn't know would have changed the answer.
    pub fn finish(self) -> Result<(), LoadError> {
        match self.entries.into_iter().next() {
            None => Ok(()),
            Some((name, entry)) => Err(LoadError::Weights {
                file: entry.file.to_owned(),
                message: format!("tensor {name} is unexpected: nothing in config.json asks for it"),
            }),
        }
    }

    fn fp8(
        &mut self,
        module: &str,
        [rows, cols]: [usize; 2],
        block: Option<[usize; 2]>,
    ) -> Result<StoredMatrix<'f>, LoadError> {
        let weight = format!("{module}.weight");
        let values = self.take(&weight, &[rows, cols], &[safetensors::Dtype::F8_E4M3])?;
        self.entries.remove(&format!("{module}.input_scale"));
        let (scales, block) = match block {
            Some(block) => {
                let shape = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
                let mut name = format!("{module}.weight_scale_inv");
                if !self.entries.contains_key(&name) {
                    name = format!("{module}.weight_scale");
                }
                (self.take_floats(&name, &shape, shape)?, block)
            }
            None => {
                let name = format!("{module}.weight_scale");
                let stored = self.entries.get(&name).map(|entry| entry.shape.clone());
                match stored.as_deref() {
                    Some(shape @ ([] | [1])) if rows > 1 => {
                        (self.take_floats(&name, shape, [1, 1])?, [rows, cols])
                    }
                    _ => (self.take_floats(&name, &[rows, 1], [rows, 1])?, [1, cols]),
                }
            }
        };
        Ok(StoredMatrix::Fp8(Fp8 {
            shape: [rows, cols],
            values: values.bytes,
            scales,
            block,
        }))
    }

    /// GPTQ and AWQ: `[in, out]`, eight numbers in a word along the input or the output.
    fn int4(
        &mut self,
        module: &str,
        [rows, cols]: [usize; 2],
        order: Int4Order,
        group_size: Option<usize>,
    ) -> Result<StoredMatrix<'f>, LoadError> {
        let group_size = group_size.unwrap_or(cols);
        let groups = cols.div_ceil(group_size);
        let packed = match order {
            Int4Order::Gptq => [cols.div_ceil(8), rows],
            Int4Order::Awq | Int4Order::PackQuantized => [cols, rows.div_ceil(8)],
        };
        let name = |what: &str| format!("{module}.{what}");
        let values = self.take_words(&name("qweight"), packed)?;
        let zeros = self.take_words(&name("qzeros"), [groups, rows.div_ceil(8)])?;
        let scales = self.take_floats(&name("scales"), &[groups, rows], [groups, rows])?;
        let index = name("g_idx");
        let group_index = match self.entries.contains_key(&index) {
            true => Some(self.group_index(&index, cols, groups)?),
            false => None,
        };
        Ok(StoredMatrix::Int4(Int4 {
            shape: [rows, cols],
            order,
            values,
            scales,
            zeros: Some(zeros),
            group_size,
            group_index,
        }))
    }

    fn pack_quantized(
        &mut self,
        module: &str,
        [rows, cols]: [usize; 2],
        group_size: Option<usize>,
        has_zeros: bool,
    ) -> Result<StoredMatrix<'f>, LoadError> {
        let group_size = group_size.unwrap_or(cols);
        let groups = cols.div_ceil(group_size);
        let name = |what: &str| format!("{module}.{what}");
        let values = self.take_words(&name("weight_packed"), [rows, cols.div_ceil(8)])?;
        let scales = self.take_floats(&name("weight_scale"), &[rows, groups], [rows, groups])?;
        let zeros = match has_zeros {
            true => Some(self.take_words(&name("weight_zero_point"), [rows.div_ceil(8), groups])?),
            false => None,
        };
        let index = name("weight_g_idx");
        let group_index = match self.entries.contains_key(&index) {
            true => Some(self.group_index(&index, cols, groups)?),
            false => None,
        };
        // The shape once more, in numbers: it is known from config.json.
        self.entries.remove(&name("weight_shape"));
        Ok(StoredMatrix::Int4(Int4 {
            shape: [rows, cols],
            order: Int4Order::PackQuantized,
            values,
            scales,
            zeros,
            group_size,
            group_index,
        }))
    }

    /// The group of each input, all of them below `groups`.
    fn group_index(
        &mut self,
        name: &str,
        cols: usize,
        groups: usize,
    ) -> Result<&'f [u8], LoadError> {
        let entry = self.take(name, &[cols], &[safetensors::Dtype::I32])?;
        let index = entry.bytes.chunks_exact(4).map(|bytes| match *bytes {
            [a, b, c, d] => i32::from_le_bytes([a, b, c, d]),
            _ => -1,
        });
        match index
            .clone()
            .find(|&group| !(0..groups as i32).contains(&group))
        {
            None => Ok(entry.bytes),
            Some(group) => Err(entry.wrong(format!(
                "tensor {name} holds {group}, expected groups below {groups}"
            ))),
        }
    }

    fn take_words(&mut self, name: &str, want: [usize; 2]) -> Result<&'f [u8], LoadError> {
        Ok(self.take(name, &want, &[safetensors::Dtype::I32])?.bytes)
    }

    fn take_floats(
        &mut self,
        name: &str,
        want: &[usize],
        shape: [usize; 2],
    ) -> Result<TensorView<'f>, LoadError> {
        use safetensors::Dtype::{BF16, F16, F32};
        let entry = self.take(name, want, &[BF16, F16, F32])?;
        Ok(TensorView {
            dtype: match entry.dtype {
                F32 => Dtype::F32,
                F16 => Dtype::F16,
                _ => Dtype::BF16,
            },
            shape,
            bytes: entry.bytes,
        })
    }

    fn take(
        &mut self,
        name: &str,
        want: &[usize],
        dtypes: &[safetensors::Dtype],
    ) -> Result<Entry<'f>, LoadError> {
        #[cfg(test)]
        if self.imagined {
            return Ok(Entry {
                file: "imagined",
                shape: want.to_vec(),
                dtype: dtypes[0],
                bytes: &[],
            });
        }
        let Some(entry) = self.entries.remove(name) else {
            return Err(LoadError::Weights {
                file: "*.safetensors".to_owned(),
                message: format!("tensor {name} is missing, expected one of shape {want:?}"),
            });
        };
        if entry.shape != want {
            return Err(entry.wrong(format!(
                "tensor {name} has the shape {:?}, expected {want:?} from config.json",
                entry.shape
            )));
        }
        if !dtypes.contains(&entry.dtype) {
            let names: Vec<String> = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect();
            let expected = match names.split_last() {
                Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
                _ => names.join(""),
            };
            return Err(entry.wrong(format!(
                "tensor {name} is of dtype {:?}, expected {expected}",
                entry.dtype
            )));
        }
        Ok(entry)
    }
}

impl Entry<'_> {
    fn wrong(&self, message: String) -> LoadError {
        LoadError::Weights {
            file: self.file.to_owned(),
            message,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::model::config::ModelConfig;
    use crate::model::decoder::Decoder;
    use kvasir_kernels::device::Device;
    use kvasir_kernels::null::NullDevice;
    use kvasir_kernels::shape::{Limits, Precision};

    fn smallest() -> (Vec<u8>, Vec<u8>) {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smallest");
        let read = |name: &str| std::fs::read(case.join(name)).unwrap();
        (read("config.json"), read(SINGLE))
    }

    /// What loading says of a directory that holds these files.
    fn take(config: &[u8], files: &[(&str, &[u8])]) -> Result<(), LoadError> {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(directory.path().join(name), bytes).unwrap();
        }
        let files = WeightFiles::open(&ModelFiles::directory(directory.path())?)?;
        let config = ModelConfig::parse(config, None)?;
        let limits = Limits {
            max_tokens: 1,
            max_sequences: 1,
            max_logits_rows: 1,
            max_blocks_per_sequence: 1,
        };
        let mut device = NullDevice::default();
        let shape = config.decoder.model_shape(16, 16, limits);
        device.add_model(&shape).map_err(LoadError::Device)?;
        Decoder::prepare(
            &config.decoder,
            config.quantization,
            Precision::F32,
            files.tensors()?,
            &mut device,
            &mut |_| {},
        )
        .map(drop)
    }

    /// The config with one piece of text replaced.
    fn changed(config: &[u8], from: &str, to: &str) -> Vec<u8> {
        let text = String::from_utf8(config.to_vec()).unwrap();
        assert!(text.contains(from), "{from}");
        text.replace(from, to).into_bytes()
    }

    #[test]
    fn a_tensor_that_does_not_fit_is_one_sentence() {
        let (config, weights) = smallest();
        take(&config, &[(SINGLE, &weights)]).unwrap();
        let shape = changed(&config, "\"vocab_size\": 13", "\"vocab_size\": 14");
        let missing = changed(
            &config,
            "\"num_hidden_layers\": 1",
            "\"num_hidden_layers\": 2",
        );
        let tied = changed(
            &config,
            "\"tie_word_embeddings\": false",
            "\"tie_word_embeddings\": true",
        );
        take(&tied, &[(SINGLE, &weights)]).unwrap();
        let index = |name: &str| format!(r#"{{"weight_map":{{"lm_head.weight":"{name}"}}}}"#);
        for (config, files, want) in [
            (
                &shape,
                vec![(SINGLE, &weights[..])],
                "model.safetensors: tensor model.embed_tokens.weight has the shape [13, 7], expected [14, 7]",
            ),
            (
                &missing,
                vec![(SINGLE, &weights[..])],
                "*.safetensors: tensor model.layers.1.self_attn.q_proj.weight is missing, expected one of shape [6, 7]",
            ),
            (
                &config,
                vec![(SINGLE, &weights[..weights.len() - 1])],
                "model.safetensors: not a whole safetensors file",
            ),
            (
                &config,
                vec![(SINGLE, &[][..])],
                "model.safetensors: not a whole safetensors file",
            ),
            (
                &config,
                vec![(INDEX, index("../elsewhere").as_bytes())],
                "model.safetensors.index.json: weight_map holds \"../elsewhere\", expected a file name",
            ),
            (
                &config,
                vec![(INDEX, b"{}")],
                "model.safetensors.index.json: weight_map is missing",
            ),
        ] {
            let found = take(config, &files).unwrap_err().to_string();
            assert!(found.starts_with(want), "{found}\nexpected: {want}");
        }
        let absent = take(&config, &[(INDEX, index("a.safetensors").as_bytes())])
            .unwrap_err()
            .to_string();
        assert!(absent.contains("a.safetensors is missing"), "{absent}");
    }

    proptest! {
        #[test]
        fn mutated_headers_never_panic(
            changes in prop::collection::vec((0..1400usize, any::<u8>()), 1..6),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let (config, mut weights) = smallest();
            for (at, byte) in changes {
                let at = at % weights.len();
                weights[at] = byte;
            }
            if let Some(cut) = cut {
                weights.truncate(cut.index(weights.len()));
            }
            let _ = take(&config, &[(SINGLE, &weights)]);
        }
    }
}
