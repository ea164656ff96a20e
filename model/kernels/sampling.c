// Sampling: one token a row out of its logits, and what the row's logprobs are.
//
//   draw_rows   adjust, draw and score every row
//
// A row is read once for the maxima of its blocks and its largest logit; later passes skip the blocks
// that cannot matter. What a filter keeps is found by partition, never by sorting a row: candidates
// are split at a pivot, their weights added up, and only the side that holds the answer goes on. The
// order is that of model/largest.py (larger first, the smaller id among equals), the weights of
// filtered rows are whole multiples of 2^-35, so their sums in double are exact in any order. A row is
// one thread's work from end to end, and nothing in it depends on its neighbours.
//
// Shapes and names: V vocabulary, x a row's logits as they are drawn from, raw as the model gave them.

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)

#include "vectors.h"

#define BLOCK 64            // logits with one maximum kept
#define CHUNK 16            // blocks with one running sum kept
#define FEW 64              // candidates put in order
#define SHARE_OF_BLOCKS 4   // top-p looks first at what is above the maxima of all but one in so many
#define UNIT 34359738368.f  // 2^35: weights of filtered rows are whole multiples of its inverse
#define NOTHING (-25.f)     // e to this is less than half a unit
#define LEAST (-87.f)       // e to less than this is taken for zero

enum { GREEDY, UNFILTERED, FILTERED, GIVEN };

typedef struct {
    uint64_t position;
    const int64_t *seen;            // [num_seen] ids a penalty looks at
    const float *counts;            // [num_seen] how often each was put out
    const int64_t *banned;          // [num_banned]
    const uint32_t *mask;           // a bit a token: what a grammar allows; NULL: all
    int32_t logits_row, num_seen, num_banned;
    int32_t token;                  // of a row that is given one and is only scored
    uint64_t seed, choice;
    const int64_t *biased, *allowed;
    const float *bias;              // [num_biased]
    double top_p;
    int32_t num_biased, num_allowed; // num_allowed -1: all are
    int32_t kind, top_k, logprobs;  // logprobs: alternatives, -1 is off
    float scale, log_min_p;         // 1 / temperature; minus infinity is off
    float repetition, frequency, presence;
} Row;

typedef struct {
    int64_t *tokens;                // [R]
    float *best;                    // [R] the largest logit drawn from; NaN where one is
    float *logprobs;                // [R]
    int32_t *ranks;                 // [R]
    int32_t *top_ids;               // [R, most]
    float *top_logprobs;            // [R, most]
    int32_t most;                   // alternatives of any row
} Results;

typedef struct {
    const float *x;
    float *maxima;                  // [blocks]
    int size, blocks;
    float best;                     // NaN where a logit is
} Scanned;

typedef struct {
    float *values;
    int32_t *ids;                   // rising
    int count;
} Candidates;

typedef struct {
    float *adjusted, *maxima;
    double *ends;
    Candidates found, work;
} Scratch;

// ---- uniforms: model/random_draws.py

INLINE uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

static double uniform(const Row *row) {
    const uint64_t coordinates[3] = {row->seed, row->choice, row->position};
    uint64_t state = 0;
    for (int i = 0; i < 3; i++) state = mix((state ^ coordinates[i]) + 0x9E3779B97F4A7C15u);
    return (double)(state >> 16) / (double)(1ull << 48);
}

// ---- weights

INLINE __m512 exponents(__m512 x, float best, float scale) {
    return _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(best)), _mm512_set1_ps(scale));
}

INLINE __m512 weights(__m512 exponent) {
    const __mmask16 some = _mm512_cmp_ps_mask(exponent, _mm512_set1_ps(LEAST), _CMP_GE_OQ);
    return _mm512_maskz_mov_ps(some, exponential(exponent));
}

INLINE __m512 whole_units(__m512 exponent) {
    return _mm512_roundscale_ps(_mm512_mul_ps(weights(exponent), _mm512_set1_ps(UNIT)), 0);
}

typedef struct { __m512d low, high; } Sums;

INLINE void add(Sums *sums, __m512 v) {
    sums->low = _mm512_add_pd(sums->low, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    sums->high = _mm512_add_pd(sums->high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
}

INLINE double total(const Sums *sums) { return _mm512_reduce_add_pd(_mm512_add_pd(sums->low, sums->high)); }

// ---- a row and its blocks

// 16 logits of a block; minus infinity past the row's end
INLINE __m512 lanes(const Scanned *row, int block, int v) {
    const int first = block * BLOCK + v * LANES, left = row->size - first;
    if (left >= LANES) return _mm512_loadu_ps(row->x + first);
    return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), left > 0 ? first_lanes(left) : 0, row->x + first);
}

