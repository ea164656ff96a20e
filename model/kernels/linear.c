// Linear layers for x86-64 with AVX-512 BF16 and VNNI: any number of rows, weights of 16, 8 or 4 bits.
//
// A step of a few rows reads every weight once and is bound by memory; a prompt is bound by
// arithmetic. One packed copy of the weights serves both: panels of 32 outputs, read in the order
// they lie in, each vector multiplied into the sums of up to 12 rows (vectors.h). What stands before
// and after a matrix is fused into it, so that a layer is four passes over the threads.
//
//   linear     y = norm(x) W^T + b, as bf16 or float, or added to what is there
//   gate_up    y = silu(norm(x) G^T) * (norm(x) U^T)  with W = [G; U]
//
// Quantized weights are unsigned integers with a scale (and a zero) for each group of inputs; the
// inputs are quantized to 8 bits, group by group, so that a group is an exact sum of integers:
//   sum_k (w_k - zero) s_w q_k s_x = s_w s_x (sum_k w_k q_k - zero sum_k q_k)
//
// Called through ctypes; the caller owns all memory. Arrays are contiguous. Threads come from the
// OpenMP runtime that is already in the process (torch's).

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)

#include "vectors.h"

#define INT_TILE 6          // rows of an integer product held in registers
#define TASK_ROWS 96        // rows one thread takes at a time
#define PREFETCH_BYTES 6144 // ahead of the read: 8 rows multiply while so many bytes are on their way
#define TURNS 4             // a thread takes neighbouring panels, at least so often

typedef struct {
    const void *panels;   // bf16 [panels][K / 2][32][2]; 8 bits [panels][K / 4][32][4]; 4 bits
                          // [panels][K / 8][32][4], the low halves being the first four inputs
    const float *scales;  // [panels][K / group][32], of integers
    const uint8_t *zeros; // likewise, or NULL for the middle of the range
    int bits, inputs, outputs, group;
} Weight;

// The rows a matrix is multiplied with, prepared once for all panels.
typedef struct {
    const bf16 *rows;      // [M, K]
    const int8_t *small;   // [M, K], for integer weights
    const float *scales;   // [M, K / group]
    const int32_t *sums;   // [M, K / group], of `small`
} Inputs;

typedef struct {
    const Weight *weight;
    const bf16 *x, *norm, *bias; // [M, K]; [K] or NULL; [N] or NULL
    void *out;
    void *scratch;               // what `prepare` writes: 3 K + 8 K / group bytes a row
    int kind, threads;
    float eps;
    const bf16 *more;            // of gate_up: [M, 2 I] added before silu, or NULL
} Call;

enum { TO_BF16, TO_FLOAT, ADD_TO_BF16 };

// ---- inputs -------------------------------------------------------------------------------------

static void quantize_row(const bf16 *x, int K, int group, int8_t *small, float *scales, int32_t *sums) {
    for (int g = 0; g < K / group; g++) {
        const bf16 *from = x + g * group;
        __m512 largest = _mm512_setzero_ps();
        for (int k = 0; k < group; k += LANES) largest = _mm512_max_ps(largest, _mm512_abs_ps(widen(from + k)));
        const float peak = _mm512_reduce_max_ps(largest);
        const __m512 steps = _mm512_set1_ps(peak > 0.f ? 127.f / peak : 0.f);
        __m512i total = _mm512_setzero_si512();
        for (int k = 0; k < group; k += LANES) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(widen(from + k), steps));
            total = _mm512_add_epi32(total, q);
            _mm_storeu_si128((void *)(small + g * group + k), _mm512_cvtepi32_epi8(q));
        }
        scales[g] = peak / 127.f;
        sums[g] = _mm512_reduce_add_epi32(total);
    }
}

// Inside a parallel region: every thread does its share of the rows, and all wait.
static Inputs prepare(const Weight *w, const Call *c, int M) {
    const int K = w->inputs, groups = w->group ? K / w->group : 0;
    char *at = c->scratch;
    float *scales = (float *)at;
    int32_t *sums = (int32_t *)(at += (long)M * groups * sizeof(float));
    bf16 *normed = (bf16 *)(at += (long)M * groups * sizeof(int32_t));
    int8_t *small = (int8_t *)(at + (c->norm ? (long)M * K * sizeof(bf16) : 0));
    if (c->norm || w->bits < 16) {
#pragma omp for schedule(static)
        for (int m = 0; m < M; m++) {
            const bf16 *row = c->x + (long)m * K;
            if (c->norm) {
                rms_norm(row, c->norm, K, c->eps, normed + (long)m * K);
                row = normed + (long)m * K;
            }
            if (w->bits < 16)
                quantize_row(row, K, w->group, small + (long)m * K, scales + (long)m * groups, sums + (long)m * groups);
        }
    }
    return (Inputs){c->norm ? normed : c->x, small, scales, sums};
}

// ---- a panel times some rows --------------------------------------------------------------------

