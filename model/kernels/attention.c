// Attention over the paged cache for x86-64 with AVX-512 BF16: rotary positions, append, attend.
//
// Rows of one token are cut along their context, so that one long row keeps all threads busy, and
// merged afterwards. Rows of many tokens (chunks of prompts) are cut into blocks of queries; a tile
// of keys is laid out for the matrix product once a block. Both keep a running softmax (Milakov and
// Gimelshein 2018; Dao et al. 2022), and in both a token's result is a function of its own context
// alone: tiles of keys begin at multiples of KEY_TILE, and what a token does not see weighs nothing.
//
// The cache may hold bf16, fp8 (e4m3) or int8 with a scale for each token and head; what is not
// bf16 is widened a tile at a time.

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)

#include "vectors.h"

#define KEY_TILE 64         // keys between two updates of the running softmax
#define HEAD_TILE 4         // query heads of a lone token that share one read of K and V
#define SEGMENT 256         // keys of a context one thread attends to, more for long contexts
#define TURNS 4             // a thread takes neighbouring segments, at least so often
#define QUERY_BLOCK 64      // tokens of a chunk one thread attends for
#define MAX_HEAD_SIZE 256

enum { CACHE_BF16, CACHE_FP8, CACHE_INT8 };

// What the layers of one step share.
typedef struct {
    const float *cosines, *sines; // [T, D / 2], of each token's position
    const int32_t *tables;        // [S, table_stride] page numbers
    const int32_t *contexts;      // [S] keys a row's last token sees, its own included
    const int32_t *starts;        // [S + 1] each row's first token
    bf16 *queries;                // scratch [T, H D]
    float *partials;              // scratch [splits, lone, H, D + 2]
    char *blocks;                 // scratch [threads] of block_scratch_bytes
    int rows, lone;               // S; the first `lone` rows have one token
    int table_stride;
    int splits;                   // most segments a lone row's context is cut into
} Step;

typedef struct {
    const Step *step;
    const bf16 *qkv;              // [T, (H + 2 kv_heads) D]
    bf16 *out;                    // [T, H D]
    const bf16 *q_norm, *k_norm;  // [D] or NULL
    void *keys, *values;          // [pages, kv_heads, page_size, D]
    float *key_scales, *value_scales; // [pages, kv_heads, page_size] of an int8 cache
    int heads, kv_heads, head_size, page_size;
    int window;                   // sliding window in keys, 0 for none
    int cache;                    // CACHE_*
    int threads;
    float scale, eps;
} Attention;

INLINE long slot(const Attention *a, int row, int head, int position) {
    const long page = a->step->tables[(long)row * a->step->table_stride + position / a->page_size];
    return (page * a->kv_heads + head) * a->page_size + position % a->page_size;
}

INLINE int position_of(const Attention *a, int row, int token) {
    return a->step->contexts[row] - (a->step->starts[row + 1] - token);
}

INLINE int row_of(const Attention *a, int token) {
    int low = 0, high = a->step->rows - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (a->step->starts[middle] <= token) low = middle;
        else high = middle - 1;
    }
    return low;
}

// Queries lie as [kv_heads, T, group, D]: those that share a key head and follow one another in a
// row are neighbours.
INLINE long query_at(const Attention *a, int head, int token) {
    return ((long)head * a->step->starts[a->step->rows] + token) * (a->heads / a->kv_heads) * a->head_size;
}

// ---- what the cache holds -----------------------------------------------------------------------

// e4m3 to float: its bits are a float's but for the bias of the exponent
INLINE __m512 from_fp8(const uint8_t *p) {
    const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x80)), 24);
    const __m512i rest = _mm512_slli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7f)), 20);
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, rest)), _mm512_set1_ps(0x1p120f));
}

