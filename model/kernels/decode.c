// Decode kernels for Llama-shaped networks on x86-64 with AVX-512 BF16.
//
// A decode step of a few rows reads every weight once and computes little: it is bound by memory.
// These four functions read the weights in the order they lie in a safetensors file (row-major
// [out, in], bf16, no packing), ahead of use, and fuse what stands before and after each matrix, so
// that a layer is four passes over the threads and no intermediate leaves the second-level cache.
//
//   rms_linear       y    = norm(x) W^T + b          (QKV; with norm = NULL a plain linear; the head)
//   linear_add       x   += a W^T + b                (attention output, MLP down)
//   rms_gate_up      act  = silu(norm(x) G^T) * (norm(x) U^T)   with W = [G; U]
//   paged_attention  rotary position, append to the paged cache, attend
//
// Shapes and names: M rows (sequences), K inputs, N outputs, H query heads, D head size.
// Every function is called through ctypes; its caller owns all memory, `scratch` included. Arrays
// are contiguous. Threads come from the OpenMP runtime that is already in the process (torch's).

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define LANES 16            // floats in a vector
#define PAIRS 32            // bf16 in a vector
#define ROW_BLOCK 32        // outputs one thread takes at a time
#define ROW_TILE 8          // activation rows that share one read of the weights
#define MAX_ROWS 32         // of a call: bounds the arrays on the stack
#define KEY_TILE 64         // keys between two updates of the running softmax
#define HEAD_TILE 4         // query heads that share one read of K and V
#define SEGMENT 256         // keys of a context one thread attends to, more for long contexts
#define MAX_HEAD_SIZE 256
#define PREFETCH_BYTES 8192 // ahead of the read: measured, see model/README.md

INLINE float to_float(bf16 value) {
    union { uint32_t bits; float number; } both = {(uint32_t)value << 16};
    return both.number;
}

INLINE __m512 widen(const bf16 *p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

INLINE void narrow(bf16 *p, __m512 v) {
    _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(v));
}

INLINE __m512bh load(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

INLINE __m512bh load_tail(const bf16 *p, int count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p);
}

// bf16 of one float, rounded to nearest even
INLINE bf16 to_bf16(float value) {
    return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0);
}