INLINE void bf16_tile(const Weight *w, int panel, const Inputs *in, int m, const int rows, const int ahead,
                      float (*y)[PANEL]) {
    const int K = w->inputs;
    __m512 sums[2 * TILE];
#pragma GCC unroll 24
    for (int i = 0; i < 2 * rows; i++) sums[i] = _mm512_setzero_ps();
    tile_product((const bf16 *)w->panels + (long)panel * PANEL * K, in->rows + (long)m * K, K, K, rows,
                 ahead ? PREFETCH_BYTES : 0, sums);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(y[r], sums[2 * r]);
        _mm512_storeu_ps(y[r] + LANES, sums[2 * r + 1]);
    }
}

INLINE __m512i add_products(__m512i sum, __m512i weights, __m512i inputs) {
    return _mm512_dpbusd_epi32(sum, weights, inputs);
}

INLINE __m512i spread_four(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}

// One group's integer sums of `rows` rows: sums[2 r], sums[2 r + 1] for the panel's halves.
INLINE void group_product(const uint8_t *at, const int8_t *q, int K, int group, const int rows,
                          const int bits, __m512i *sums) {
    const __m512i low_half = _mm512_set1_epi8(15);
    for (int k = 0; k < group; k += 32 / bits) {
        const __m512i first = _mm512_loadu_si512(at), second = _mm512_loadu_si512(at + 64);
        _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T1);
        _mm_prefetch((const char *)at + PREFETCH_BYTES + 64, _MM_HINT_T1);
        at += 128;
        if (bits == 8) {
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                const __m512i four = spread_four(q + (long)r * K + k);
                sums[2 * r] = add_products(sums[2 * r], first, four);
                sums[2 * r + 1] = add_products(sums[2 * r + 1], second, four);
            }
        } else {
            const __m512i low[2] = {_mm512_and_si512(first, low_half), _mm512_and_si512(second, low_half)};
            const __m512i high[2] = {_mm512_and_si512(_mm512_srli_epi16(first, 4), low_half),
                                     _mm512_and_si512(_mm512_srli_epi16(second, 4), low_half)};
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                const __m512i four = spread_four(q + (long)r * K + k), next = spread_four(q + (long)r * K + k + 4);
                sums[2 * r] = add_products(add_products(sums[2 * r], low[0], four), high[0], next);
                sums[2 * r + 1] = add_products(add_products(sums[2 * r + 1], low[1], four), high[1], next);
            }
        }
    }
}

INLINE void int_tile(const Weight *w, int panel, const Inputs *in, int m, const int rows, const int bits,
                     const int has_zeros, float (*y)[PANEL]) {
    const int K = w->inputs, groups = K / w->group;
    const uint8_t *weights = (const uint8_t *)w->panels + (long)panel * PANEL * K * bits / 8;
    const float *scales = w->scales + (long)panel * groups * PANEL;
    const uint8_t *zeros = has_zeros ? w->zeros + (long)panel * groups * PANEL : 0;
    __m512 totals[2 * INT_TILE];
#pragma GCC unroll 12
    for (int i = 0; i < 2 * rows; i++) totals[i] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
        __m512i sums[2 * INT_TILE];
#pragma GCC unroll 12
        for (int i = 0; i < 2 * rows; i++) {
            const int total = in->sums[(long)(m + i / 2) * groups + g];
            if (has_zeros)
                sums[i] = _mm512_mullo_epi32(
                    _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(zeros + g * PANEL + i % 2 * LANES))),
                    _mm512_set1_epi32(-total));
            else sums[i] = _mm512_set1_epi32(-total * (1 << (bits - 1)));
        }
        group_product(weights + (long)g * w->group * PANEL * bits / 8, in->small + (long)m * K + g * w->group, K,
                      w->group, rows, bits, sums);
#pragma GCC unroll 12
        for (int i = 0; i < 2 * rows; i++) {
            const __m512 scale = _mm512_loadu_ps(scales + g * PANEL + i % 2 * LANES);
            const __m512 own = _mm512_set1_ps(in->scales[(long)(m + i / 2) * groups + g]);
            totals[i] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), scale), own, totals[i]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < 2 * rows; i++) _mm512_storeu_ps(y[i / 2] + i % 2 * LANES, totals[i]);
}

// Numbers of rows become constants here, so that sums live in registers.
#define BF16_CASE(n) \
    case n: \
        if (m == 0) bf16_tile(w, panel, in, m, n, 1, y); \
        else bf16_tile(w, panel, in, m, n, 0, y); \
        break;
#define INT_CASE(n) \
    case n: \
        if (w->bits == 8 && w->zeros) int_tile(w, panel, in, m, n, 8, 1, y); \
        else if (w->bits == 8) int_tile(w, panel, in, m, n, 8, 0, y); \
        else if (w->zeros) int_tile(w, panel, in, m, n, 4, 1, y); \
        else int_tile(w, panel, in, m, n, 4, 0, y); \
        break;

static void multiply(const Weight *w, int panel, const Inputs *in, int m, int rows, float (*y)[PANEL]) {
    if (w->bits == 16) switch (rows) {
        BF16_CASE(1) BF16_CASE(2) BF16_CASE(3) BF16_CASE(4) BF16_CASE(5) BF16_CASE(6)
        BF16_CASE(7) BF16_CASE(8) BF16_CASE(9) BF16_CASE(10) BF16_CASE(11) BF16_CASE(12)
    }
    else switch (rows) { INT_CASE(1) INT_CASE(2) INT_CASE(3) INT_CASE(4) INT_CASE(5) INT_CASE(6) }
}