// float to e4m3, to nearest even, at most 448; below 2^-6 in steps of 2^-9
INLINE __m128i to_fp8(__m512 v) {
    const __m512 size = _mm512_min_ps(_mm512_abs_ps(v), _mm512_set1_ps(448.f));
    const __m512i bits = _mm512_castps_si512(size);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
    const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32((127 - 7) << 3));
    const __m512i tiny = _mm512_cvtps_epi32(_mm512_mul_ps(size, _mm512_set1_ps(512.f)));
    const __mmask16 is_tiny = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(v), 24), _mm512_set1_epi32(0x80));
    return _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_mask_blend_epi32(is_tiny, normal, tiny), sign));
}

// `count` keys (or values) from `at` on as bf16 rows; those of a bf16 cache where they lie.
static const bf16 *read_rows(const Attention *a, const void *pool, const float *scales, long at, int count,
                             bf16 *scratch) {
    const int D = a->head_size;
    if (a->cache == CACHE_BF16) return (const bf16 *)pool + at * D;
    const uint8_t *from = (const uint8_t *)pool + at * D;
    for (int j = 0; j < count; j++)
        for (int d = 0; d < D; d += LANES) {
            const uint8_t *p = from + (long)j * D + d;
            const __m512 wide = a->cache == CACHE_FP8
                ? from_fp8(p)
                : _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))),
                                _mm512_set1_ps(scales[at + j]));
            narrow(scratch + (long)j * D + d, wide);
        }
    return scratch;
}

// What is no finite number is stored as 0: whoever gets the page next masks it with zeros.
INLINE __m512 numbers_of(const bf16 *p) {
    const __m512 v = widen(p);
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(INFINITY), _CMP_LT_OQ), v);
}

static void write_row(const Attention *a, void *pool, float *scales, long at, const bf16 *row) {
    const int D = a->head_size;
    if (a->cache == CACHE_BF16) {
        memcpy((bf16 *)pool + at * D, row, D * sizeof(bf16));
        return;
    }
    uint8_t *to = (uint8_t *)pool + at * D;
    if (a->cache == CACHE_FP8) {
        for (int d = 0; d < D; d += LANES) _mm_storeu_si128((void *)(to + d), to_fp8(numbers_of(row + d)));
        return;
    }
    __m512 largest = _mm512_setzero_ps();
    for (int d = 0; d < D; d += LANES) largest = _mm512_max_ps(largest, _mm512_abs_ps(numbers_of(row + d)));
    const float step = _mm512_reduce_max_ps(largest) / 127.f;
    scales[at] = step;
    const __m512 inverse = _mm512_set1_ps(step > 0.f ? 1.f / step : 0.f);
    for (int d = 0; d < D; d += LANES)
        _mm_storeu_si128((void *)(to + d),
                         _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(numbers_of(row + d), inverse))));
}

// ---- rotary positions, append -------------------------------------------------------------------

INLINE __m256 widen_eight(const bf16 *p) {
    return _mm512_castps512_ps256(_mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_castsi128_si256(_mm_loadu_si128((const void *)p))), 16)));
}

// halves convention: element i turns with element i + D/2; after an optional norm
static void rotate(const bf16 *in, const bf16 *norm, const float *cosines, const float *sines, int D,
                   float eps, bf16 *out) {
    bf16 normed[MAX_HEAD_SIZE];
    if (norm) rms_norm(in, norm, D, eps, normed), in = normed;
    for (int i = 0; i < D / 2; i += 8) { // eight of each half: D / 2 is a multiple of 8
        const __m256 a = widen_eight(in + i), b = widen_eight(in + D / 2 + i);
        const __m256 c = _mm256_loadu_ps(cosines + i), s = _mm256_loadu_ps(sines + i);
        const __m256 first = _mm256_sub_ps(_mm256_mul_ps(a, c), _mm256_mul_ps(b, s));
        const __m256 second = _mm256_add_ps(_mm256_mul_ps(b, c), _mm256_mul_ps(a, s));
        _mm_storeu_si128((void *)(out + i), (__m128i)_mm256_cvtneps_pbh(first));
        _mm_storeu_si128((void *)(out + D / 2 + i), (__m128i)_mm256_cvtneps_pbh(second));
    }
}