// e^x for x <= 0 to about 2 units in the last place of a float: 2^n times a polynomial in the rest
INLINE __m512 exponential(__m512 x) {
    const __m512 t = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(t, 0);
    const __m512 rest = _mm512_sub_ps(t, whole);
    __m512 p = _mm512_set1_ps(1.33336e-3f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.61812e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(.240226507f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(.693147181f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, whole);
}

// ---- matrix times a few rows --------------------------------------------------------------------

INLINE __m256 halves(__m512 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

INLINE float horizontal_sum(__m512 v) {
    const __m256 pairs = _mm256_hadd_ps(halves(v), halves(v));
    const __m256 quads = _mm256_hadd_ps(pairs, pairs);
    return _mm256_cvtss_f32(quads) + _mm_cvtss_f32(_mm256_extractf128_ps(quads, 1));
}

// The eight horizontal sums of eight vectors: cheaper together than one by one, and added in the
// same order, so that a row's result does not depend on how many rows it is computed with.
INLINE __m256 eight_sums(const __m512 *v) {
    const __m256 a = _mm256_hadd_ps(halves(v[0]), halves(v[1]));
    const __m256 b = _mm256_hadd_ps(halves(v[2]), halves(v[3]));
    const __m256 c = _mm256_hadd_ps(halves(v[4]), halves(v[5]));
    const __m256 d = _mm256_hadd_ps(halves(v[6]), halves(v[7]));
    const __m256 ab = _mm256_hadd_ps(a, b), cd = _mm256_hadd_ps(c, d);
    return _mm256_add_ps(_mm256_permute2f128_ps(ab, cd, 0x20), _mm256_permute2f128_ps(ab, cd, 0x31));
}

// y[m * stride + r] = dot(w[r], x[m]) for `outs` weight rows and `rows` activation rows. Both are
// constants where this is inlined, so the sums live in registers. Two weight rows at a time: more
// streams than that outrun the hardware's prefetcher.
INLINE void dot_tile(const bf16 *w, const bf16 *x, int K, const int outs, const int rows, float *y,
                     long stride) {
    __m512 sums[2 * ROW_TILE];
    for (int i = 0; i < outs * rows; i++) sums[i] = _mm512_setzero_ps();
    const int whole = K & ~(PAIRS - 1);
    for (int k = 0; k < whole; k += PAIRS) {
        __m512bh weights[2];
        for (int r = 0; r < outs; r++) {
            const bf16 *at = w + (long)r * K + k;
            weights[r] = load(at);
            _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T1);
        }
        for (int m = 0; m < rows; m++) {
            const __m512bh inputs = load(x + (long)m * K + k);
            for (int r = 0; r < outs; r++)
                sums[r * rows + m] = _mm512_dpbf16_ps(sums[r * rows + m], weights[r], inputs);
        }
    }
    if (whole < K)
        for (int m = 0; m < rows; m++) {
            const __m512bh inputs = load_tail(x + (long)m * K + whole, K - whole);
            for (int r = 0; r < outs; r++)
                sums[r * rows + m] = _mm512_dpbf16_ps(
                    sums[r * rows + m], load_tail(w + (long)r * K + whole, K - whole), inputs);
        }
    for (int r = 0; r < outs; r++) {
        if (rows == ROW_TILE) {
            float out[ROW_TILE];
            _mm256_storeu_ps(out, eight_sums(sums + r * rows));
            for (int m = 0; m < rows; m++) y[m * stride + r] = out[m];
        } else {
            for (int m = 0; m < rows; m++) y[m * stride + r] = horizontal_sum(sums[r * rows + m]);
        }
    }
}

INLINE void dot_rows(const bf16 *w, const bf16 *x, int K, const int outs, int rows, float *y,
                     long stride) {
    switch (rows) {
    case 1: dot_tile(w, x, K, outs, 1, y, stride); break;
    case 2: dot_tile(w, x, K, outs, 2, y, stride); break;
    case 3: dot_tile(w, x, K, outs, 3, y, stride); break;
    case 4: dot_tile(w, x, K, outs, 4, y, stride); break;
    case 5: dot_tile(w, x, K, outs, 5, y, stride); break;
    case 6: dot_tile(w, x, K, outs, 6, y, stride); break;
    case 7: dot_tile(w, x, K, outs, 7, y, stride); break;
    default: dot_tile(w, x, K, outs, ROW_TILE, y, stride);
    }
}

// y[m * ROW_BLOCK + n] = dot(w[n], x[m]) for n < count <= ROW_BLOCK, m < M
static void dot_block(const bf16 *w, const bf16 *x, int K, int M, int count, float *y) {
    int n = 0;
    for (; n + 2 <= count; n += 2)
        for (int m = 0; m < M; m += ROW_TILE)
            dot_rows(w + (long)n * K, x + (long)m * K, K, 2, M - m, y + (long)m * ROW_BLOCK + n, ROW_BLOCK);
    if (n < count)
        for (int m = 0; m < M; m += ROW_TILE)
            dot_rows(w + (long)n * K, x + (long)m * K, K, 1, M - m, y + (long)m * ROW_BLOCK + n, ROW_BLOCK);
}

static void rms_norm(const bf16 *x, const bf16 *weight, int K, float eps, bf16 *out) {
    const int whole = K & ~(LANES - 1);
    __m512 squares = _mm512_setzero_ps();
    for (int k = 0; k < whole; k += LANES) {
        const __m512 v = widen(x + k);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    float sum = _mm512_reduce_add_ps(squares);
    for (int k = whole; k < K; k++) sum += to_float(x[k]) * to_float(x[k]);
    const float scale = 1.f / sqrtf(sum / K + eps);
    for (int k = 0; k < whole; k += LANES)
        narrow(out + k, _mm512_mul_ps(_mm512_mul_ps(widen(x + k), _mm512_set1_ps(scale)), widen(weight + k)));
    for (int k = whole; k < K; k++) out[k] = to_bf16(to_float(x[k]) * scale * to_float(weight[k]));
}

// The inputs of a matrix: x itself, or its norm in this thread's slice of scratch [threads, M, K].
static const bf16 *normalized(const bf16 *x, const bf16 *norm, int M, int K, float eps, bf16 *scratch) {
    if (!norm) return x;
    bf16 *mine = scratch + (long)omp_get_thread_num() * M * K;
    for (int m = 0; m < M; m++) rms_norm(x + (long)m * K, norm, K, eps, mine + (long)m * K);
    return mine;
}

INLINE __mmask16 first_lanes(int count) {
    return (__mmask16)(count >= LANES ? 0xffff : (1u << count) - 1);
}

INLINE __m512 widen_some(const bf16 *p, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

INLINE void narrow_some(bf16 *p, __mmask16 lanes, __m512 v) {
    _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(v));
}

// sums[i .. i + LANES) of a block, with the bias of their outputs
INLINE __m512 biased(const float *sums, const bf16 *bias, int i, __mmask16 lanes) {
    const __m512 sum = _mm512_maskz_loadu_ps(lanes, sums + i);
    return bias ? _mm512_add_ps(sum, widen_some(bias + i, lanes)) : sum;
}

#define FOR_BLOCKS(n, N) _Pragma("omp for schedule(dynamic) nowait") for (int n = 0; n < (N); n += ROW_BLOCK)
INLINE int at_most(int value, int bound) { return value < bound ? value : bound; }

// Exactly one of y (bf16) and logits (float) is given. norm and bias may be NULL. M <= MAX_ROWS.
void rms_linear(const bf16 *x, const bf16 *norm, const bf16 *w, const bf16 *bias, bf16 *y,
                float *logits, bf16 *scratch, int M, int K, int N, float eps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const bf16 *inputs = normalized(x, norm, M, K, eps, scratch);
        float out[MAX_ROWS * ROW_BLOCK];
        FOR_BLOCKS(n, N) {
            const int count = at_most(N - n, ROW_BLOCK);
            dot_block(w + (long)n * K, inputs, K, M, count, out);
            for (int m = 0; m < M; m++)
                for (int i = 0; i < count; i += LANES) {
                    const __mmask16 lanes = first_lanes(count - i);
                    const __m512 sum = biased(out + m * ROW_BLOCK, bias ? bias + n : bias, i, lanes);
                    if (logits) _mm512_mask_storeu_ps(logits + (long)m * N + n + i, lanes, sum);
                    else narrow_some(y + (long)m * N + n + i, lanes, sum);
                }
        }
    }
}

// x [M, N] += a [M, K] W^T + bias, the sum rounded once. bias may be NULL. M <= MAX_ROWS.
void linear_add(const bf16 *a, const bf16 *w, const bf16 *bias, bf16 *x, int M, int K, int N, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float out[MAX_ROWS * ROW_BLOCK];
        FOR_BLOCKS(n, N) {
            const int count = at_most(N - n, ROW_BLOCK);
            dot_block(w + (long)n * K, a, K, M, count, out);
            for (int m = 0; m < M; m++)
                for (int i = 0; i < count; i += LANES) {
                    const __mmask16 lanes = first_lanes(count - i);
                    const __m512 sum = biased(out + m * ROW_BLOCK, bias ? bias + n : bias, i, lanes);
                    bf16 *at = x + (long)m * N + n + i;
                    narrow_some(at, lanes, _mm512_add_ps(widen_some(at, lanes), sum));
                }
        }
    }
}

// act [M, I] = silu(gate) * up; w is [2 I, K], gate above up; bias [2 I] or NULL. M <= MAX_ROWS.
void rms_gate_up(const bf16 *x, const bf16 *norm, const bf16 *w, const bf16 *bias, bf16 *act,
                 bf16 *scratch, int M, int K, int I, float eps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const bf16 *inputs = normalized(x, norm, M, K, eps, scratch);
        float gate[MAX_ROWS * ROW_BLOCK], up[MAX_ROWS * ROW_BLOCK];
        FOR_BLOCKS(n, I) {
            const int count = at_most(I - n, ROW_BLOCK);
            dot_block(w + (long)n * K, inputs, K, M, count, gate);
            dot_block(w + (long)(I + n) * K, inputs, K, M, count, up);
            for (int m = 0; m < M; m++)
                for (int i = 0; i < count; i += LANES) {
                    const __mmask16 lanes = first_lanes(count - i);
                    const bf16 *up_bias = bias ? bias + I + n : bias;
                    const __m512 g = biased(gate + m * ROW_BLOCK, bias ? bias + n : bias, i, lanes);
                    const __m512 u = biased(up + m * ROW_BLOCK, up_bias, i, lanes);
                    // silu(g) = g / (1 + e^-g), by e^-|g| so that the exponent never overflows
                    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(g)));
                    const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
                    const __m512 top = _mm512_mask_blend_ps(negative, _mm512_set1_ps(1.f), e);
                    const __m512 sigmoid = _mm512_div_ps(top, _mm512_add_ps(e, _mm512_set1_ps(1.f)));
                    const __m512 out = _mm512_mul_ps(_mm512_mul_ps(g, sigmoid), u);
                    narrow_some(act + (long)m * I + n + i, lanes, out);
                }
        }
    }
}

