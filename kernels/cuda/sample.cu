// Samples or scores rows of logits, token for token what kernels/src/sampling.rs gives: the same fixed sequences of
// correctly rounded f32 operations (never fused), the same integers, the same ties.
//
// One block of 1024 threads a row. The kept set of min-p, top-k and top-p is a threshold on a 64-bit key (logit, then lowest
// id), weighted by 1 (top-k) or by fixed-point mass (top-p): integers have one sum, whatever the order. A first pass puts
// the weights into bins of equal width below the largest logit; the few tokens of the bin where the threshold lies are
// compared with each other, or, where they are many, selected by radix, 8 bits at a time.
#include "sampling.cuh"

constexpr int SAMPLE_WARPS = SAMPLE_THREADS / 32;

constexpr int BINS = SAMPLE_THREADS;
/// Bins for each unit of the logit.
constexpr float BINS_OF_ONE = 64.0f;
static_assert(uint64_t(MAX_VOCABULARY) * 0x3fff < 1ull << 32, "a limb of a bin is 32 bits");

struct SampleShared {
    uint32_t bins[BINS][3];  // weights in limbs of 14 bits: shared memory adds 32 bits at a time
    uint64_t candidates[SAMPLE_THREADS], weights[SAMPLE_THREADS];
    uint64_t histogram[256];
    uint64_t top[MAX_TOP];
    uint64_t words[SAMPLE_WARPS];  // one a warp, of a reduction
    uint64_t prefix;               // of the key that is being selected
    uint64_t rest;                 // weight still to be reached below it
    uint32_t bucket, count;
};
static_assert(sizeof(SampleShared) == SAMPLE_SHARED_BYTES, "what a launch brings holds all of it");

/// The largest of all threads' integers: of keys, the larger score, and the lower token among equals.
static __device__ inline uint64_t largest_of_block(SampleShared& shared, uint64_t key) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const uint64_t other = __shfl_xor_sync(ALL_LANES, key, lanes);
        key = other > key ? other : key;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.words[threadIdx.x / 32] = key;
    __syncthreads();
    for (int w = 0; w < SAMPLE_WARPS; ++w) key = shared.words[w] > key ? shared.words[w] : key;
    return key;
}

static __device__ inline uint64_t sum_of_block(SampleShared& shared, uint64_t x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.words[threadIdx.x / 32] = x;
    __syncthreads();
    uint64_t sum = 0;
    for (int w = 0; w < SAMPLE_WARPS; ++w) sum += shared.words[w];
    return sum;
}

/// The sum over the threads up to this one.
static __device__ inline uint64_t scan_of_block(SampleShared& shared, uint64_t x) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint64_t before = __shfl_sync(ALL_LANES, x, lane >= step ? lane - step : 0);
        if (lane >= step) x += before;
    }
    __syncthreads();
    if (lane == 31) shared.words[warp] = x;
    __syncthreads();
    for (uint32_t w = 0; w < warp; ++w) x += shared.words[w];
    return x;
}

/// The bin of a logit: it never falls where the logit rises. NaN, and what is far below, are in the last.
static __device__ inline uint32_t bin_of(float logit, float max) {
    const float x = __fmul_rn(__fsub_rn(max, logit), BINS_OF_ONE);
    return x < float(BINS - 1) ? uint32_t(x) : BINS - 1;
}

/// Puts the weights of all keys >= `floor` into the bins, and gives each thread the sum of the bins up to its own.
template <typename Weight>
static __device__ inline uint64_t fill_bins(SampleShared& shared, const float* logits, uint32_t n, float max,
                                            uint64_t floor, Weight weight) {
    __syncthreads();
    for (int limb = 0; limb < 3; ++limb) shared.bins[threadIdx.x][limb] = 0;
    __syncthreads();
#pragma unroll 4
    for (uint32_t id = threadIdx.x; id < n; id += SAMPLE_THREADS) {
        const float logit = logits[id];
        if (floor != 0 && order_key(logit, id) < floor) continue;
        const uint64_t w = weight(logit);
        uint32_t* bin = shared.bins[bin_of(logit, max)];
        for (int limb = 0; limb < 3; ++limb) {
            const uint32_t part = uint32_t(w >> 14 * limb) & 0x3fff;
            if (part != 0) atomicAdd(&bin[limb], part);
        }
    }
    __syncthreads();
    const uint32_t* bin = shared.bins[threadIdx.x];
    return scan_of_block(shared, bin[0] + (uint64_t(bin[1]) << 14) + (uint64_t(bin[2]) << 28));
}