static void rotate_and_append(const Attention *a, const bf16 *qkv, bf16 *queries, int token, int head) {
    const int D = a->head_size, group = a->heads / a->kv_heads, row = row_of(a, token);
    const bf16 *mine = qkv + (long)token * (a->heads + 2 * a->kv_heads) * D;
    const float *cosines = a->step->cosines + (long)token * (D / 2), *sines = a->step->sines + (long)token * (D / 2);
    bf16 *turned = queries + query_at(a, head, token), key[MAX_HEAD_SIZE];
    for (int g = 0; g < group; g++)
        rotate(mine + (long)(head * group + g) * D, a->q_norm, cosines, sines, D, a->eps, turned + (long)g * D);
    rotate(mine + (long)(a->heads + head) * D, a->k_norm, cosines, sines, D, a->eps, key);
    const long at = slot(a, row, head, position_of(a, row, token));
    write_row(a, a->keys, a->key_scales, at, key);
    write_row(a, a->values, a->value_scales, at, mine + (long)(a->heads + a->kv_heads + head) * D);
}

// ---- the running softmax ------------------------------------------------------------------------

// weights[j] = e^(score - top) in bf16, zeros up to the end of the tile; gives their sum, unrounded.
INLINE float weigh(const float *scores, int count, float top, bf16 *weights) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < KEY_TILE; j += LANES) {
        const __mmask16 lanes = count > j ? first_lanes(count - j) : 0;
        const __m512 shifted = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + j), _mm512_set1_ps(top));
        const __m512 weight = _mm512_maskz_mov_ps(lanes, exponential(shifted));
        narrow(weights + j, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    return _mm512_reduce_add_ps(sum);
}

INLINE float largest(const float *scores, int count, float top) {
    __m512 peaks = _mm512_set1_ps(top);
    for (int j = 0; j < count; j += LANES) {
        const __mmask16 lanes = first_lanes(count - j);
        peaks = _mm512_mask_max_ps(peaks, lanes, peaks, _mm512_maskz_loadu_ps(lanes, scores + j));
    }
    return _mm512_reduce_max_ps(peaks);
}

// Keys of one tile: up to the next multiple of KEY_TILE, within `to` and within the page.
INLINE int tile_length(const Attention *a, int at, int to) {
    return at_most(at_most(to - at, KEY_TILE - at % KEY_TILE), a->page_size - at % a->page_size);
}

// ---- lone tokens --------------------------------------------------------------------------------

// The sums of sixteen vectors, side by side: each by the same tree, cheaper together than one by one.
INLINE __m512 sixteen_sums(__m512 *v) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

INLINE __m512bh load_tail(const bf16 *p, int count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(count >= PAIRS ? ~0u : (1u << count) - 1, p);
}

// The tile a thread reads next, of this segment or of its next one: `count` keys of `width` bytes. It is
// asked for line by line between products: a core keeps only so many lines on their way, and a burst
// of more holds up everything behind it.
typedef struct {
    const char *keys, *values;
    int count;
    long width;
} Ahead;

INLINE Ahead ahead_of(const Attention *a, int row, int head, int from, int to) {
    if (from >= to) return (Ahead){a->keys, a->values, 0, 0};
    const long width = (long)a->head_size * (a->cache == CACHE_BF16 ? sizeof(bf16) : 1);
    const long at = slot(a, row, head, from) * width;
    return (Ahead){(const char *)a->keys + at, (const char *)a->values + at, tile_length(a, from, to), width};
}