// ---- attention ----------------------------------------------------------------------------------

typedef struct {
    const bf16 *q_norm, *k_norm;  // [D] or NULL
    const float *cosines, *sines; // [M, D / 2], of each row's position
    bf16 *keys, *values;          // [pages, kv_heads, page_size, D]
    const int32_t *tables;        // [M, table_stride] page numbers
    const int32_t *contexts;      // [M] keys a row sees, its own included
    int rows, heads, kv_heads, head_size, page_size, table_stride;
    int window;                   // sliding window in keys, 0 for none
    int splits;                   // most segments a row's context is cut into
    float scale, eps;
    int threads;
} Attention;

INLINE long page_offset(const Attention *a, int row, int head, int position) {
    const long page = a->tables[(long)row * a->table_stride + position / a->page_size];
    return ((page * a->kv_heads + head) * a->page_size + position % a->page_size) * a->head_size;
}

// rotary position (halves convention: element i turns with element i + D/2), after an optional norm
static void rotate(const bf16 *in, const bf16 *norm, const float *cosines, const float *sines, int D,
                   float eps, bf16 *out) {
    bf16 normed[MAX_HEAD_SIZE];
    if (norm) rms_norm(in, norm, D, eps, normed), in = normed;
    for (int i = 0; i < D / 2; i += 8) { // eight of each half: D / 2 is a multiple of 8
        const __m256 a = _mm512_castps512_ps256(_mm512_castsi512_ps(_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_castsi128_si256(_mm_loadu_si128((const void *)(in + i)))), 16)));
        const __m256 b = _mm512_castps512_ps256(_mm512_castsi512_ps(_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_castsi128_si256(_mm_loadu_si128((const void *)(in + D / 2 + i)))), 16)));
        const __m256 c = _mm256_loadu_ps(cosines + i), s = _mm256_loadu_ps(sines + i);
        const __m256 first = _mm256_sub_ps(_mm256_mul_ps(a, c), _mm256_mul_ps(b, s));
        const __m256 second = _mm256_add_ps(_mm256_mul_ps(b, c), _mm256_mul_ps(a, s));
        _mm_storeu_si128((void *)(out + i), (__m128i)_mm256_cvtneps_pbh(first));
        _mm_storeu_si128((void *)(out + D / 2 + i), (__m128i)_mm256_cvtneps_pbh(second));
    }
}

