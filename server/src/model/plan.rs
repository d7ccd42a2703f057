//! What serving a model takes, and what a memory has room for: weights, workspace, KV blocks, and requests at the longest
//! context. Too little is one sentence that says how much is needed, how much there is, and what would help.
//!
//! Pure: a device has counted, by the arithmetic that it serves with, and this divides.

use std::num::NonZeroU32;

use kvasir_kernels::device::Memory;
use kvasir_kernels::shape::Precision;
use serde_json::{Value, json};

use super::{LoadError, LoadOptions};
use crate::engine::groups::CacheGroups;

/// What of a model decides what it takes, beside its device.
#[derive(Clone, Debug)]
pub(super) struct ModelFigures {
    pub(super) n_parameters: u64,
    /// What weights, activations and cache are kept in.
    pub(super) precision: Precision,
    /// The longest context that is wanted: of the flags, or the model's own.
    pub(super) max_model_len: u32,
    pub(super) groups: CacheGroups,
}

/// What serving a model takes, and how far the memory goes.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// Numbers that the model learned; a tied embedding counts once.
    pub n_parameters: u64,
    /// What they are kept in.
    pub precision: Precision,
    /// The memory, and what of it is taken before the KV cache.
    pub memory: Memory,
    /// The part of the limit that may be used.
    pub utilization: f64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Tokens in a block.
    pub block_size: u32,
    /// Bytes of the cache that a token of a long sequence takes; an upper bound where there are windows.
    pub kv_bytes_per_token: u64,
    /// The longest context that is wanted.
    pub wanted_len: u32,
    /// The memory that serving with any context takes at the least.
    pub least_bytes: u64,
    /// The memory that one request of the longest context takes.
    pub context_bytes: u64,
    /// What fits, or why not.
    pub fit: Result<Fit, TooLittle>,
}

/// What the memory has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Blocks of the pool.
    pub n_blocks: u32,
    /// The longest context that one sequence alone has room for.
    pub max_model_len: u32,
    /// Sequences of that length that are held at once.
    pub requests_at_context: u32,
}

/// Why nothing fits, in one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooLittle {
    sentence: String,
    /// The number of blocks was asked for: no memory would help.
    is_option: bool,
}

impl From<TooLittle> for LoadError {
    fn from(
        TooLittle {
            sentence,
            is_option,
        }: TooLittle,
    ) -> Self {
        match is_option {
            true => LoadError::Options(sentence),
            false => LoadError::DoesNotFit(sentence),
        }
    }
}

impl MemoryPlan {
    /// Divides what `memory` leaves, once weights and workspace are counted in it, into blocks.
    pub(super) fn new(
        options: &LoadOptions,
        model: &ModelFigures,
        memory: Memory,
        block_bytes: u64,
    ) -> Self {
        let groups = &model.groups;
        let block_size = groups.block_size().get();
        // Without an explicit length a short context will do, but not one that no conversation fits.
        let least_len = match options.max_model_len {
            Some(asked) => asked.get(),
            None => model.max_model_len.min(block_size),
        };
        let needed = Needed {
            memory,
            utilization: options.memory_utilization,
            block_bytes,
        };
        let per_block = groups.page_demand().per_token_block.unwrap_or(0);
        let bytes_for = |tokens| needed.bytes(groups.blocks_for(tokens));
        let mut plan = Self {
            n_parameters: model.n_parameters,
            precision: model.precision,
            memory,
            utilization: options.memory_utilization,
            block_bytes,
            block_size,
            kv_bytes_per_token: (per_block * block_bytes).div_ceil(u64::from(block_size)),
            wanted_len: model.max_model_len,
            least_bytes: bytes_for(least_len),
            context_bytes: bytes_for(model.max_model_len),
            fit: Err(TooLittle {
                sentence: String::new(),
                is_option: false,
            }),
        };
        plan.fit = plan.fit(
            options,
            groups,
            least_len,
            needed.blocks(options, groups, model),
        );
        plan
    }

    fn fit(
        &self,
        options: &LoadOptions,
        groups: &CacheGroups,
        least_len: u32,
        n_blocks: u32,
    ) -> Result<Fit, TooLittle> {
        let needed_blocks = groups.blocks_for(least_len);
        if n_blocks >= needed_blocks {
            let max_model_len = self.wanted_len.min(groups.tokens_in(n_blocks));
            return Ok(Fit {
                n_blocks,
                max_model_len,
                requests_at_context: n_blocks / groups.blocks_for(max_model_len).max(1),
            });
        }
        let sentence = match options.n_blocks {
            Some(wanted) => format!(
                "--num-gpu-blocks-override is {wanted}, expected at least {needed_blocks} blocks of {} tokens for --max-model-len, {least_len}",
                options.block_size
            ),
            None => self.too_little(options.max_model_len, groups, n_blocks, needed_blocks),
        };
        Err(TooLittle {
            sentence,
            is_option: options.n_blocks.is_some(),
        })
    }