static Scanned scan(const float *x, int size, float *maxima) {
    Scanned row = {x, maxima, size, (size + BLOCK - 1) / BLOCK, -INFINITY};
    int broken = 0;
    for (int b = 0; b < row.blocks; b++) {
        const __m512 v0 = lanes(&row, b, 0), v1 = lanes(&row, b, 1), v2 = lanes(&row, b, 2), v3 = lanes(&row, b, 3);
        broken |= _mm512_cmp_ps_mask(v0, v1, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(v2, v3, _CMP_UNORD_Q);
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(v0, v1), _mm512_max_ps(v2, v3)));
        maxima[b] = most;
        if (most > row.best) row.best = most;
    }
    if (broken) row.best = NAN;
    return row;
}

static int largest(const Scanned *row) {
    int b = 0;
    while (row->maxima[b] != row->best) b++;
    int i = b * BLOCK;
    while (row->x[i] != row->best) i++;
    return i;
}

// The sum of all weights, the largest 1; ends [chunks], if asked for, is the sum up to each chunk's end.
static double mass(const Scanned *row, float scale, double *ends) {
    double sum = 0;
    for (int first = 0, chunk = 0; first < row->blocks; first += CHUNK, chunk++) {
        Sums sums = {_mm512_setzero_pd(), _mm512_setzero_pd()};
        for (int b = first; b < at_most(first + CHUNK, row->blocks); b++) {
            if ((row->maxima[b] - row->best) * scale < LEAST) continue;
            for (int v = 0; v < BLOCK / LANES; v++) add(&sums, weights(exponents(lanes(row, b, v), row->best, scale)));
        }
        sum += total(&sums);
        if (ends) ends[chunk] = sum;
    }
    return sum;
}

static double mass_in_units(const Scanned *row, float scale) {
    Sums sums = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int b = 0; b < row->blocks; b++) {
        if ((row->maxima[b] - row->best) * scale < NOTHING) continue;
        for (int v = 0; v < BLOCK / LANES; v++) add(&sums, whole_units(exponents(lanes(row, b, v), row->best, scale)));
    }
    return total(&sums);
}

// ---- unfiltered: the cumulative distribution in order of id, inverted

static int draw_by_id(const Scanned *row, float scale, double u, double *ends) {
    const double target = u * mass(row, scale, ends);
    const int chunks = (row->blocks + CHUNK - 1) / CHUNK;
    int chunk = 0, drawn = -1;
    while (chunk < chunks - 1 && ends[chunk] <= target) chunk++;
    // The sum in order may come to a hair less than the chunk's: stay on a token with weight.
    for (; drawn < 0 && chunk >= 0; chunk--) {
        double sum = chunk ? ends[chunk - 1] : 0;
        for (int b = chunk * CHUNK; b < at_most((chunk + 1) * CHUNK, row->blocks); b++)
            for (int v = 0; v < BLOCK / LANES; v++) {
                float some[LANES];
                _mm512_storeu_ps(some, weights(exponents(lanes(row, b, v), row->best, scale)));
                for (int i = 0; i < LANES; i++) {
                    sum += some[i];
                    if (some[i] > 0) drawn = b * BLOCK + v * LANES + i;
                    if (some[i] > 0 && sum > target) return drawn;
                }
            }
    }
    return drawn;
}

// ---- filtered: the same in order of falling logits, over the kept prefix of that order

// Appends the lanes of the mask. (Compressing straight into memory is slow on Zen 4.)
INLINE void keep(Candidates *into, __mmask16 which, __m512 values, __m512i ids) {
    _mm512_storeu_ps(into->values + into->count, _mm512_maskz_compress_ps(which, values));
    _mm512_storeu_si512(into->ids + into->count, _mm512_maskz_compress_epi32(which, ids));
    into->count += __builtin_popcount(which);
}

// Those not below `bound` whose exponents are not below `least`.
static void gather(const Scanned *row, float scale, float bound, float least, Candidates *found) {
    const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    found->count = 0;
    for (int b = 0; b < row->blocks; b++) {
        if (row->maxima[b] < bound || (row->maxima[b] - row->best) * scale < least) continue;
        for (int v = 0; v < BLOCK / LANES; v++) {
            const __m512 x = lanes(row, b, v);
            __mmask16 which = _mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_GE_OQ);
            which &= _mm512_cmp_ps_mask(exponents(x, row->best, scale), _mm512_set1_ps(least), _CMP_GE_OQ);
            if (which) keep(found, which, x, _mm512_add_epi32(counting, _mm512_set1_epi32(b * BLOCK + v * LANES)));
        }
    }
}