static void rotate_and_append(const Attention *a, const bf16 *qkv, bf16 *queries, int row, int head) {
    const int D = a->head_size, group = a->heads / a->kv_heads;
    const bf16 *mine = qkv + (long)row * (a->heads + 2 * a->kv_heads) * D;
    const float *cosines = a->cosines + (long)row * (D / 2), *sines = a->sines + (long)row * (D / 2);
    for (int g = head * group; g < (head + 1) * group; g++)
        rotate(mine + (long)g * D, a->q_norm, cosines, sines, D, a->eps, queries + ((long)row * a->heads + g) * D);
    const long at = page_offset(a, row, head, a->contexts[row] - 1);
    rotate(mine + (long)(a->heads + head) * D, a->k_norm, cosines, sines, D, a->eps, a->keys + at);
    const bf16 *value = mine + (long)(a->heads + a->kv_heads + head) * D;
    for (int i = 0; i < D; i++) a->values[at + i] = value[i];
}

// dot(q, key j) over D for `count` <= ROW_TILE keys that follow one another
INLINE void dot_keys(const bf16 *q, const bf16 *keys, int D, const int count, float scale, float *scores) {
    const int whole = D & ~(PAIRS - 1);
    __m512 sums[ROW_TILE];
    for (int j = 0; j < count; j++) sums[j] = _mm512_setzero_ps();
    for (int d = 0; d < whole; d += PAIRS) {
        const __m512bh query = load(q + d);
        for (int j = 0; j < count; j++)
            sums[j] = _mm512_dpbf16_ps(sums[j], query, load(keys + (long)j * D + d));
    }
    if (whole < D) {
        const __m512bh query = load_tail(q + whole, D - whole);
        for (int j = 0; j < count; j++)
            sums[j] = _mm512_dpbf16_ps(sums[j], query, load_tail(keys + (long)j * D + whole, D - whole));
    }
    if (count == ROW_TILE)
        _mm256_storeu_ps(scores, _mm256_mul_ps(eight_sums(sums), _mm256_set1_ps(scale)));
    else
        for (int j = 0; j < count; j++) scores[j] = scale * horizontal_sum(sums[j]);
}