// scores[h][j] = scale * dot(q[h], key j) for `count` <= KEY_TILE keys that follow one another; what
// stands behind them in the last vector means nothing. The next tile is fetched meanwhile.
INLINE void score_keys(const bf16 *q, const bf16 *keys, int D, int heads, int count, float scale, const Ahead *ahead,
                       float scores[HEAD_TILE][KEY_TILE]) {
    for (int j = 0; j < count; j += LANES) {
        const bf16 *at[LANES];
        for (int i = 0; i < LANES; i++) at[i] = keys + (long)at_most(j + i, count - 1) * D;
        for (int h = 0; h < heads; h++) {
            const int first = j + LANES * h / heads, end = at_most(j + LANES * (h + 1) / heads, ahead->count);
            for (long byte = first * ahead->width; byte < end * ahead->width; byte += 64)
                _mm_prefetch(ahead->keys + byte, _MM_HINT_T1);
            __m512 sums[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) sums[i] = _mm512_setzero_ps();
            for (int d = 0; d < D; d += PAIRS) {
                const __m512bh query = load_tail(q + (long)h * D + d, D - d);
                if (D - d >= PAIRS) {
#pragma GCC unroll 16
                    for (int i = 0; i < LANES; i++) sums[i] = _mm512_dpbf16_ps(sums[i], query, load(at[i] + d));
                } else {
#pragma GCC unroll 16
                    for (int i = 0; i < LANES; i++)
                        sums[i] = _mm512_dpbf16_ps(sums[i], query, load_tail(at[i] + d, D - d));
                }
            }
            _mm512_storeu_ps(scores[h] + j, _mm512_mul_ps(sixteen_sums(sums), _mm512_set1_ps(scale)));
        }
    }
}

// sums[h] = factor[h] * sums[h] + weights[h] V over `count` values that follow one another. Two
// values are interleaved for each product; so sums lie, 32 at a time, as `in_order` finds them.
INLINE void add_values(const bf16 *values, int D, const int heads, int count, const float *factor, const Ahead *ahead,
                       bf16 weights[HEAD_TILE][KEY_TILE], float sums[HEAD_TILE][MAX_HEAD_SIZE]) {
    for (int d = 0; d < D; d += PAIRS) {
        __m512 low[HEAD_TILE], high[HEAD_TILE];
        for (int h = 0; h < heads; h++) {
            low[h] = _mm512_mul_ps(_mm512_loadu_ps(sums[h] + d), _mm512_set1_ps(factor[h]));
            high[h] = _mm512_mul_ps(_mm512_loadu_ps(sums[h] + d + LANES), _mm512_set1_ps(factor[h]));
        }
        for (int j = 0; j < count; j += 2) { // of an odd count the last weighs nothing
            const bf16 *at = values + (long)j * D + d;
            const char *next = ahead->values + j * ahead->width + d * ahead->width / D;
            _mm_prefetch(next, _MM_HINT_T1);
            _mm_prefetch(next + ahead->width, _MM_HINT_T1);
            const __m512i even = (__m512i)load_tail(at, D - d);
            const __m512i odd = j + 1 < count ? (__m512i)load_tail(at + D, D - d) : _mm512_setzero_si512();
            const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(even, odd);
            const __m512bh second = (__m512bh)_mm512_unpackhi_epi16(even, odd);
            for (int h = 0; h < heads; h++) {
                const __m512bh weight = spread(weights[h] + j);
                low[h] = _mm512_dpbf16_ps(low[h], first, weight);
                high[h] = _mm512_dpbf16_ps(high[h], second, weight);
            }
        }
        for (int h = 0; h < heads; h++) {
            _mm512_storeu_ps(sums[h] + d, low[h]);
            _mm512_storeu_ps(sums[h] + d + LANES, high[h]);
        }
    }
}

// Keys in a segment of a context: a function of that context alone, so that a row's result does not
// depend on the other rows. At most `splits` segments.
INLINE int segment_length(const Attention *a, int context) {
    const int each = (context + a->step->splits - 1) / a->step->splits;
    return (each + SEGMENT - 1) / SEGMENT * SEGMENT;
}

// Keys [from, to) of a lone row for `heads` query heads from `query` on, which share key head `head`.
typedef struct { int row, split, head, query, heads, from, to; } Segment;