// The k-th largest of the blocks' maxima: no fewer than k logits are as large.
static float bound_of(const Scanned *row, int k, float *work) {
    int count = row->blocks;
    memcpy(work, row->maxima, sizeof(float) * count);
    for (;;) {
        const float pivot = work[count / 2];
        int above = 0, equal = 0;
        for (int i = 0; i < count; i++) above += work[i] > pivot, equal += work[i] == pivot;
        if (above < k && above + equal >= k) return pivot;
        const int goes_up = above >= k;
        if (!goes_up) k -= above + equal;
        int kept = 0;
        for (int i = 0; i < count; i++) {
            const float value = work[i];
            work[kept] = value;
            kept += goes_up ? value > pivot : value < pivot;
        }
        count = kept;
    }
}

typedef enum { COUNT_REACHES, MASS_REACHES, MASS_PASSES } Goal;
typedef struct { double mass; int32_t id; } Place; // the running mass with the token, and the token

INLINE int is_met(Goal goal, double wanted, double count, double sum) {
    return goal == COUNT_REACHES ? count >= wanted : goal == MASS_REACHES ? sum >= wanted : sum > wanted;
}

INLINE float middle_of_3(float a, float b, float c) { return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c)); }

static float pivot_of(const Candidates *c) {
    const float *v = c->values;
    const int step = c->count / 9;
    return middle_of_3(middle_of_3(v[0], v[step], v[2 * step]), middle_of_3(v[3 * step], v[4 * step], v[5 * step]),
                       middle_of_3(v[6 * step], v[7 * step], v[8 * step]));
}

// At most FEW candidates, in their order.
static Place walk(Candidates *c, float best, float scale, Goal goal, double wanted, double count, double sum) {
    for (int i = 1; i < c->count; i++) { // stable, and ids rise: equals stay in order
        const float value = c->values[i];
        const int32_t id = c->ids[i];
        int j = i;
        for (; j > 0 && c->values[j - 1] < value; j--) {
            c->values[j] = c->values[j - 1];
            c->ids[j] = c->ids[j - 1];
        }
        c->values[j] = value;
        c->ids[j] = id;
    }
    Place place = {sum, -1};
    for (int first = 0; first < c->count; first += LANES) {
        float some[LANES];
        _mm512_storeu_ps(some, whole_units(exponents(_mm512_loadu_ps(c->values + first), best, scale)));
        for (int i = 0; i < at_most(LANES, c->count - first); i++) {
            place.mass += some[i];
            count++;
            if (some[i] > 0) place.id = c->ids[first + i];
            if (is_met(goal, wanted, count, place.mass)) return place;
        }
    }
    return place;
}

// The first in order with which the goal is met; the last with weight where none is.
static Place find(const Candidates *all, Candidates *work, float best, float scale, Goal goal, double wanted) {
    Candidates now = *all;
    double count = 0, sum = 0;
    while (now.count > FEW) {
        const float pivot = pivot_of(&now);
        const __m512 pivots = _mm512_set1_ps(pivot);
        Sums sums = {_mm512_setzero_pd(), _mm512_setzero_pd()};
        long above = 0, equal = 0;
        for (int i = 0; i < now.count; i += LANES) {
            const __mmask16 here = first_lanes(now.count - i);
            const __m512 x = _mm512_loadu_ps(now.values + i);
            const __mmask16 more = _mm512_mask_cmp_ps_mask(here, x, pivots, _CMP_GT_OQ);
            equal += __builtin_popcount(_mm512_mask_cmp_ps_mask(here, x, pivots, _CMP_EQ_OQ));
            above += __builtin_popcount(more);
            if (more) add(&sums, _mm512_maskz_mov_ps(more, whole_units(exponents(x, best, scale))));
        }
        const double each = _mm512_cvtss_f32(whole_units(exponents(pivots, best, scale)));
        const double above_mass = total(&sums);
        const int in_above = is_met(goal, wanted, count + above, sum + above_mass);
        const int in_equal = !in_above && is_met(goal, wanted, count + above + equal, sum + above_mass + each * equal);
        if (!in_above) count += above, sum += above_mass;
        if (!in_above && !in_equal) count += equal, sum += each * equal;
        work->count = 0;
        for (int i = 0; i < now.count; i += LANES) {
            const __m512 x = _mm512_loadu_ps(now.values + i);
            const __m512i ids = _mm512_loadu_si512(now.ids + i);
            __mmask16 which = in_above ? _mm512_cmp_ps_mask(x, pivots, _CMP_GT_OQ)
                            : in_equal ? _mm512_cmp_ps_mask(x, pivots, _CMP_EQ_OQ)
                                       : _mm512_cmp_ps_mask(x, pivots, _CMP_LT_OQ);
            which &= first_lanes(now.count - i);
            if (which) keep(work, which, x, ids);
        }
        now = *work;
        if (in_equal) { // all of one weight: no order but that of their ids
            int i = 0;
            for (;; i++) {
                count++;
                sum += each;
                if (i == now.count - 1 || is_met(goal, wanted, count, sum)) return (Place){sum, now.ids[i]};
            }
        }
    }
    if (now.values != work->values) { // few from the beginning: `all` is asked again
        memcpy(work->values, now.values, sizeof(float) * now.count);
        memcpy(work->ids, now.ids, sizeof(int32_t) * now.count);
        work->count = now.count;
    }
    return walk(work, best, scale, goal, wanted, count, sum);
}

