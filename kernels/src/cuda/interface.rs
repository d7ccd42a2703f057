//! What Rust and the sources in `kernels/cuda` must agree on, said once: constants, structs, and each kernel's name with
//! its struct of arguments and its launch bounds.
//!
//! build.rs includes this file and writes `interface.h` from it ([`header`]), which platform.cuh includes; so it knows
//! nothing of this crate. What a launch looks like, and how much memory its arguments must name, is in `kernel`.
//!
//! Addresses are of the device, strides are in elements.

use std::fmt::Write as _;
use std::marker::PhantomData;

/// A type that both sides have.
pub trait CType {
    /// Its name in C++.
    fn c_name() -> String;
}

macro_rules! c_types {
    ($($type:ty = $name:literal)*) => { $(
        impl CType for $type {
            fn c_name() -> String {
                $name.to_owned()
            }
        }
    )* };
}
c_types! { u32 = "uint32_t" i32 = "int32_t" u64 = "uint64_t" f32 = "float" Bf16 = "bf16" Chunk = "uint4" }

/// The bits of a bfloat16.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// 16 bytes, which a thread loads or stores at once.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct Chunk(pub [u32; 4]);

macro_rules! pointers {
    ($($(#[$meta:meta])* $name:ident = $format:literal)*) => { $(
        $(#[$meta])*
        #[repr(transparent)]
        pub struct $name<T>(u64, PhantomData<T>);

        impl<T> $name<T> {
            /// Nothing is there.
            pub const NULL: Self = Self(0, PhantomData);

            /// The address itself.
            pub fn address(self) -> u64 {
                self.0
            }
        }

        impl<T> From<u64> for $name<T> {
            fn from(address: u64) -> Self {
                Self(address, PhantomData)
            }
        }

        impl<T> Clone for $name<T> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<T> Copy for $name<T> {}

        impl<T> std::fmt::Debug for $name<T> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl<T: CType> CType for $name<T> {
            fn c_name() -> String {
                format!($format, T::c_name())
            }
        }
    )* };
}
pointers! {
    /// Address of elements that a kernel only reads.
    In = "const {}*"
    /// Address of elements that a kernel writes.
    Out = "{}*"
}

/// A struct as C++ is to see it.
struct CStruct {
    name: String,
    bytes: usize,
    /// Type, name, offset.
    fields: Vec<(String, &'static str, usize)>,
}

macro_rules! structs {
    ($($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug)]
            #[repr(C)]
            pub struct $name {
                $($(#[$field_meta])* pub $field: $type,)*
            }

            const _: () = assert!(
                size_of::<$name>() == 0 $(+ size_of::<$type>())*,
                "a struct that kernels take has no padding"
            );

            impl CType for $name {
                fn c_name() -> String {
                    stringify!($name).to_owned()
                }
            }
        )*

        fn c_structs() -> Vec<CStruct> {
            vec![$(
                CStruct {
                    name: $name::c_name(),
                    bytes: size_of::<$name>(),
                    fields: vec![$(
                        (<$type>::c_name(), stringify!($field), std::mem::offset_of!($name, $field)),
                    )*],
                },
            )*]
        }
    };
}

structs! {
    /// One layer of the paged KV cache: `[page][K|V][kv head][slot][dim]`, bfloat16, pages `page_rows` heads apart.
    KvCache {
        /// The layer's keys in page 0.
        layer: Out<Bf16>,
        /// The group's block tables, `[max_sequences][table_width]`.
        tables: In<u32>,
        /// Blocks of a row of the tables.
        table_width: u32,
        /// Slots of a block: 8 to 128.
        block_size: u32,
        /// ceil(2^32 / block_size): position / block_size is one multiplication, exact below 2^25.
        block_size_magic: u32,
        /// From page to page, in rows of `head_dim` elements: 32 bits then reach over every GPU's memory.
        page_rows: u32,
        /// KV heads.
        n_kv_heads: u32,
        /// Elements of a head.
        head_dim: u32,
    }

    /// `copy_blocks`.
    CopyBlocksArgs {
        /// `[places][blocks][chunks_per_block]`
        cache: Out<Chunk>,
        /// `[n][2]`: from, to.
        pairs: In<u32>,
        /// From place to place.
        chunks_per_place: u64,
        /// Of a block in one place.
        chunks_per_block: u32,
        /// Zero.
        unused: u32,
    }

    /// `update_tables`.
    UpdateTablesArgs {
        /// `[groups][max_sequences][table_width]`
        tables: Out<u32>,
        /// `[n][2]`: index of the entry, block. No index occurs twice.
        changes: In<u32>,
        /// Changes.
        n: u32,
        /// Zero.
        unused: u32,
    }

    /// `embed`.
    EmbedArgs {
        /// `[T, out_stride]`
        out: Out<Bf16>,
        /// `[vocabulary, table_stride]`
        table: In<Bf16>,
        /// `[T]`: ids, or [`SAMPLED`] and a row of logits.
        tokens: In<u32>,
        /// What the model's step before sampled, by row of logits.
        previous: In<u32>,
        /// 8 columns each; padding columns are zeros.
        chunks: u32,
        /// Of `out`.
        out_stride: u32,
        /// Of `table`.
        table_stride: u32,
        /// Each element is multiplied by it.
        scale: f32,
    }

    /// `gather_rows`.
    GatherRowsArgs {
        /// `[L, out_stride]`
        out: Out<Bf16>,
        /// `[T, x_stride]`
        x: In<Bf16>,
        /// `[L]`: rows of x.
        index: In<u32>,
        /// 8 columns each.
        chunks: u32,
        /// Of `out`.
        out_stride: u32,
        /// Of `x`.
        x_stride: u32,
        /// Zero.
        unused: u32,
    }

    /// `rms_norm`.
    RmsNormArgs {
        /// `[T, out_stride]`
        out: Out<Bf16>,
        /// `[T, residual_stride]`, updated; null: no addition.
        residual: Out<Bf16>,
        /// `[T, x_stride]`
        x: In<Bf16>,
        /// `[8 chunks]`, zeros past `cols`.
        weight: In<f32>,
        /// Without padding.
        cols: u32,
        /// 8 columns each.
        chunks: u32,
        /// Of `out`.
        out_stride: u32,
        /// Of `residual`.
        residual_stride: u32,
        /// Of `x`.
        x_stride: u32,
        /// Added to the mean of squares.
        epsilon: f32,
    }

    /// `rope_append`.
    RopeAppendArgs {
        /// Where keys and values go.
        cache: KvCache,
        /// `[T, stride]`: query heads, key heads, value heads.
        qkv: Out<Bf16>,
        /// `[T]`; [`INERT`] ones are left alone.
        positions: In<u32>,
        /// `[T]`: rows of the block tables.
        rows: In<u32>,
        /// `[n_frequencies]`
        inverse_frequencies: In<f32>,
        /// `[head_dim]`: weight of the query heads' norm; null: none.
        query_norm: In<f32>,
        /// `[head_dim]`: of the key heads'; null where `query_norm` is.
        key_norm: In<f32>,
        /// Query heads.
        n_heads: u32,
        /// Of `qkv`.
        stride: u32,
        /// Pairs that are turned: elements i and i + n_frequencies of a head.
        n_frequencies: u32,
        /// Of sine and cosine.
        scale: f32,
        /// Of the norms.
        epsilon: f32,
        /// Zero.
        unused: u32,
    }

    /// One partition of one decoded token's keys, for `paged_decode`.
    SplitKvTile {
        /// Of the block tables.
        row: u32,
        /// Row of qkv and out.
        token: u32,
        /// The token's position + 1; 0: inert.
        length: u32,
        /// First position of the partition.
        start: u32,
    }

    /// The partitions of one decoded token's keys, or the parts of a prefill chunk's, for `combine_split_kv`.
    SplitKvSequence {
        /// Row of out.
        token: u32,
        /// Its first tile; they follow each other.
        first_tile: u32,
        /// Its tiles; with one or none there is nothing to combine.
        n_tiles: u32,
        /// Zero.
        unused: u32,
    }

    /// `paged_decode_*` and `combine_split_kv`.
    PagedDecodeArgs {
        /// Keys and values.
        cache: KvCache,
        /// `[T, out_stride]`: n_heads heads.
        out: Out<Bf16>,
        /// `[T, qkv_stride]`: query heads first, rotated.
        qkv: In<Bf16>,
        /// `[grid x]`
        tiles: In<SplitKvTile>,
        /// `[grid y]` of `combine_split_kv`.
        sequences: In<SplitKvSequence>,
        /// `[tile][head][head_dim]`, not normalised.
        partial_out: Out<f32>,
        /// `[tile][head][2]`: maximum (log2), sum.
        partial_softmax: Out<f32>,
        /// Of `out`.
        out_stride: u32,
        /// Of `qkv`.
        qkv_stride: u32,
        /// Query heads.
        n_heads: u32,
        /// Keys that a query sees, its own among them; [`NO_WINDOW`]: all.
        window: u32,
        /// Scores (after the soft cap) are multiplied by it and made powers of two.
        scale_log2: f32,
        /// Soft cap: scores `s` become `tanh(s * tanh_scale)`; 0: they stay.
        tanh_scale: f32,
    }

    /// Up to `prefill_rows` rows of one span, for `paged_prefill`.
    PrefillTile {
        /// Of the block tables.
        row: u32,
        /// Of the span: row of qkv and out.
        first_token: u32,
        /// Of the span.
        n_tokens: u32,
        /// Of the span.
        first_position: u32,
        /// Of the tile, in rows of (token of the span, head of the group).
        first_row: u32,
        /// The first key of this part of the keys; a multiple of `prefill_keys`.
        first_key: u32,
        /// Past its last one; of the last part at least what the span's last token sees.
        end_key: u32,
        /// Parts into which the keys are cut; 1: the results go to `out`.
        n_parts: u32,
        /// Where the partial results of this part of the span's first token lie; those of the next token `n_parts` further.
        first_partial: u32,
    }

    /// `paged_prefill_*` and `paged_prefill_local_*`.
    PagedPrefillArgs {
        /// Keys and values.
        cache: KvCache,
        /// `[T, out_stride]`: n_heads heads.
        out: Out<Bf16>,
        /// `[T, qkv_stride]`: query heads first, rotated.
        qkv: In<Bf16>,
        /// `[grid x]`
        tiles: In<PrefillTile>,
        /// As in [`PagedDecodeArgs`], `[token and part][head][head_dim]`.
        partial_out: Out<f32>,
        /// As in [`PagedDecodeArgs`], `[token and part][head][2]`.
        partial_softmax: Out<f32>,
        /// Of `out`.
        out_stride: u32,
        /// Of `qkv`.
        qkv_stride: u32,
        /// Query heads.
        n_heads: u32,
        /// As in [`PagedDecodeArgs`]; only `paged_prefill_local_*` looks at it.
        window: u32,
        /// As in [`PagedDecodeArgs`].
        scale_log2: f32,
        /// As in [`PagedDecodeArgs`]; only `paged_prefill_local_*` looks at it.
        tanh_scale: f32,
    }

    /// `gated_activation`.
    GatedActivationArgs {
        /// `[T, out_stride]`
        out: Out<Bf16>,
        /// `[T, in_stride]`: n gates, n ups.
        gate_up: In<Bf16>,
        /// Columns of the result.
        n: u32,
        /// Of `out`.
        out_stride: u32,
        /// Of `gate_up`.
        in_stride: u32,
        /// [`SILU`] or [`GELU_TANH`].
        activation: u32,
    }

    /// `route_experts`.
    RouteExpertsArgs {
        /// `[T, stride]`: logits.
        router: In<Bf16>,
        /// `[T]`; the token of an [`INERT`] one takes no expert.
        positions: In<u32>,
        /// `[T, top_k]`, largest share first; [`INERT`]: none.
        chosen: Out<u32>,
        /// `[T, top_k]`
        shares: Out<f32>,
        /// Tokens.
        n_tokens: u32,
        /// Logits of a token.
        n_experts: u32,
        /// Experts of a token.
        top_k: u32,
        /// Of `router`.
        stride: u32,
        /// 1: shares are divided by their sum.
        renormalize: u32,
        /// Zero.
        unused: u32,
    }

    /// Up to [`GROUPED_ROWS`] rows of one expert, for `grouped_gemm`.
    ExpertTile {
        /// Which.
        expert: u32,
        /// Index into the grouped pairs.
        first_row: u32,
        /// Rows.
        n_rows: u32,
        /// Zero.
        unused: u32,
    }

    /// `group_by_expert`.
    GroupByExpertArgs {
        /// `[n_pairs]`: the expert of each pair (token, place among its experts); [`INERT`]: none.
        chosen: In<u32>,
        /// `[n_pairs]`: the pairs expert after expert, in order.
        pairs: Out<u32>,
        /// Tiles of the experts that have pairs.
        tiles: Out<ExpertTile>,
        /// Their number.
        n_tiles: Out<u32>,
        /// Tokens times experts of a token.
        n_pairs: u32,
        /// Experts.
        n_experts: u32,
    }

    /// `grouped_gemm`.
    GroupedGemmArgs {
        /// `[pairs, out_stride]`
        out: Out<Bf16>,
        /// `[T, x_stride]`, or `[pairs, x_stride]`.
        x: In<Bf16>,
        /// `[n_experts * cols, weight_stride]`
        weight: In<Bf16>,
        /// As `group_by_expert` made them.
        pairs: In<u32>,
        /// Likewise.
        tiles: In<ExpertTile>,
        /// Likewise.
        n_tiles: In<u32>,
        /// Of `out`.
        out_stride: u32,
        /// Of `x`.
        x_stride: u32,
        /// Of `weight`.
        weight_stride: u32,
        /// Length of the sums, a multiple of 8.
        inner: u32,
        /// Columns of the result.
        cols: u32,
        /// Not 0: the rows of `x` are tokens of so many pairs each, those of `out` grouped; 0: the rows of `x` are
        /// grouped, those of `out` are pairs.
        pairs_per_token: u32,
    }

    /// `combine_experts`.
    CombineExpertsArgs {
        /// `[T, out_stride]`
        out: Out<Bf16>,
        /// `[T * top_k, results_stride]`: by pair.
        results: In<Bf16>,
        /// As `route_experts` made them.
        chosen: In<u32>,
        /// Likewise.
        shares: In<f32>,
        /// 8 columns each.
        chunks: u32,
        /// Of `out`.
        out_stride: u32,
        /// Of `results`.
        results_stride: u32,
        /// Experts of a token.
        top_k: u32,
    }

    /// How a row of logits is changed before a token is sampled from it.
    EditRow {
        /// Of the logits.
        row: u32,
        /// The first word of its allowed tokens, a bit each; [`NO_MASK`]: all are.
        allowed: u32,
        /// The first word of its biases, `[n_biases][2]`: token, the bits of an f32.
        biases: u32,
        /// Their number.
        n_biases: u32,
        /// The first word of its seen tokens, `[n_seen][2]`: token, how often it stands in the output.
        seen: u32,
        /// Their number.
        n_seen: u32,
        /// Of every seen token: a logit above 0 is divided by it, another is multiplied by it.
        repetition: f32,
        /// Subtracted for each time that a token stands in the output.
        frequency: f32,
        /// Subtracted where a token stands in the output.
        presence: f32,
    }

    /// `edit_logits`.
    EditLogitsArgs {
        /// `[edited rows, stride]`
        edited: Out<f32>,
        /// `[L, stride]`
        logits: In<f32>,
        /// `[grid x]`
        rows: In<EditRow>,
        /// Allowed tokens, biases and seen tokens of the rows.
        words: In<u32>,
        /// The edited row of the first.
        first: u32,
        /// Logits of a row.
        vocabulary: u32,
        /// Of `edited` and `logits`.
        stride: u32,
        /// Words there are.
        n_words: u32,
    }

    /// What is wanted of a row of logits.
    SampleRow {
        /// 0 is greedy.
        temperature: f32,
        /// 1 keeps all.
        top_p: f32,
        /// The least (logit - max) / temperature that is kept.
        ln_min_p: f32,
        /// 0 keeps all.
        top_k: u32,
        /// The generator's key.
        seed: u64,
        /// The generator's counter.
        output_index: u32,
        /// The token to report on; [`NO_SCORE`]: sample one.
        score: u32,
        /// Log-probabilities of so many of the most likely tokens; -1: of none, not of the sampled one either.
        n_logprobs: i32,
        /// The edited row that it is sampled from; [`NOT_EDITED`]: from itself.
        edited: u32,
        /// The token where no logit is above negative infinity.
        fallback: u32,
        /// Zero.
        unused: u32,
    }

    /// `sample`.
    SampleArgs {
        /// `[L, stride]`
        logits: In<f32>,
        /// `[edited rows, stride]`
        edited: In<f32>,
        /// `[L]`
        rows: In<SampleRow>,
        /// `[L]`; the next step's `embed` reads them.
        tokens: Out<u32>,
        /// `[L]`
        logprobs: Out<f32>,
        /// `[L, MAX_TOP]`, most likely first.
        top_ids: Out<u32>,
        /// `[L, MAX_TOP]`
        top_logprobs: Out<f32>,
        /// Logits of a row.
        vocabulary: u32,
        /// Of `logits`.
        stride: u32,
    }
}

macro_rules! constants {
    ($($(#[$meta:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$meta])* pub const $name: $type = $value;)*

        /// Type, name and value.
        fn c_constants() -> Vec<(String, &'static str, String)> {
            vec![$((<$type>::c_name(), stringify!($name), $name.to_string()),)*]
        }
    };
}

constants! {
    /// Positions that one block of `paged_decode` attends to.
    PARTITION: u32 = 256;
    /// Warps of a block of `paged_decode`.
    DECODE_WARPS: u32 = 4;
    /// Keys of a warp's tile in `paged_decode`.
    DECODE_TILE: u32 = 16;
    /// Groups of threads that share out the partitions of a long sequence in `combine_split_kv`.
    COMBINE_GROUPS: u32 = 4;
    /// A sequence of at most so many partitions is combined by one group.
    COMBINE_TOGETHER: u32 = 16;
    /// Warps of a block of `paged_prefill`.
    PREFILL_WARPS: u32 = 4;
    /// Warps of a block of `rms_norm`.
    NORM_WARPS: u32 = 8;
    /// Warps of a block of `rope_append`.
    ROPE_WARPS: u32 = 4;
    /// Warps, each with a token, of a block of `route_experts`.
    ROUTE_WARPS: u32 = 4;
    /// Threads of a block of `group_by_expert`.
    GROUP_THREADS: u32 = 256;
    /// Rows of a tile of `grouped_gemm`.
    GROUPED_ROWS: u32 = 64;
    /// Columns of a tile of `grouped_gemm`.
    GROUPED_COLS: u32 = 64;
    /// Elements of the sums that one stage of `grouped_gemm` brings.
    GROUPED_INNER: u32 = 64;
    /// Stages of the pipeline of `grouped_gemm`.
    GROUPED_STAGES: u32 = 3;
    /// Dynamic shared memory of `grouped_gemm`; rows are padded by 16 bytes.
    GROUPED_SHARED_BYTES: u32 = GROUPED_STAGES * (GROUPED_ROWS + GROUPED_COLS) * (GROUPED_INNER + 8) * 2;
    /// Threads of a block of `sample`, and its bins and candidates.
    SAMPLE_THREADS: u32 = 1024;
    /// Log-probabilities that `sample` can report of a row.
    MAX_TOP: u32 = 256;
    /// Logits of a row at most: what the limbs of a bin of `sample` hold without a carry.
    MAX_VOCABULARY: u32 = 1 << 18;
    /// Bins, candidates and their weights, a histogram, the most likely tokens, a few words.
    SAMPLE_SHARED_BYTES: u32 = 12 * SAMPLE_THREADS + 8 * (2 * SAMPLE_THREADS + 256 + MAX_TOP + 32 + 2) + 8;
    /// Marks a token id that is a row of logits of the step before.
    SAMPLED: u32 = 1 << 31;
    /// A position that makes its token inert; an expert that is none.
    INERT: u32 = u32::MAX;
    /// A window that holds all positions.
    NO_WINDOW: u32 = u32::MAX;
    /// A score's token, where one is sampled instead.
    NO_SCORE: u32 = u32::MAX;
    /// The edited row of a row that is sampled from as it is.
    NOT_EDITED: u32 = u32::MAX;
    /// The first word of a mask that allows all tokens.
    NO_MASK: u32 = u32::MAX;
    /// An activation: `x / (1 + e^-x)`.
    SILU: u32 = 0;
    /// An activation: `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GELU_TANH: u32 = 1;
}

/// Head sizes that the attention kernels are compiled for, rising.
pub const HEAD_DIMS: [usize; 6] = [64, 80, 96, 128, 192, 256];

/// Stages of a warp's pipeline in `paged_decode`. Three blocks share a multiprocessor at head sizes to 128: they hide each
/// other's starts and ends. A block that has the multiprocessor to itself (`alone`) rather loads all tiles of its warps at
/// once.
pub const fn decode_stages(head_dim: u32, alone: bool) -> u32 {
    match (alone, head_dim) {
        (true, 0..=192) => 4,
        (true, _) => 3,
        (false, 0..=64) => 4,
        (false, _) => 2,
    }
}

/// Dynamic shared memory of `paged_decode`: 16 query rows, the warps' rings of keys and values, maxima and sums. Rows are
/// padded by 16 bytes.
pub const fn decode_shared_bytes(head_dim: u32, alone: bool) -> u32 {
    let rows = 16 + DECODE_WARPS * decode_stages(head_dim, alone) * 2 * DECODE_TILE;
    rows * (head_dim + 8) * 2 + DECODE_WARPS * 16 * 2 * 4
}

/// Tiles of 16 rows that a warp of `paged_prefill` has: as many as its registers hold.
pub const fn prefill_tiles(head_dim: u32) -> u32 {
    if head_dim <= 128 { 2 } else { 1 }
}

/// Rows (token, head of the group) of one tile of `paged_prefill`.
pub const fn prefill_rows(head_dim: u32) -> u32 {
    PREFILL_WARPS * 16 * prefill_tiles(head_dim)
}

/// Keys of a tile of `paged_prefill`.
pub const fn prefill_keys(head_dim: u32) -> u32 {
    if head_dim <= 128 { 64 } else { 32 }
}

/// Dynamic shared memory of `paged_prefill`: query rows, two stages of keys and values, each row's limit.
pub const fn prefill_shared_bytes(head_dim: u32) -> u32 {
    let rows = prefill_rows(head_dim);
    (rows + 4 * prefill_keys(head_dim)) * (head_dim + 8) * 2 + rows * 4
}

/// A kernel: its entry point, which takes the struct `A`.
#[derive(Debug)]
pub struct Entry<A> {
    pub(super) name: &'static str,
    /// Threads of a block, at most.
    pub(super) threads: u32,
    blocks_per_multiprocessor: u32,
    args: PhantomData<A>,
}

impl<A> Entry<A> {
    const fn new(name: &'static str, threads: u32, blocks_per_multiprocessor: u32) -> Self {
        Self {
            name,
            threads,
            blocks_per_multiprocessor,
            args: PhantomData,
        }
    }
}

impl<A: CType> Entry<A> {
    fn declaration(&self) -> String {
        format!(
            "struct {}_interface {{\n    using Args = {};\n    static constexpr int threads = {}, blocks = {};\n}};\n",
            self.name,
            A::c_name(),
            self.threads,
            self.blocks_per_multiprocessor
        )
    }
}

macro_rules! entries {
    (
        one { $($(#[$meta:meta])* $name:ident: $symbol:literal($args:ty), $threads:expr;)* }
        by_head_dim { $($(#[$dim_meta:meta])* $dim_name:ident: $prefix:literal($dim_args:ty), $dim_threads:expr, $blocks:expr;)* }
    ) => {
        $($(#[$meta])* pub const $name: Entry<$args> = Entry::new($symbol, $threads, 1);)*
        $($(#[$dim_meta])* pub const $dim_name: [Entry<$dim_args>; 6] = [
            Entry::new(concat!($prefix, "64"), $dim_threads, $blocks[0]),
            Entry::new(concat!($prefix, "80"), $dim_threads, $blocks[1]),
            Entry::new(concat!($prefix, "96"), $dim_threads, $blocks[2]),
            Entry::new(concat!($prefix, "128"), $dim_threads, $blocks[3]),
            Entry::new(concat!($prefix, "192"), $dim_threads, $blocks[4]),
            Entry::new(concat!($prefix, "256"), $dim_threads, $blocks[5]),
        ];)*

        /// Name and declaration of each.
        fn c_entries() -> Vec<(&'static str, String)> {
            let mut all = vec![$(($name.name, $name.declaration()),)*];
            $(all.extend($dim_name.iter().map(|entry| (entry.name, entry.declaration())));)*
            all
        }
    };
}

entries! {
    one {
        /// Copies blocks in every place of a page.
        COPY_BLOCKS: "copy_blocks"(CopyBlocksArgs), 256;
        /// Applies changes of the block tables.
        UPDATE_TABLES: "update_tables"(UpdateTablesArgs), 128;
        /// Rows of the embedding table.
        EMBED: "embed"(EmbedArgs), 128;
        /// Rows by index.
        GATHER_ROWS: "gather_rows"(GatherRowsArgs), 128;
        /// RMSNorm, alone or after an addition.
        RMS_NORM: "rms_norm"(RmsNormArgs), NORM_WARPS * 32;
        /// Norms of heads, rotary embedding, append to the cache.
        ROPE_APPEND: "rope_append"(RopeAppendArgs), ROPE_WARPS * 32;
        /// Combines the partitions of each decoded token.
        COMBINE_SPLIT_KV: "combine_split_kv"(PagedDecodeArgs), 1024;
        /// The activation of gated MLPs.
        GATED_ACTIVATION: "gated_activation"(GatedActivationArgs), 128;
        /// The experts of each token.
        ROUTE_EXPERTS: "route_experts"(RouteExpertsArgs), ROUTE_WARPS * 32;
        /// Sorts the pairs of tokens and experts by expert.
        GROUP_BY_EXPERT: "group_by_expert"(GroupByExpertArgs), GROUP_THREADS;
        /// Products with each expert's weight.
        GROUPED_GEMM: "grouped_gemm"(GroupedGemmArgs), 128;
        /// Sums the experts' results.
        COMBINE_EXPERTS: "combine_experts"(CombineExpertsArgs), 128;
        /// Rows of logits as tokens are sampled from them.
        EDIT_LOGITS: "edit_logits"(EditLogitsArgs), 1024;
        /// Samples or scores rows of logits.
        SAMPLE: "sample"(SampleArgs), SAMPLE_THREADS;
    }
    by_head_dim {
        /// Attention of decoded tokens, several blocks a multiprocessor.
        PAGED_DECODE: "paged_decode_"(PagedDecodeArgs), DECODE_WARPS * 32, [3, 3, 3, 3, 1, 1];
        /// The same for a grid that leaves each block a multiprocessor to itself; the same bits.
        PAGED_DECODE_ALONE: "paged_decode_alone_"(PagedDecodeArgs), DECODE_WARPS * 32, [1; 6];
        /// Attention of prefill chunks over all positions.
        PAGED_PREFILL: "paged_prefill_"(PagedPrefillArgs), PREFILL_WARPS * 32, [2; 6];
        /// The same with a window or a soft cap.
        PAGED_PREFILL_LOCAL: "paged_prefill_local_"(PagedPrefillArgs), PREFILL_WARPS * 32, [2; 6];
    }
}

/// Names of all kernels.
pub fn names() -> Vec<&'static str> {
    c_entries().into_iter().map(|(name, _)| name).collect()
}

/// The text of `interface.h`.
pub fn header() -> String {
    let mut out = String::from(
        "// Written by build.rs from src/cuda/interface.rs, where everything is explained. `bf16` is defined before it.\n\
         #pragma once\n\n#include <cstddef>\n#include <cstdint>\n\n",
    );
    for (c_type, name, value) in c_constants() {
        line(&mut out, &format!("constexpr {c_type} {name} = {value};"));
    }
    write_sizes(&mut out);
    for of in c_structs() {
        of.write(&mut out);
    }
    for (_, declaration) in c_entries() {
        line(&mut out, &declaration);
    }
    out
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{text}").expect("a String takes everything");
}

/// What depends on the head size, as templates.
fn write_sizes(out: &mut String) {
    for (name, of) in [
        ("prefill_tiles", prefill_tiles as fn(u32) -> u32),
        ("prefill_rows", prefill_rows),
        ("prefill_keys", prefill_keys),
        ("prefill_shared_bytes", prefill_shared_bytes),
    ] {
        line(out, &format!("template <int D>\nconstexpr int {name} = 0;"));
        for d in HEAD_DIMS {
            let value = of(d as u32);
            line(
                out,
                &format!("template <>\nconstexpr int {name}<{d}> = {value};"),
            );
        }
    }
    for (name, of) in [
        ("decode_stages", decode_stages as fn(u32, bool) -> u32),
        ("decode_shared_bytes", decode_shared_bytes),
    ] {
        line(
            out,
            &format!("template <int D, bool alone>\nconstexpr int {name} = 0;"),
        );
        for (d, alone) in HEAD_DIMS.iter().flat_map(|&d| [(d, false), (d, true)]) {
            let value = of(d as u32, alone);
            line(
                out,
                &format!("template <>\nconstexpr int {name}<{d}, {alone}> = {value};"),
            );
        }
    }
}

impl CStruct {
    /// The struct, and that it lies in memory as it does in Rust.
    fn write(&self, out: &mut String) {
        let (name, bytes) = (&self.name, self.bytes);
        line(out, &format!("struct {name} {{"));
        for (c_type, field, _) in &self.fields {
            line(out, &format!("    {c_type} {field};"));
        }
        line(out, "};");
        let other_size = format!("{name} has another size in Rust");
        line(
            out,
            &format!("static_assert(sizeof({name}) == {bytes}, \"{other_size}\");"),
        );
        for (_, field, offset) in &self.fields {
            let elsewhere = format!("{name}::{field} lies elsewhere in Rust");
            line(
                out,
                &format!("static_assert(offsetof({name}, {field}) == {offset}, \"{elsewhere}\");"),
            );
        }
    }
}
