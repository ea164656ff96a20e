// What low-rank adapters add to a linear layer, for a few rows that go through different adapters.
//
//   add_adapters   out += (norm(x) D^T) U   for every run of rows, with its own D and U
//
// A run is a few neighbouring rows of one slot. A slot of rank r holds D [P r, K] (P parts of the
// layer, one after the other) and U [r, N]; each is read once a run, in the order it lies. Sums of a
// row run in an order fixed by the row alone, so that its neighbours cannot change a bit of it.

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)

#include "vectors.h"

#define BLOCK 64          // outputs a thread adds to at a time
#define ROW_TILE 4        // rows that share one read of U
#define AHEAD 4           // blocks of U asked for before they are read, into the second-level cache: its
                          // rows may lie a power of two apart, too many for one set of the first
#define PREFETCH_BYTES 4096 // likewise of D
#define MAX_PARTS 3

typedef struct {
    const bf16 *down, *up;      // [S, P R, K], [S, R, N]
    const int32_t *slots;       // [S, 1 + P]: rank (0: nothing here), then whether it has each part
    float *hidden;              // [T, P R]: scratch
    bf16 *normed;               // [T, K]: scratch
    int32_t borders[MAX_PARTS + 1]; // of the parts' columns
    int parts, max_rank, inputs, outputs, threads;
    int clears;                 // out begins at zero: what is added is wanted, not the sum
    float eps;
    const bf16 *x, *norm;       // [T, K]; [K], or NULL: then x is taken as it is
    bf16 *out;                  // [T, N]
} Adapters;

typedef struct { int32_t slot, first, end; } Run;

INLINE float dot(const bf16 *a, const bf16 *b, int count) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int k = 0;
    for (; k + 4 * PAIRS <= count; k += 4 * PAIRS)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(a + k + i * PAIRS),
                                       (__m512bh)_mm512_loadu_si512(b + k + i * PAIRS));
    for (; k < count; k += PAIRS) {
        const __mmask32 mask = count - k >= PAIRS ? 0xffffffffu : (1u << (count - k)) - 1;
        sums[0] = _mm512_dpbf16_ps(sums[0], (__m512bh)_mm512_maskz_loadu_epi16(mask, a + k),
                                   (__m512bh)_mm512_maskz_loadu_epi16(mask, b + k));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// out[m, 0 .. count) += sum over i of hidden[m, i] * up[i, 0 .. count), count <= BLOCK
INLINE void add_block(const Adapters *a, const bf16 *up, const float *hidden, bf16 *out, int rank,
                      int count, const int rows, int ahead) {
    const long wide = (long)a->parts * a->max_rank;
    __m512 sums[ROW_TILE * BLOCK / LANES];
    __mmask16 masks[BLOCK / LANES];
    for (int v = 0; v < BLOCK / LANES; v++) masks[v] = count > v * LANES ? first_lanes(count - v * LANES) : 0;
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < BLOCK / LANES; v++)
            sums[m * (BLOCK / LANES) + v] = widen_some(out + (long)m * a->outputs + v * LANES, masks[v]);
    for (int i = 0; i < rank; i++) {
        const bf16 *row = up + (long)i * a->outputs;
        for (int v = 0; v < BLOCK; v += PAIRS) _mm_prefetch((const char *)(row + ahead + v), _MM_HINT_T1);
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK / LANES; v++) {
            const __m512 weights = widen_some(row + v * LANES, masks[v]);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                const __m512 factor = _mm512_set1_ps(hidden[m * wide + i]);
                sums[m * (BLOCK / LANES) + v] = _mm512_fmadd_ps(factor, weights, sums[m * (BLOCK / LANES) + v]);
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < BLOCK / LANES; v++)
            narrow_some(out + (long)m * a->outputs + v * LANES, masks[v], sums[m * (BLOCK / LANES) + v]);
}

// hidden[m, j] = x[m] . down[j] for every row of D the slot has; j is shared out over the threads
static void shrink(const Adapters *a, const Run *run, const bf16 *x) {
    const int32_t *slot = a->slots + (long)run->slot * (1 + a->parts);
    const int rank = slot[0];
    const long wide = (long)a->parts * a->max_rank;
    const bf16 *down = a->down + (long)run->slot * wide * a->inputs;
#pragma omp for schedule(static) nowait
    for (int j = 0; j < a->parts * rank; j++) {
        if (!slot[1 + j / rank]) continue;
        const bf16 *row = down + (long)j * a->inputs;
        for (int k = 0; k < a->inputs; k += PAIRS)
            _mm_prefetch((const char *)(row + k) + PREFETCH_BYTES, _MM_HINT_T1);
        for (int m = run->first; m < run->end; m++)
            a->hidden[m * wide + j] = dot(row, x + (long)m * a->inputs, a->inputs);
    }
}

static void expand(const Adapters *a, const Run *run, bf16 *out) {
    const int32_t *slot = a->slots + (long)run->slot * (1 + a->parts);
    const int rank = slot[0];
    const long wide = (long)a->parts * a->max_rank;
    const bf16 *up = a->up + (long)run->slot * a->max_rank * a->outputs;
    if (!rank) return;
    for (int part = 0; part < a->parts; part++) {
        if (!slot[1 + part]) continue;
        const int start = a->borders[part], size = a->borders[part + 1] - start;
#pragma omp for schedule(static) nowait
        for (int block = 0; block < (size + BLOCK - 1) / BLOCK; block++) {
            const int column = start + block * BLOCK;
            const int count = size - block * BLOCK < BLOCK ? size - block * BLOCK : BLOCK;
            const int ahead = block * BLOCK + (AHEAD + 1) * BLOCK <= size ? AHEAD * BLOCK : 0;
            for (int m = run->first; m < run->end; m += ROW_TILE) {
                const float *hidden = a->hidden + m * wide + (long)part * rank;
                bf16 *place = out + (long)m * a->outputs + column;
                switch (run->end - m) {
                case 1: add_block(a, up + column, hidden, place, rank, count, 1, ahead); break;
                case 2: add_block(a, up + column, hidden, place, rank, count, 2, ahead); break;
                case 3: add_block(a, up + column, hidden, place, rank, count, 3, ahead); break;
                default: add_block(a, up + column, hidden, place, rank, count, ROW_TILE, ahead);
                }
            }
        }
    }
}

// T tokens; the runs in their order
void add_adapters(const Adapters *a, const Run *runs, int num_runs, int T) {
    const int first = runs[0].first, end = runs[num_runs - 1].end;
    const long K = a->inputs, N = a->outputs;
#pragma omp parallel num_threads(a->threads)
    {
        if (a->clears) {
#pragma omp for schedule(static) nowait
            for (int m = 0; m < T; m++) memset(a->out + m * N, 0, N * sizeof(bf16));
        }
        if (a->norm) {
#pragma omp for schedule(static)
            for (int m = first; m < end; m++) rms_norm(a->x + m * K, a->norm, K, a->eps, a->normed + m * K);
        }
        for (int i = 0; i < num_runs; i++) shrink(a, runs + i, a->norm ? a->normed : a->x);
#pragma omp barrier
        for (int i = 0; i < num_runs; i++) expand(a, runs + i, a->out);
    }
}

#endif