/// The largest key T of `bin` such that the keys of that bin that are >= T (and >= `floor`) weigh at least `wanted` > 0.
/// All of them together weigh no less.
template <typename Weight>
static __device__ inline uint64_t select_by_radix(SampleShared& shared, const float* logits, uint32_t n, float max,
                                                  uint32_t bin, uint64_t floor, uint64_t wanted, Weight weight) {
    uint64_t prefix = 0, rest = wanted;
    for (int shift = 56; shift >= 0; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < 256) shared.histogram[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t id = threadIdx.x; id < n; id += SAMPLE_THREADS) {
            const uint64_t key = order_key(logits[id], id);
            if (key < floor || bin_of(logits[id], max) != bin || (shift < 56 && key >> (shift + 8) != prefix)) continue;
            atomicAdd(reinterpret_cast<unsigned long long*>(&shared.histogram[key >> shift & 255]),
                      (unsigned long long)(weight(logits[id])));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t bucket = 255;
            while (bucket > 0 && shared.histogram[bucket] < rest) rest -= shared.histogram[bucket--];
            shared.prefix = prefix << 8 | bucket;
            shared.rest = rest;
        }
        __syncthreads();
        prefix = shared.prefix;
        rest = shared.rest;
    }
    return prefix;
}

/// The largest key T such that the keys >= T (and >= `floor`) weigh at least `wanted` > 0, after fill_bins with the same
/// `floor` and `weight`, whose result is `scanned`. All of them together weigh no less.
template <typename Weight>
static __device__ inline uint64_t select_key(SampleShared& shared, const float* logits, uint32_t n, float max,
                                             uint64_t floor, uint64_t scanned, uint64_t wanted, Weight weight) {
    const uint32_t* mine = shared.bins[threadIdx.x];
    const uint64_t above = scanned - (mine[0] + (uint64_t(mine[1]) << 14) + (uint64_t(mine[2]) << 28));
    if (above < wanted && wanted <= scanned) {
        shared.bucket = threadIdx.x;
        shared.rest = wanted - above;
    }
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    const uint32_t bin = shared.bucket;
    const uint64_t rest = shared.rest;
    for (uint32_t id = threadIdx.x; id < n; id += SAMPLE_THREADS) {
        const float logit = logits[id];
        if (bin_of(logit, max) != bin) continue;
        const uint64_t key = order_key(logit, id);
        if (key < floor) continue;
        const uint32_t at = atomicAdd(&shared.count, 1u);
        if (at >= SAMPLE_THREADS) continue;
        shared.candidates[at] = key;
        shared.weights[at] = weight(logit);
    }
    __syncthreads();
    const uint32_t count = shared.count;
    if (count > SAMPLE_THREADS) return select_by_radix(shared, logits, n, max, bin, floor, rest, weight);
    uint64_t key = 0;
    if (threadIdx.x < count) {
        key = shared.candidates[threadIdx.x];
        uint64_t sum = 0;
        for (uint32_t i = 0; i < count; ++i)
            if (shared.candidates[i] >= key) sum += shared.weights[i];
        if (sum < rest) key = 0;
    }
    return largest_of_block(shared, key);
}

/// The token of the largest logit, the lowest id among equals; `fallback` where none is above -infinity.
static __device__ inline uint32_t best_of_row(SampleShared& shared, const float* logits, uint32_t n, uint32_t fallback) {
    uint64_t mine = score_key(MINUS_INFINITY, fallback);
    for (uint32_t id = threadIdx.x; id < n; id += SAMPLE_THREADS)
        if (logits[id] > MINUS_INFINITY) {
            const uint64_t key = score_key(logits[id], id);
            mine = key > mine ? key : mine;
        }
    return key_id(largest_of_block(shared, mine));
}