// ---- whole matrices -----------------------------------------------------------------------------

// One vector of a row's sums, with the bias of their outputs.
INLINE __m512 biased(const float *sums, const bf16 *bias, __mmask16 lanes) {
    const __m512 sum = _mm512_loadu_ps(sums);
    return bias ? _mm512_add_ps(sum, widen_some(bias, lanes)) : sum;
}

static void store_row(const float *sums, const bf16 *bias, int kind, void *out, long at, int count) {
    for (int i = 0; i < count; i += LANES) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 sum = biased(sums + i, bias ? bias + i : bias, lanes);
        bf16 *y = (bf16 *)out + at + i;
        if (kind == TO_FLOAT) _mm512_mask_storeu_ps((float *)out + at + i, lanes, sum);
        else if (kind == TO_BF16) narrow_some(y, lanes, sum);
        else narrow_some(y, lanes, _mm512_add_ps(widen_some(y, lanes), sum));
    }
}

// Panels one thread takes at a time: neighbours, so that what is fetched ahead of a panel's end is its
// own next one, in turns that come out even, so that all threads end together.
INLINE int panels_a_turn(const Call *c, int panels) {
    int share = panels / (TURNS * c->threads);
    while (share > 1 && (panels + share - 1) / share % c->threads) share--;
    return share > 1 ? share : 1;
}

// Rows of the next tile, of `left`: as many as of the others, not full ones and a rest.
INLINE int rows_of_tile(const Weight *w, int left) {
    const int most = w->bits == 16 ? TILE : INT_TILE, tiles = (left + most - 1) / most;
    return left > 0 ? (left + tiles - 1) / tiles : 0;
}

// One thread's piece of work: a panel and up to TASK_ROWS rows. A panel's pieces follow one another,
// so that it comes from memory once.
#define FOR_PIECES(panels) \
    const int pieces = (M + TASK_ROWS - 1) / TASK_ROWS; \
    const int turn = pieces > 1 ? 1 : panels_a_turn(c, panels); \
    _Pragma("omp for schedule(dynamic, turn) nowait") for (int task = 0; task < (panels) * pieces; task++) \
        for (int panel = task / pieces, m = task % pieces * TASK_ROWS, rows, \
                 end = at_most(m + TASK_ROWS, M); \
             rows = rows_of_tile(w, end - m), m < end; m += rows)

// out [M, N]. Added to what is there, a sum is rounded once.
void linear(const Call *c, int M) {
    const Weight *w = c->weight;
    const int N = w->outputs;
#pragma omp parallel num_threads(c->threads)
    {
        const Inputs in = prepare(w, c, M);
        FOR_PIECES((N + PANEL - 1) / PANEL) {
            float y[TILE][PANEL];
            multiply(w, panel, &in, m, rows, y);
            const int n = panel * PANEL;
            for (int r = 0; r < rows; r++)
                store_row(y[r], c->bias ? c->bias + n : 0, c->kind, c->out, (long)(m + r) * N + n, at_most(PANEL, N - n));
        }
    }
}

// g / (1 + e^-g) u, by e^-|g| so that the exponential never overflows
INLINE __m512 silu_times(__m512 g, __m512 u) {
    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(g)));
    const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 top = _mm512_mask_blend_ps(negative, _mm512_set1_ps(1.f), e);
    const __m512 sigmoid = _mm512_div_ps(top, _mm512_add_ps(e, _mm512_set1_ps(1.f)));
    return _mm512_mul_ps(_mm512_mul_ps(g, sigmoid), u);
}

// out [M, I] bf16, W [2 I, K] with I a multiple of PANEL; bias [2 I] or NULL.
void gate_up(const Call *c, int M) {
    const Weight *w = c->weight;
    const bf16 *bias = c->bias;
    const int I = w->outputs / 2;
#pragma omp parallel num_threads(c->threads)
    {
        const Inputs in = prepare(w, c, M);
        FOR_PIECES(I / PANEL) {
            float gate[TILE][PANEL], up[TILE][PANEL];
            multiply(w, panel, &in, m, rows, gate);
            multiply(w, I / PANEL + panel, &in, m, rows, up);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < PANEL; i += LANES) {
                    const int n = panel * PANEL + i;
                    __m512 g = biased(gate[r] + i, bias ? bias + n : bias, 0xffff);
                    __m512 u = biased(up[r] + i, bias ? bias + I + n : bias, 0xffff);
                    if (c->more) {
                        const bf16 *more = c->more + (long)(m + r) * 2 * I + n;
                        g = _mm512_add_ps(g, widen(more)), u = _mm512_add_ps(u, widen(more + I));
                    }
                    narrow((bf16 *)c->out + (long)(m + r) * I + n, silu_times(g, u));
                }
        }
    }
}

int kernels_version(void) { return 3; }

#else

int kernels_version(void) { return 0; } // built without AVX-512 BF16 and VNNI: nothing to call

#endif
