// What low-rank adapters add to a linear layer, for a few rows that go through different adapters.
//
//   add_adapters   out += (norm(x) D^T) U   for every run of rows, with its own D and U
//
// A run is a few neighbouring rows of one slot. A slot of rank r holds D [P r, K] (P parts of the
// layer, one after the other) and U [r, N]; each is read once a run, in the order it lies. Sums of a
// row run in an order fixed by the row alone, so that its neighbours cannot change a bit of it.

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)

#include "vectors.h"

#define BLOCK 64          // outputs of four rows added to at a time; of fewer rows more, as sums allow
#define ROW_TILE 4        // rows that share one read of U
#define PREFETCH_BYTES 4096 // ahead of the read of D, line by line, into the second-level cache: rows of U
                          // may lie a power of two apart, too many for one set of the first
#define TURNS 4           // pieces of work for each thread, at least
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

// a . b, while what lies `ahead` of b is fetched
INLINE float dot(const bf16 *a, const bf16 *b, int count, long ahead) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int k = 0;
    for (; k + 4 * PAIRS <= count; k += 4 * PAIRS)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            _mm_prefetch((const char *)(b + k + i * PAIRS) + ahead, _MM_HINT_T1);
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(a + k + i * PAIRS),
                                       (__m512bh)_mm512_loadu_si512(b + k + i * PAIRS));
        }
    for (; k < count; k += PAIRS) {
        const __mmask32 mask = count - k >= PAIRS ? 0xffffffffu : (1u << (count - k)) - 1;
        _mm_prefetch((const char *)(b + k) + ahead, _MM_HINT_T1);
        sums[0] = _mm512_dpbf16_ps(sums[0], (__m512bh)_mm512_maskz_loadu_epi16(mask, a + k),
                                   (__m512bh)_mm512_maskz_loadu_epi16(mask, b + k));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// out[m, 0 .. count) += sum over i of hidden[m, i] * up[i, 0 .. count) for `rows` rows, while the next
// columns of U are fetched. count <= width, and `rows` times `width` are the sums that fit.
INLINE void add_block(const Adapters *a, const bf16 *up, const float *hidden, bf16 *out, int rank,
                      int count, const int rows, const int width) {
    const long wide = (long)a->parts * a->max_rank;
    const int vectors = width / LANES;
    __m512 sums[ROW_TILE * BLOCK / LANES];
    __mmask16 masks[ROW_TILE * BLOCK / LANES];
    for (int v = 0; v < vectors; v++) masks[v] = count > v * LANES ? first_lanes(count - v * LANES) : 0;
#pragma GCC unroll 16
    for (int i = 0; i < rows * vectors; i++)
        sums[i] = widen_some(out + (long)(i / vectors) * a->outputs + i % vectors * LANES, masks[i % vectors]);
    for (int i = 0; i < rank; i++) {
        const bf16 *row = up + (long)i * a->outputs;
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            if (v % 2 == 0) _mm_prefetch((const char *)(row + width + v * LANES), _MM_HINT_T1);
            const __m512 weights = widen_some(row + v * LANES, masks[v]);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++)
                sums[m * vectors + v] = _mm512_fmadd_ps(_mm512_set1_ps(hidden[m * wide + i]), weights, sums[m * vectors + v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows * vectors; i++)
        narrow_some(out + (long)(i / vectors) * a->outputs + i % vectors * LANES, masks[i % vectors], sums[i]);
}

// hidden[m, j] = x[m] . down[j] for one of `slices` shares of the rows of D that the slot has
static void shrink(const Adapters *a, const Run *run, const bf16 *x, int slice, int slices) {
    const int32_t *slot = a->slots + (long)run->slot * (1 + a->parts);
    const int rank = slot[0], rows = a->parts * rank;
    const long wide = (long)a->parts * a->max_rank;
    const bf16 *down = a->down + (long)run->slot * wide * a->inputs;
    for (int j = rows * slice / slices; j < rows * (slice + 1) / slices; j++) {
        if (!slot[1 + j / rank]) continue;
        for (int m = run->first; m < run->end; m++)
            a->hidden[m * wide + j] = dot(x + (long)m * a->inputs, down + (long)j * a->inputs, a->inputs,
                                          m == run->first ? PREFETCH_BYTES : 0);
    }
}

#define COLUMNS(n) ((n) == 1 ? 4 * BLOCK : (n) == 2 ? 2 * BLOCK : BLOCK) // whose sums fit in registers

#define ADD_BLOCKS(n) \
    for (int at = 0; at < count; at += COLUMNS(n)) \
        add_block(a, up + at, hidden, place + at, rank, at_most(count - at, COLUMNS(n)), n, COLUMNS(n))

static void expand(const Adapters *a, const Run *run, bf16 *out, int slice, int slices) {
    const int32_t *slot = a->slots + (long)run->slot * (1 + a->parts);
    const int rank = slot[0];
    const long wide = (long)a->parts * a->max_rank;
    if (!rank) return;
    for (int part = 0; part < a->parts; part++) {
        if (!slot[1 + part]) continue;
        const int start = a->borders[part], size = a->borders[part + 1] - start, blocks = (size + BLOCK - 1) / BLOCK;
        const int first = blocks * slice / slices * BLOCK, count = at_most(blocks * (slice + 1) / slices * BLOCK, size) - first;
        const bf16 *up = a->up + (long)run->slot * a->max_rank * a->outputs + start + first;
        for (int m = run->first; m < run->end; m += ROW_TILE) {
            const float *hidden = a->hidden + m * wide + (long)part * rank;
            bf16 *place = out + (long)m * a->outputs + start + first;
            switch (run->end - m) {
            case 1: ADD_BLOCKS(1); break;
            case 2: ADD_BLOCKS(2); break;
            case 3: ADD_BLOCKS(3); break;
            default: ADD_BLOCKS(ROW_TILE);
            }
        }
    }
}

// T tokens; the runs in their order
void add_adapters(const Adapters *a, const Run *runs, int num_runs, int T) {
    const int first = runs[0].first, end = runs[num_runs - 1].end;
    const long K = a->inputs, N = a->outputs;
    // where there are runs enough, one thread reads all a run needs, and nobody waits in between
    const int slices = (TURNS * a->threads + num_runs - 1) / num_runs;
#pragma omp parallel num_threads(a->threads)
    {
        if (a->clears) {
#pragma omp for schedule(static)
            for (int m = 0; m < T; m++) memset(a->out + m * N, 0, N * sizeof(bf16));
        }
        if (a->norm) {
#pragma omp for schedule(static)
            for (int m = first; m < end; m++) rms_norm(a->x + m * K, a->norm, K, a->eps, a->normed + m * K);
        }
        const bf16 *x = a->norm ? a->normed : a->x;
        if (slices == 1) {
#pragma omp for schedule(dynamic) nowait
            for (int i = 0; i < num_runs; i++) {
                shrink(a, runs + i, x, 0, 1);
                expand(a, runs + i, a->out, 0, 1);
            }
        } else {
#pragma omp for schedule(dynamic)
            for (int i = 0; i < num_runs * slices; i++) shrink(a, runs + i / slices, x, i % slices, slices);
#pragma omp for schedule(dynamic) nowait
            for (int i = 0; i < num_runs * slices; i++) expand(a, runs + i / slices, a->out, i % slices, slices);
        }
    }
}

#endif