static double mass_of(const Candidates *c, float best, float scale) {
    Sums sums = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int i = 0; i < c->count; i += LANES)
        add(&sums, _mm512_maskz_mov_ps(first_lanes(c->count - i),
                                       whole_units(exponents(_mm512_loadu_ps(c->values + i), best, scale))));
    return total(&sums);
}

// min-p, then exactly k, then top-p of what those left: as model/drawing.py and model/flat_rows.py
static int draw_by_rank(const Scanned *row, const Row *own, double u, Scratch *s) {
    const float best = row->best, scale = own->scale, least = fmaxf(own->log_min_p, NOTHING);
    const int has_k = own->top_k < row->size, is_share = own->top_p < 1 && !has_k && own->log_min_p == -INFINITY;
    double left;
    if (is_share) {
        left = mass_in_units(row, scale);
        gather(row, scale, bound_of(row, (row->blocks + SHARE_OF_BLOCKS - 1) / SHARE_OF_BLOCKS, s->work.values), least,
               &s->found);
        if (mass_of(&s->found, best, scale) < own->top_p * left) gather(row, scale, -INFINITY, least, &s->found);
    } else {
        const float bound = own->top_k <= row->blocks ? bound_of(row, own->top_k, s->work.values) : -INFINITY;
        gather(row, scale, bound, least, &s->found);
        left = own->top_k < s->found.count ? find(&s->found, &s->work, best, scale, COUNT_REACHES, own->top_k).mass
                                           : mass_of(&s->found, best, scale);
    }
    double kept = left;
    if (own->top_p < 1) kept = fmin(left, find(&s->found, &s->work, best, scale, MASS_REACHES, own->top_p * left).mass);
    return find(&s->found, &s->work, best, scale, MASS_PASSES, u * kept).id;
}

// ---- what a request does to its logits: model/penalties.py

INLINE int is_adjusted(const Row *row) {
    return row->num_biased || row->num_allowed >= 0 || row->num_banned || row->num_seen || row->mask;
}

// An id outside the vocabulary names no token: there is nothing to change.
INLINE int is_token(int64_t id, int size) { return (uint64_t)id < (uint64_t)size; }

static void keep_masked(const uint32_t *mask, int size, float *x) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    const uint16_t *halves = (const uint16_t *)mask;
    int i = 0;
    for (; i + 16 <= size; i += 16)
        _mm512_storeu_ps(x + i, _mm512_mask_blend_ps(halves[i / 16], none, _mm512_loadu_ps(x + i)));
    for (; i < size; i++)
        if (!(mask[i / 32] >> (i % 32) & 1)) x[i] = -INFINITY;
}

static void adjust(const Row *row, const float *raw, int size, float *x) {
    if (row->num_allowed < 0)
        memcpy(x, raw, sizeof(float) * size);
    else { // minus infinity stays what it is, whatever is added to it below
        for (int i = 0; i < size; i++) x[i] = -INFINITY;
        for (int i = 0; i < row->num_allowed; i++)
            if (is_token(row->allowed[i], size)) x[row->allowed[i]] = raw[row->allowed[i]];
    }
    for (int i = 0; i < row->num_biased; i++)
        if (is_token(row->biased[i], size)) x[row->biased[i]] += row->bias[i];
    for (int i = 0; i < row->num_seen; i++) {
        if (!is_token(row->seen[i], size)) continue;
        float *value = x + row->seen[i];
        const float count = row->counts[i];
        *value = *value > 0 ? *value / row->repetition : *value * row->repetition;
        *value -= row->frequency * count;
        *value -= count > 0 ? row->presence : 0;
    }
    for (int i = 0; i < row->num_banned; i++)
        if (is_token(row->banned[i], size)) x[row->banned[i]] = -INFINITY;
    if (row->mask) keep_masked(row->mask, size, x);
}