/// Shared memory: SampleShared.
KERNEL(sample) {
    SampleShared& shared = *reinterpret_cast<SampleShared*>(shared_memory());
    const SampleRow row = args.rows[blockIdx.x];
    // Log-probabilities are those of the raw row.
    const float* raw = args.logits + uint64_t(blockIdx.x) * args.stride;
    const bool is_edited = row.edited != NOT_EDITED;
    const float* logits = is_edited ? args.edited + uint64_t(row.edited) * args.stride : raw;
    const uint32_t n = args.vocabulary;

    const auto one = [](float) { return uint64_t(1); };
    const uint32_t best = best_of_row(shared, logits, n, row.fallback);
    float max = logits[best];

    uint32_t token = best;
    if (row.score != NO_SCORE) {
        token = row.score;
    } else if (row.temperature != 0.0f && fabsf(max) < -MINUS_INFINITY) {
        const auto mass = [&](float logit) { return mass_of(scaled(logit, max, row.temperature)); };
        uint64_t floor = 0;
        if (row.top_k != 0 && row.top_k < n) {
            const uint64_t scanned = fill_bins(shared, logits, n, max, 0, one);
            floor = select_key(shared, logits, n, max, 0, scanned, row.top_k, one);
        }
        if (row.ln_min_p > MINUS_INFINITY) {
            uint64_t least = 0;  // Of the complements the largest: the best token's at least is there.
            for (uint32_t id = threadIdx.x; id < n; id += SAMPLE_THREADS)
                if (scaled(logits[id], max, row.temperature) >= row.ln_min_p) {
                    const uint64_t complement = ~order_key(logits[id], id);
                    least = complement > least ? complement : least;
                }
            least = ~largest_of_block(shared, least);
            floor = least > floor ? least : floor;
        }
        if (row.top_p < 1.0f) {
            const uint64_t scanned = fill_bins(shared, logits, n, max, floor, mass);
            const uint64_t total = largest_of_block(shared, scanned);
            // ceil(total * top_p) with top_p to 32 binary places: sum << 32 >= total * share, in 64 bits.
            const uint64_t share = uint64_t(double(row.top_p) * 4294967296.0);
            const uint64_t low = total * share;
            uint64_t wanted = (__umul64hi(total, share) << 32 | low >> 32) + ((low & 0xffffffff) != 0);
            wanted = wanted == 0 ? 1 : wanted;
            floor = select_key(shared, logits, n, max, floor, scanned, wanted, mass);
        }
        uint64_t mine = 0;
        for (uint32_t group = threadIdx.x; group < (n + 3) / 4; group += SAMPLE_THREADS) {
            bool any = floor == 0;  // Noise is dear: none where no token is kept.
            for (uint32_t id = group * 4; !any && id < min(group * 4 + 4, n); ++id)
                any = order_key(logits[id], id) >= floor;
            if (!any) continue;
            uint32_t words[4] = {group, row.output_index, 0, 0};
            philox4x32_10(words, uint32_t(row.seed), uint32_t(row.seed >> 32));
            for (uint32_t i = 0; i < 4 && group * 4 + i < n; ++i) {
                const uint32_t id = group * 4 + i;
                if (floor != 0 && order_key(logits[id], id) < floor) continue;
                const float score = __fadd_rn(scaled(logits[id], max, row.temperature), gumbel(words[i]));
                if (!(score > MINUS_INFINITY)) continue;
                const uint64_t key = score_key(score, id);
                mine = key > mine ? key : mine;
            }
        }
        token = key_id(largest_of_block(shared, mine));
    }
    if (threadIdx.x == 0) args.tokens[blockIdx.x] = token;
    if (row.n_logprobs < 0) return;

    if (is_edited) max = raw[best_of_row(shared, raw, n, 0)];
    uint64_t sum = 0;
    for (uint32_t id = threadIdx.x; id < n; id += SAMPLE_THREADS) sum += mass_of(__fsub_rn(raw[id], max));
    sum = sum_of_block(shared, sum);
    const float ln_sum = exact_ln(__fmul_rn(__ull2float_rn(sum), 1.0f / MASS_ONE));
    const auto logprob = [&](float logit) { return __fsub_rn(__fsub_rn(logit, max), ln_sum); };
    if (threadIdx.x == 0) args.logprobs[blockIdx.x] = logprob(raw[token]);

    const uint32_t n_top = min(min(uint32_t(row.n_logprobs), n), MAX_TOP);
    if (n_top == 0) return;
    const uint64_t scanned = fill_bins(shared, raw, n, max, 0, one);
    const uint64_t floor = select_key(shared, raw, n, max, 0, scanned, n_top, one);
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    for (uint32_t id = threadIdx.x; id < n; id += SAMPLE_THREADS) {
        const uint64_t key = order_key(raw[id], id);
        if (key >= floor) shared.top[atomicAdd(&shared.count, 1u)] = key;
    }
    __syncthreads();
    if (threadIdx.x < n_top) {
        const uint64_t key = shared.top[threadIdx.x];
        uint32_t rank = 0;
        for (uint32_t i = 0; i < n_top; ++i) rank += shared.top[i] > key;
        const uint32_t id = key_id(key);
        args.top_ids[uint64_t(blockIdx.x) * MAX_TOP + rank] = id;
        args.top_logprobs[uint64_t(blockIdx.x) * MAX_TOP + rank] = logprob(raw[id]);
    }
}