// Heads follow one another as they lie in a page. Where a row has fewer segments than others, or a
// window hides one, there is nothing to read.
INLINE Segment segment_of(const Attention *a, int task, int tiles) {
    const int group = a->heads / a->kv_heads, tile = task % tiles, head = task / tiles % a->kv_heads;
    const int split = task / tiles / a->kv_heads % a->step->splits, row = task / tiles / a->kv_heads / a->step->splits;
    const int seen = a->step->contexts[row], length = segment_length(a, seen);
    const int first = a->window && seen > a->window ? seen - a->window : 0;
    return (Segment){row, split, head, head * group + tile * HEAD_TILE, at_most(group - tile * HEAD_TILE, HEAD_TILE),
                     split * length > first ? split * length : first, at_most((split + 1) * length, seen)};
}

// Undoes the interleaving: quarters of `low` and `high` take turns.
INLINE void in_order(const float *sums, int D, float *out) {
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    for (int d = 0; d < D; d += PAIRS) {
        const __m512 low = _mm512_loadu_ps(sums + d), high = _mm512_loadu_ps(sums + d + LANES);
        _mm512_storeu_ps(out + d, _mm512_permutex2var_ps(low, front, high));
        if (D - d > LANES) _mm512_storeu_ps(out + d + LANES, _mm512_permutex2var_ps(low, back, high));
    }
}

// Attends to one segment, and fetches the beginning of the `next`. partials: [splits, lone, H, D + 2]
// sums, then top and total; splits are `stride` apart.
static void attend_segment(const Attention *a, const bf16 *queries, Segment s, Segment next, long stride, float *partials) {
    const int D = a->head_size, group = a->heads / a->kv_heads, row = s.row, head = s.head, heads = s.heads, to = s.to;
    const bf16 *q = queries + query_at(a, head, row) + (long)(s.query - head * group) * D;
    float *partial = partials + s.split * stride + ((long)row * a->heads + s.query) * (D + 2);
    float scores[HEAD_TILE][KEY_TILE], sums[HEAD_TILE][MAX_HEAD_SIZE];
    float top[HEAD_TILE], total[HEAD_TILE], factor[HEAD_TILE];
    bf16 weights[HEAD_TILE][KEY_TILE];
    bf16 wide_keys[KEY_TILE * MAX_HEAD_SIZE], wide_values[KEY_TILE * MAX_HEAD_SIZE];
    for (int h = 0; h < heads; h++) {
        top[h] = -INFINITY, total[h] = 0.f;
        for (int d = 0; d < MAX_HEAD_SIZE; d++) sums[h][d] = 0.f;
    }
    for (int at = s.from, count; at < to; at += count) {
        count = tile_length(a, at, to);
        const long here = slot(a, row, head, at);
        const Ahead ahead = at + count < to ? ahead_of(a, row, head, at + count, to)
                                            : ahead_of(a, next.row, next.head, next.from, next.to);
        const bf16 *keys = read_rows(a, a->keys, a->key_scales, here, count, wide_keys);
        const bf16 *values = read_rows(a, a->values, a->value_scales, here, count, wide_values);
        score_keys(q, keys, D, heads, count, a->scale, &ahead, scores);
        for (int h = 0; h < heads; h++) {
            const float now = largest(scores[h], count, top[h]);
            factor[h] = expf(top[h] - now);
            total[h] = total[h] * factor[h] + weigh(scores[h], count, now, weights[h]);
            top[h] = now;
        }
        if (heads == HEAD_TILE) add_values(values, D, HEAD_TILE, count, factor, &ahead, weights, sums);
        else if (heads == 3) add_values(values, D, 3, count, factor, &ahead, weights, sums);
        else if (heads == 2) add_values(values, D, 2, count, factor, &ahead, weights, sums);
        else add_values(values, D, 1, count, factor, &ahead, weights, sums);
    }
    for (int h = 0; h < heads; h++) {
        float *mine = partial + (long)h * (D + 2);
        in_order(sums[h], D, mine);
        mine[D] = top[h], mine[D + 1] = total[h];
    }
}