// ---- raw log-probabilities: model/logprobs.py

static int rank_of(const Scanned *row, float value) {
    int rank = 1;
    for (int b = 0; b < row->blocks; b++)
        if (row->maxima[b] > value)
            for (int v = 0; v < BLOCK / LANES; v++)
                rank += __builtin_popcount(_mm512_cmp_ps_mask(lanes(row, b, v), _mm512_set1_ps(value), _CMP_GT_OQ));
    return rank;
}

// The `wanted` largest in order: a later one must be larger to come before.
static void top_of(const Scanned *row, int wanted, float *values, int32_t *ids) {
    int count = 0;
    for (int b = 0; b < row->blocks; b++) {
        if (count == wanted && !(row->maxima[b] > values[count - 1])) continue;
        for (int i = b * BLOCK; i < at_most((b + 1) * BLOCK, row->size); i++) {
            const float value = row->x[i];
            if (count == wanted && !(value > values[count - 1])) continue;
            int j = count < wanted ? count++ : count - 1;
            for (; j > 0 && values[j - 1] < value; j--) {
                values[j] = values[j - 1];
                ids[j] = ids[j - 1];
            }
            values[j] = value;
            ids[j] = i;
        }
    }
}

static void score(const Scanned *row, const Row *own, int token, int r, const Results *out) {
    const int wanted = at_most(own->logprobs, out->most);
    float *top = out->top_logprobs + (long)r * out->most;
    int32_t *ids = out->top_ids + (long)r * out->most;
    if (wanted) top_of(row, wanted, top, ids);
    const double all = isfinite(row->best) ? row->best + log(mass(row, 1.f, NULL)) : NAN;
    for (int i = 0; i < wanted; i++) top[i] = (float)(top[i] - all);
    out->logprobs[r] = (float)(row->x[token] - all);
    out->ranks[r] = rank_of(row, row->x[token]);
}

// ---- rows

static void draw_row(const Row *own, const float *raw, int size, Scratch *s, int r, const Results *out) {
    const int changes = is_adjusted(own) && own->kind != GIVEN;
    if (changes) adjust(own, raw, size, s->adjusted);
    Scanned row = scan(changes ? s->adjusted : raw, size, s->maxima);
    int token = own->kind == GIVEN ? own->token : 0; // some token also where none can be drawn
    if (isfinite(row.best) && own->kind != GIVEN)
        token = own->kind == GREEDY       ? largest(&row)
              : own->kind == UNFILTERED ? draw_by_id(&row, own->scale, uniform(own), s->ends)
                                        : draw_by_rank(&row, own, uniform(own), s);
    out->tokens[r] = token;
    out->best[r] = row.best;
    if (own->logprobs < 0) return;
    if (changes) row = scan(raw, size, s->maxima);
    score(&row, own, token, r, out);
}

static long padded(long count) { return (count + 2 * LANES - 1) / LANES * LANES; } // keep() writes past the end

static long scratch_floats(int size) {
    const long blocks = (size + BLOCK - 1) / BLOCK;
    return 5 * padded(size) + padded(blocks) + 2 * padded(blocks / CHUNK + 1);
}

long sampling_scratch_bytes(int size) { return scratch_floats(size) * sizeof(float); }

// logits [*, V]; scratch sampling_scratch_bytes(V) for each thread
void draw_rows(const Row *rows, int num_rows, const float *logits, int size, const Results *out, float *scratch,
               int threads) {
    const long wide = padded(size), blocks = (size + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (num_rows > 1)
    for (int r = 0; r < num_rows; r++) {
        float *own = scratch + omp_get_thread_num() * scratch_floats(size);
        float *ends = own + 5 * wide + padded(blocks);
        Scratch s = {own, own + 5 * wide, (double *)ends, {own + wide, (int32_t *)(own + 2 * wide), 0},
                     {own + 3 * wide, (int32_t *)(own + 4 * wide), 0}};
        draw_row(rows + r, logits + (long)rows[r].logits_row * size, size, &s, r, out);
    }
}

#endif
