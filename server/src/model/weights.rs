//! The tensors of a model: one or many *.safetensors, their names, shapes and dtypes checked before any is used.
//!
//! It knows the container format (huggingface.co/docs/safetensors) and no architecture. Whatever bytes the files
//! hold, a mistake is one sentence and never a panic.

use std::collections::BTreeMap;

use kvasir_kernels::device::{Dtype, TensorView};
use safetensors::SafeTensors;
use serde_json::Value;

use super::LoadError;
use super::files::{FileBytes, ModelFiles};

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
#[derive(Debug)]
pub struct Tensors<'f> {
    entries: BTreeMap<String, Entry<'f>>,
}

impl WeightFiles {
    /// Opens model.safetensors, or the shards that model.safetensors.index.json names.
    pub fn open(files: &ModelFiles) -> Result<Self, LoadError> {
        let Some(index) = files.open(INDEX)? else {
            return Ok(Self(vec![(SINGLE.to_owned(), files.require(SINGLE)?)]));
        };
        let wrong = |message: String| LoadError::Weights {
            file: INDEX.to_owned(),
            message,
        };
        let index: Value = serde_json::from_slice(&index)
            .map_err(|error| wrong(format!("not valid JSON: {error}")))?;
        let map = index.get("weight_map").and_then(Value::as_object);
        let map =
            map.ok_or_else(|| wrong("weight_map is missing, expected an object".to_owned()))?;
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
        let open = |name: String| files.require(&name).map(|bytes| (name, bytes));
        names
            .into_iter()
            .map(open)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Bytes of all files.
    pub fn n_bytes(&self) -> u64 {
        self.0.iter().map(|(_, bytes)| bytes.len() as u64).sum()
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
        Ok(Tensors { entries })
    }
}

impl<'f> Tensors<'f> {
    /// Takes the matrix `name`, `[rows, cols]`.
    pub fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<TensorView<'f>, LoadError> {
        self.take(name, &shape, shape)
    }

    /// Takes the vector `name`, `[n]`.
    pub fn vector(&mut self, name: &str, n: usize) -> Result<TensorView<'f>, LoadError> {
        self.take(name, &[n], [1, n])
    }

    /// Drops tensors that say nothing of their own: the model has them in another form.
    pub fn ignore(&mut self, redundant: impl Fn(&str) -> bool) {
        self.entries.retain(|name, _| !redundant(name));
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

    fn take(
        &mut self,
        name: &str,
        want: &[usize],
        shape: [usize; 2],
    ) -> Result<TensorView<'f>, LoadError> {
        let Some(entry) = self.entries.remove(name) else {
            return Err(LoadError::Weights {
                file: "*.safetensors".to_owned(),
                message: format!("tensor {name} is missing, expected one of shape {want:?}"),
            });
        };
        let wrong = |message: String| LoadError::Weights {
            file: entry.file.to_owned(),
            message,
        };
        if entry.shape != want {
            return Err(wrong(format!(
                "tensor {name} has the shape {:?}, expected {want:?} from config.json",
                entry.shape
            )));
        }
        let dtype = match entry.dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::BF16,
            other => {
                return Err(wrong(format!(
                    "tensor {name} is of dtype {other:?}, expected BF16, F16 or F32"
                )));
            }
        };
        Ok(TensorView {
            dtype,
            shape,
            bytes: entry.bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::model::config::LlamaConfig;
    use crate::model::llama::LlamaWeights;

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
        LlamaWeights::take(&LlamaConfig::parse(config, None)?, files.tensors()?).map(drop)
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