// scores[h][j] = scale * dot(q[h], key j) for a run of keys that lies in one page
INLINE void score_keys(const bf16 *q, const bf16 *keys, int D, int heads, int count, float scale,
                       float scores[HEAD_TILE][KEY_TILE]) {
    int j = 0;
    for (; j + ROW_TILE <= count; j += ROW_TILE) {
        const bf16 *these = keys + (long)j * D;
        for (int line = 0; line < ROW_TILE * D; line += PAIRS)
            _mm_prefetch((const char *)(these + ROW_TILE * D + line), _MM_HINT_T0);
        for (int h = 0; h < heads; h++) dot_keys(q + h * D, these, D, ROW_TILE, scale, scores[h] + j);
    }
    for (; j < count; j++)
        for (int h = 0; h < heads; h++) dot_keys(q + h * D, keys + (long)j * D, D, 1, scale, scores[h] + j);
}

// sums[h][d] = factor[h] * sums[h][d] + scores[h][j] * value j, over a run of values in one page
INLINE void add_values(const bf16 *values, int D, int heads, int count, const float *factor,
                       float scores[HEAD_TILE][KEY_TILE], float sums[HEAD_TILE][MAX_HEAD_SIZE]) {
    for (int d = 0; d < D; d += LANES) {
        __m512 acc[HEAD_TILE];
        for (int h = 0; h < HEAD_TILE; h++)
            acc[h] = h < heads ? _mm512_mul_ps(_mm512_loadu_ps(sums[h] + d), _mm512_set1_ps(factor[h]))
                               : _mm512_setzero_ps();
        for (int j = 0; j < count; j++) {
            const __m512 value = widen(values + (long)j * D + d);
            for (int h = 0; h < heads; h++)
                acc[h] = _mm512_fmadd_ps(_mm512_set1_ps(scores[h][j]), value, acc[h]);
        }
        for (int h = 0; h < heads; h++) _mm512_storeu_ps(sums[h] + d, acc[h]);
    }
}

// scores become weights e^(score - top); gives their sum. The tail of the last vector is masked.
INLINE float weigh(float *scores, int count, float top) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < count; j += LANES) {
        const __mmask16 lanes = first_lanes(count - j);
        const __m512 shifted = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + j), _mm512_set1_ps(top));
        const __m512 weights = _mm512_maskz_mov_ps(lanes, exponential(shifted));
        _mm512_mask_storeu_ps(scores + j, lanes, weights);
        sum = _mm512_add_ps(sum, weights);
    }
    return _mm512_reduce_add_ps(sum);
}

INLINE float largest(const float *scores, int count, float top) {
    for (int j = 0; j < count; j++) top = scores[j] > top ? scores[j] : top;
    return top;
}