    /// How much is needed, how much there is, what would help.
    fn too_little(
        &self,
        asked_len: Option<NonZeroU32>,
        groups: &CacheGroups,
        n_blocks: u32,
        needed_blocks: u32,
    ) -> String {
        let Memory {
            limit,
            weights,
            workspace,
            other,
        } = self.memory;
        let cache = u64::from(needed_blocks) * self.block_bytes;
        let context = match asked_len {
            Some(tokens) => format!("the KV cache of one request of {tokens} tokens"),
            None => "one block of KV cache".to_owned(),
        };
        let mut help = vec![format!("give the replica {}", size_up(self.least_bytes))];
        if self.utilization < 0.9 {
            help.push("raise --gpu-memory-utilization".to_owned());
        }
        if asked_len.is_some() && n_blocks > 0 {
            let fits = groups.tokens_in(n_blocks);
            help.push(format!("lower --max-model-len to {fits}"));
        }
        if self.precision == Precision::F32 {
            help.push("serve with --dtype bfloat16, which halves it".to_owned());
        }
        format!(
            "the model needs {} of memory, and there are {}: {} of weights, {} of workspace, {} taken by others, {} for {context}, and {:.0} % of the limit may be used; {}",
            size_up(self.least_bytes),
            size(limit),
            size(weights),
            size(workspace),
            size(other),
            size(cache),
            self.utilization * 100.0,
            help.join(", or ")
        )
    }

    /// For people, line by line.
    pub fn describe(&self, model: &str) -> String {
        let Memory {
            limit,
            weights,
            workspace,
            other,
        } = self.memory;
        let mut lines = vec![
            format!(
                "{model}: {:.2} billion parameters in {}",
                self.n_parameters as f64 / 1e9,
                self.precision.name()
            ),
            format!("weights            {}", size(weights)),
            format!("workspace          {}", size(workspace)),
            format!("taken by others    {}", size(other)),
            format!(
                "KV cache           {} a token, {} a block of {} tokens",
                size(self.kv_bytes_per_token),
                size(self.block_bytes),
                self.block_size
            ),
            format!("memory to start    {}", size_up(self.least_bytes)),
            format!(
                "memory for one request of {} tokens  {}",
                self.wanted_len,
                size_up(self.context_bytes)
            ),
        ];
        lines.push(match &self.fit {
            Ok(fit) => format!(
                "in {} (of which {:.0} % may be used): {} blocks = {} tokens, {} at once of {} tokens",
                size(limit),
                self.utilization * 100.0,
                fit.n_blocks,
                u64::from(fit.n_blocks) * u64::from(self.block_size),
                match fit.requests_at_context {
                    1 => "1 request".to_owned(),
                    n => format!("{n} requests"),
                },
                fit.max_model_len
            ),
            Err(why) => format!("in {}: {}", size(limit), why.sentence),
        });
        lines.join("\n")
    }

    /// For programs. Bytes, tokens and blocks; `message` only where it doesn't fit.
    pub fn to_json(&self) -> Value {
        let fit = self.fit.as_ref().ok();
        json!({
            "parameters": self.n_parameters,
            "dtype": self.precision.name(),
            "weightsBytes": self.memory.weights,
            "workspaceBytes": self.memory.workspace,
            "otherBytes": self.memory.other,
            "memoryBytes": self.memory.limit,
            "utilization": self.utilization,
            "blockSize": self.block_size,
            "blockBytes": self.block_bytes,
            "kvBytesPerToken": self.kv_bytes_per_token,
            "leastBytes": self.least_bytes,
            "contextTokens": self.wanted_len,
            "contextBytes": self.context_bytes,
            "fits": fit.is_some(),
            "blocks": fit.map(|fit| fit.n_blocks),
            "maxModelLen": fit.map(|fit| fit.max_model_len),
            "requestsAtContext": fit.map(|fit| fit.requests_at_context),
            "message": self.fit.as_ref().err().map(|why| &why.sentence),
        })
    }
}

/// What the limit must hold.
#[derive(Clone, Copy)]
struct Needed {
    memory: Memory,
    utilization: f64,
    block_bytes: u64,
}

impl Needed {
    fn taken(&self) -> u64 {
        let Memory {
            weights,
            workspace,
            other,
            ..
        } = self.memory;
        weights.saturating_add(workspace).saturating_add(other)
    }

    /// The limit under which so many blocks fit.
    fn bytes(&self, n_blocks: u32) -> u64 {
        let cache = u64::from(n_blocks).saturating_mul(self.block_bytes);
        let used = self.taken().saturating_add(cache) as f64;
        // One more, so that rounding never leaves the last block out.
        (used / self.utilization).ceil() as u64 + 1
    }

    /// Blocks that the memory leaves, but no more than all rows of the block tables can hold.
    fn blocks(&self, options: &LoadOptions, groups: &CacheGroups, model: &ModelFigures) -> u32 {
        if let Some(wanted) = options.n_blocks {
            return wanted.get();
        }
        let max_sequences = u64::from(options.max_num_seqs.get());
        let most = max_sequences.saturating_mul(groups.blocks_for(model.max_model_len).into());
        let allowed = (self.memory.limit as f64 * self.utilization) as u64;
        let available = allowed.saturating_sub(self.taken());
        (available / self.block_bytes.max(1))
            .min(most)
            .min(u64::from(u32::MAX / 2)) as u32
    }
}

/// Bytes for people, to a tenth.
pub(crate) fn size(bytes: u64) -> String {
    sized(bytes, |tenths| tenths.round())
}

/// The same rounded up: so much is enough.
fn size_up(bytes: u64) -> String {
    sized(bytes, |tenths| tenths.ceil())
}

fn sized(bytes: u64, round: impl Fn(f64) -> f64) -> String {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => {
            let tenths = round(bytes as f64 * 10.0 / unit as f64) / 10.0;
            format!("{tenths:.1} {name}")
        }
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests;