// The parts of one query head become its output: each weighted by e^(its top - the common top).
static void merge(const Attention *a, const float *partials, int parts, long stride, bf16 *out) {
    const int D = a->head_size;
    float top = -INFINITY, total = 0.f, weights[MAX_HEAD_SIZE];
    for (int s = 0; s < parts; s++) top = fmaxf(top, partials[s * stride + D]);
    for (int s = 0; s < parts; s++) {
        weights[s] = expf(partials[s * stride + D] - top);
        total += weights[s] * partials[s * stride + D + 1];
    }
    for (int d = 0; d < D; d += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (int s = 0; s < parts; s++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[s]), _mm512_loadu_ps(partials + s * stride + d), sum);
        narrow(out + d, _mm512_div_ps(sum, _mm512_set1_ps(total)));
    }
}

// ---- chunks of prompts --------------------------------------------------------------------------

// A tile of keys as a panel pair for scores = q K^T: [2][D / 2][PANEL][2]. Missing keys are zeros.
static void panels_of_keys(const bf16 *keys, int count, int D, bf16 *panels) {
    for (int half = 0; half < 2; half++)
        for (int d = 0; d < D; d += PAIRS) { // sixteen pairs of sixteen keys: a transpose in registers
            for (int part = 0; part < PANEL; part += LANES) {
                __m512i r[LANES], t[LANES];
                const int width = at_most(D - d, PAIRS);
                for (int j = 0; j < LANES; j++) {
                    const int key = half * PANEL + part + j;
                    r[j] = key < count ? (__m512i)load_tail(keys + (long)key * D + d, width) : _mm512_setzero_si512();
                }
                for (int j = 0; j < LANES; j += 2) {
                    t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
                    t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
                }
                for (int j = 0; j < LANES; j += 4) {
                    r[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
                    r[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
                    r[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
                    r[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
                }
                for (int j = 0; j < 4; j++) {
                    t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
                    t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
                    t[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
                    t[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
                }
                for (int j = 0; j < 4; j++) {
                    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
                    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
                    r[j + 4] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0x88);
                    r[j + 12] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0xdd);
                }
                for (int j = 0; j < width / 2; j++)
                    _mm512_storeu_si512(panels + ((long)half * D / 2 + d / 2 + j) * 2 * PANEL + 2 * part, r[j]);
            }
        }
}

// A tile of values as panels for weights V: [D / PANEL][KEY_TILE / 2][PANEL][2], D rounded up.
static void panels_of_values(const bf16 *values, int count, int D, bf16 *panels) {
    for (int d = 0; d < D; d += PANEL)
        for (int j = 0; j < KEY_TILE; j += 2) {
            bf16 *to = panels + (long)d * KEY_TILE + (long)j * PANEL;
            for (int part = 0; part < PANEL; part += LANES) {
                const int is_there = d + part < D;
                const __m256i none = _mm256_setzero_si256();
                const bf16 *at = values + (long)j * D + d + part;
                const __m256i even = is_there && j < count ? _mm256_loadu_si256((const void *)at) : none;
                const __m256i odd = is_there && j + 1 < count ? _mm256_loadu_si256((const void *)(at + D)) : none;
                _mm512_storeu_si512(to + 2 * part, _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                                                   _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
            }
        }
}

// What a block of queries knows so far; one row a query head of a token.
typedef struct {
    float *sums;             // [rows, D rounded up to PANEL]
    float *tops, *totals;    // [rows]
} Running;

// `rows` <= TILE query rows against one tile of keys [at, at + count). `first` is the position of
// the first row's token, rows of `group` heads a token.
INLINE void attend_rows(const Attention *a, const bf16 *q, int first_row, const int rows, int group, int first,
                        int at, int count, const bf16 *keys, const bf16 *values, Running *known) {
    const int D = a->head_size, width = (D + PANEL - 1) / PANEL * PANEL;
    float scores[TILE][KEY_TILE], factors[TILE];
    bf16 weights[TILE][KEY_TILE];
    for (int half = 0; half < KEY_TILE / PANEL; half++) {
        __m512 sums[2 * TILE];
#pragma GCC unroll 24
        for (int i = 0; i < 2 * rows; i++) sums[i] = _mm512_setzero_ps();
        tile_product(keys + (long)half * D * PANEL, q + (long)first_row * D, D, D, rows, 0, sums);
#pragma GCC unroll 24
        for (int i = 0; i < 2 * rows; i++)
            _mm512_storeu_ps(scores[i / 2] + half * PANEL + i % 2 * LANES, _mm512_mul_ps(sums[i], _mm512_set1_ps(a->scale)));
    }
    for (int r = 0; r < rows; r++) {
        const int position = first + (first_row + r) / group;
        const int end = at_most(position + 1 - at, count); // keys of the tile it sees: [begin, end)
        const int oldest = a->window ? position + 1 - a->window - at : 0;
        const int begin = oldest > 0 ? oldest : 0;
        float *top = known->tops + first_row + r, *total = known->totals + first_row + r;
        factors[r] = 1.f;
        if (begin >= end) {
            memset(weights[r], 0, sizeof weights[r]);
            continue;
        }
        for (int j = 0; j < begin; j++) scores[r][j] = -INFINITY;
        const float now = largest(scores[r], end, *top);
        factors[r] = expf(*top - now);
        *total = *total * factors[r] + weigh(scores[r], end, now, weights[r]);
        *top = now;
        for (int j = 0; j < begin; j++) weights[r][j] = 0; // not only e^-87
    }
    for (int d = 0; d < width; d += PANEL) {
        __m512 sums[2 * TILE];
        float *mine = known->sums + (long)first_row * width + d;
#pragma GCC unroll 24
        for (int i = 0; i < 2 * rows; i++)
            sums[i] = _mm512_mul_ps(_mm512_loadu_ps(mine + (long)(i / 2) * width + i % 2 * LANES), _mm512_set1_ps(factors[i / 2]));
        tile_product(values + (long)d * KEY_TILE, weights[0], KEY_TILE, KEY_TILE, rows, 0, sums);
#pragma GCC unroll 24
        for (int i = 0; i < 2 * rows; i++) _mm512_storeu_ps(mine + (long)(i / 2) * width + i % 2 * LANES, sums[i]);
    }
}

// Tokens [token, token + count) of a chunk, all query heads of one kv head.
static void attend_block(const Attention *a, const bf16 *queries, int row, int head, int token, int count,
                         bf16 *scratch, bf16 *out) {
    const int D = a->head_size, group = a->heads / a->kv_heads, rows = count * group;
    const int width = (D + PANEL - 1) / PANEL * PANEL;
    const int first = position_of(a, row, token), last = first + count;
    bf16 *keys = scratch, *values = keys + KEY_TILE * D, *wide = values + KEY_TILE * width;
    float *numbers = (float *)(wide + KEY_TILE * D);
    Running known = {numbers + 2 * rows, numbers, numbers + rows};
    for (int r = 0; r < rows; r++) known.tops[r] = -INFINITY, known.totals[r] = 0.f;
    memset(known.sums, 0, (long)rows * width * sizeof(float));
    const bf16 *q = queries + query_at(a, head, token);
    const int oldest = a->window && first + 1 > a->window ? first + 1 - a->window : 0;
    for (int at = oldest / KEY_TILE * KEY_TILE, seen; at < last; at += seen) {
        seen = tile_length(a, at, last);
        const long here = slot(a, row, head, at);
        panels_of_keys(read_rows(a, a->keys, a->key_scales, here, seen, wide), seen, D, keys);
        panels_of_values(read_rows(a, a->values, a->value_scales, here, seen, wide), seen, D, values);
        const int blind = at > first ? (at - first) * group / TILE * TILE : 0; // tokens before these keys
        int r = blind;
        for (; r + TILE <= rows; r += TILE) attend_rows(a, q, r, TILE, group, first, at, seen, keys, values, &known);
        for (; r + 4 <= rows; r += 4) attend_rows(a, q, r, 4, group, first, at, seen, keys, values, &known);
        for (; r < rows; r++) attend_rows(a, q, r, 1, group, first, at, seen, keys, values, &known);
    }
    for (int r = 0; r < rows; r++) {
        bf16 *to = out + (long)(token + r / group) * a->heads * D + (long)(head * group + r % group) * D;
        const __m512 total = _mm512_set1_ps(known.totals[r]);
        for (int d = 0; d < D; d += LANES)
            narrow(to + d, _mm512_div_ps(_mm512_loadu_ps(known.sums + (long)r * width + d), total));
    }
}

// Bytes of scratch a thread needs for a block of queries.
long block_scratch_bytes(int head_size, int group) {
    const long width = (head_size + PANEL - 1) / PANEL * PANEL, rows = (long)QUERY_BLOCK * group;
    return 2 * KEY_TILE * (2l * head_size + width) + 4 * rows * (width + 2) + 64;
}

// ---- all of it ----------------------------------------------------------------------------------

// The block of queries with this number, counted over the rows of several tokens.
static int find_block(const Attention *a, int number, int *token) {
    for (int row = a->step->lone; row < a->step->rows; row++) {
        const int blocks = (a->step->starts[row + 1] - a->step->starts[row] + QUERY_BLOCK - 1) / QUERY_BLOCK;
        if (number < blocks) {
            *token = a->step->starts[row] + number * QUERY_BLOCK;
            return row;
        }
        number -= blocks;
    }
    return -1;
}

// Keys and values of the tokens are appended, then attended to. D is a multiple of 16, at most
// MAX_HEAD_SIZE; so are the splits. No two tokens may append to one slot.
void paged_attention(const Attention *a) {
    const bf16 *qkv = a->qkv;
    bf16 *out = a->out, *queries = a->step->queries;
    float *partials = a->step->partials;
    char *blocks = a->step->blocks;
    const int D = a->head_size, group = a->heads / a->kv_heads, tokens = a->step->starts[a->step->rows];
    const int tiles = (group + HEAD_TILE - 1) / HEAD_TILE;
    const long stride = (long)a->step->lone * a->heads * (D + 2);
    const int tasks = a->step->lone * a->kv_heads * tiles * a->step->splits;
    const int turn = tasks / (TURNS * a->threads) > 1 ? tasks / (TURNS * a->threads) : 1;
    int num_blocks = 0;
    for (int row = a->step->lone; row < a->step->rows; row++)
        num_blocks += (a->step->starts[row + 1] - a->step->starts[row] + QUERY_BLOCK - 1) / QUERY_BLOCK;
#pragma omp parallel num_threads(a->threads)
    {
        bf16 *scratch = (bf16 *)(blocks + omp_get_thread_num() * block_scratch_bytes(D, group));
#pragma omp for schedule(dynamic, 4)
        for (int task = 0; task < tokens * a->kv_heads; task++)
            rotate_and_append(a, qkv, queries, task / a->kv_heads, task % a->kv_heads);
#pragma omp for schedule(dynamic) nowait
        for (int task = num_blocks * a->kv_heads - 1; task >= 0; task--) { // the longest contexts first
            int token = 0;
            const int row = find_block(a, task / a->kv_heads, &token);
            attend_block(a, queries, row, task % a->kv_heads, token, at_most(QUERY_BLOCK, a->step->starts[row + 1] - token), scratch, out);
        }
#pragma omp for schedule(dynamic, turn)
        for (int task = 0; task < tasks; task++) {
            const Segment mine = segment_of(a, task, tiles), next = task + 1 < tasks ? segment_of(a, task + 1, tiles) : (Segment){0};
            if (mine.from < mine.to) attend_segment(a, queries, mine, next, stride, partials);
        }
#pragma omp for schedule(static) nowait
        for (int head = 0; head < a->step->lone * a->heads; head++) {
            const int seen = a->step->contexts[head / a->heads], length = segment_length(a, seen);
            const int first = a->window && seen > a->window ? (seen - a->window) / length : 0;
            merge(a, partials + first * stride + (long)head * (D + 2), (seen + length - 1) / length - first, stride, out + (long)head * D);
        }
    }
}

#endif