// One row's `heads` <= HEAD_TILE query heads over keys [from, to) of one kv head, by a running
// softmax (Milakov and Gimelshein 2018). partial: [heads, D + 2] sums, then top and total.
static void attend(const Attention *a, const bf16 *q, int row, int head, int heads, int from, int to,
                   float *partial) {
    const int D = a->head_size;
    float scores[HEAD_TILE][KEY_TILE], sums[HEAD_TILE][MAX_HEAD_SIZE];
    float top[HEAD_TILE], total[HEAD_TILE], factor[HEAD_TILE];
    for (int h = 0; h < heads; h++) {
        top[h] = -INFINITY, total[h] = 0.f;
        for (int d = 0; d < D; d++) sums[h][d] = 0.f;
    }
    for (int at = from, count; at < to; at += count) {
        count = at_most(at_most(to - at, KEY_TILE), a->page_size - at % a->page_size);
        const long offset = page_offset(a, row, head, at);
        score_keys(q, a->keys + offset, D, heads, count, a->scale, scores);
        for (int h = 0; h < heads; h++) {
            const float now = largest(scores[h], count, top[h]);
            factor[h] = expf(top[h] - now);
            total[h] = total[h] * factor[h] + weigh(scores[h], count, now);
            top[h] = now;
        }
        if (heads == HEAD_TILE) add_values(a->values + offset, D, HEAD_TILE, count, factor, scores, sums);
        else if (heads == 3) add_values(a->values + offset, D, 3, count, factor, scores, sums);
        else if (heads == 2) add_values(a->values + offset, D, 2, count, factor, scores, sums);
        else add_values(a->values + offset, D, 1, count, factor, scores, sums);
    }
    for (int h = 0; h < heads; h++) {
        float *mine = partial + (long)h * (D + 2);
        for (int d = 0; d < D; d++) mine[d] = sums[h][d];
        mine[D] = top[h], mine[D + 1] = total[h];
    }
}

// Keys in a segment of a context: a function of that context alone, so that a row's result does not
// depend on the other rows. At most `splits` segments.
INLINE int segment_length(const Attention *a, int context) {
    const int each = (context + a->splits - 1) / a->splits;
    return (each + SEGMENT - 1) / SEGMENT * SEGMENT;
}

// The parts of one query head become its output: each weighted by e^(its top - the common top).
static void merge(const Attention *a, const float *partials, int parts, long stride, bf16 *out) {
    const int D = a->head_size;
    float top = -INFINITY, total = 0.f;
    for (int s = 0; s < parts; s++) top = fmaxf(top, partials[s * stride + D]);
    float sums[MAX_HEAD_SIZE] = {0};
    for (int s = 0; s < parts; s++) {
        const float *part = partials + s * stride, weight = expf(part[D] - top);
        total += weight * part[D + 1];
        for (int d = 0; d < D; d++) sums[d] += weight * part[d];
    }
    for (int d = 0; d < D; d++) out[d] = to_bf16(sums[d] / total);
}

// qkv [M, (heads + 2 kv_heads) D] -> out [M, heads D]; keys and values of the rows are appended.
// queries [M, heads D] and partials [splits, M, heads, D + 2] are scratch. D is a multiple of 16, at
// most MAX_HEAD_SIZE. No two rows may append to one page slot.
void paged_attention(const Attention *a, const bf16 *qkv, bf16 *out, bf16 *queries, float *partials) {
    const int D = a->head_size, group = a->heads / a->kv_heads;
    const int tiles = (group + HEAD_TILE - 1) / HEAD_TILE;
    const long stride = (long)a->rows * a->heads * (D + 2);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(dynamic, 4)
        for (int task = 0; task < a->rows * a->kv_heads; task++)
            rotate_and_append(a, qkv, queries, task / a->kv_heads, task % a->kv_heads);
#pragma omp for schedule(dynamic)
        for (int task = 0; task < a->rows * a->kv_heads * tiles * a->splits; task++) {
            const int split = task % a->splits, tile = task / a->splits % tiles;
            const int head = task / a->splits / tiles % a->kv_heads;
            const int row = task / a->splits / tiles / a->kv_heads;
            const int seen = a->contexts[row], length = segment_length(a, seen);
            const int first = a->window && seen > a->window ? seen - a->window : 0;
            const int from = split * length > first ? split * length : first;
            const int query = head * group + tile * HEAD_TILE;
            attend(a, queries + ((long)row * a->heads + query) * D, row, head,
                   at_most(group - tile * HEAD_TILE, HEAD_TILE), from, at_most((split + 1) * length, seen),
                   partials + split * stride + ((long)row * a->heads + query) * (D + 2));
        }
#pragma omp for schedule(static)
        for (int head = 0; head < a->rows * a->heads; head++) {
            const int seen = a->contexts[head / a->heads], length = segment_length(a, seen);
            merge(a, partials + (long)head * (D + 2), (seen + length - 1) / length, stride, out + (long)head * D);
        }
    }
}

int kernels_version(void) { return 1; }

#else

int kernels_version(void) { return 0; } // built without AVX-512 BF16: nothing to call

#endif
