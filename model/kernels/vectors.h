// What the kernels share: bf16 in vectors of AVX-512, the tile every matrix product is made of.
//
// Shapes and names: M rows (tokens), K inputs, N outputs, H query heads, D head size.

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define LANES 16       // floats in a vector
#define PAIRS 32       // bf16 in a vector
#define PANEL 32       // outputs that lie side by side in a packed matrix
#define TILE 12        // rows of a product held in registers: 24 sums of 16 lanes

INLINE int at_most(int value, int bound) { return value < bound ? value : bound; }

INLINE float to_float(bf16 value) {
    union { uint32_t bits; float number; } both = {(uint32_t)value << 16};
    return both.number;
}

// bf16 of one float, rounded to nearest even
INLINE bf16 to_bf16(float value) {
    return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0);
}

INLINE __mmask16 first_lanes(int count) {
    return (__mmask16)(count >= LANES ? 0xffff : (1u << count) - 1);
}

INLINE __m512 widen(const bf16 *p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

INLINE __m512 widen_some(const bf16 *p, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

INLINE void narrow(bf16 *p, __m512 v) {
    _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(v));
}

INLINE void narrow_some(bf16 *p, __mmask16 lanes, __m512 v) {
    _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(v));
}

INLINE __m512bh load(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

// two neighbouring bf16 in every lane
INLINE __m512bh spread(const bf16 *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
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

static inline void rms_norm(const bf16 *x, const bf16 *weight, int K, float eps, bf16 *out) {
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

// sums[r][0 .. PANEL) += x[r] . panel for `rows` <= TILE rows, `stride` apart, of K inputs.
//
// A panel is [K / 2][PANEL][2]: read once from end to end, each vector serves all rows, and a sum
// never leaves its lane, so that nothing is added across lanes and the order of a row's sums is the
// same whatever it is computed with. `rows` is a constant where this is inlined.
INLINE void tile_product(const bf16 *panel, const bf16 *x, long stride, int K, const int rows,
                         const int ahead, __m512 *sums) {
#pragma GCC unroll 4
    for (int k = 0; k < K; k += 2) {
        const bf16 *at = panel + (long)k * PANEL;
        const __m512bh first = load(at), second = load(at + PAIRS);
        if (ahead) {
            _mm_prefetch((const char *)at + ahead, _MM_HINT_T1);
            _mm_prefetch((const char *)at + ahead + 64, _MM_HINT_T1);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const __m512bh input = spread(x + r * stride + k);
            sums[2 * r] = _mm512_dpbf16_ps(sums[2 * r], first, input);
            sums[2 * r + 1] = _mm512_dpbf16_ps(sums[2 * r + 1], second, input);
        }
    }
}
