/* Floats to codes: static grids, a range for each row as it comes, and the stochastic step of integer weights. */
#include "kernels.h"
#include <math.h>

enum { PIECE = 1 << 14 };

/* code = clamp(round(x / scale - half) + zero, low, high), as bitsmith.numerics.affine; one byte each. */
typedef struct {
    const float *x;
    int64_t rows, columns, dynamic, asymmetric;
    float *scale;
    int32_t *zero;             /* by row where dynamic, else one of each */
    float low, high, half, least;
    uint8_t *to;
    int64_t next;
} quantization;

INLINE float clamped(float x, float low, float high) {
    x = x > low ? x : low;     /* a NaN becomes low */
    return x < high ? x : high;
}

/* The bits of a float as an integer of the same order (and back): the compiler turns a search for the largest integer
   into vectors, of floats it may not. */
INLINE int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

INLINE float value_of(int32_t key) {
    int32_t bits = ordered(key);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* As bitsmith.numerics.calibrate.range_of: 0 is a level, the largest magnitude the highest. */
static void find_range(const quantization *p, int64_t row) {
    const float *x = p->x + row * p->columns;
    int32_t lowest = 0, highest = 0;
    for (int64_t k = 0; k < p->columns; k++) {
        int32_t key = ordered(word(x + k));
        lowest = key < lowest ? key : lowest;
        highest = key > highest ? key : highest;
    }
    float least = value_of(lowest), most = value_of(highest);
    float span = p->asymmetric ? (most - least) / (p->high - p->low) : (most > -least ? most : -least) / (p->high + p->half);
    float scale = span > p->least ? span : p->least;
    p->scale[row] = scale;
    p->zero[row] = p->asymmetric ? (int32_t)clamped(rintf(-least / scale), 0, p->high) : 0;
}

static void quantize_rows(void *data) {
    quantization *p = data;
    int64_t each = maximum(1, PIECE / maximum(1, p->columns));
    for (int64_t piece; (piece = draw(&p->next)) * each < p->rows;)
        for (int64_t row = piece * each; row < minimum((piece + 1) * each, p->rows); row++) {
            if (p->dynamic)
                find_range(p, row);
            float scale = p->scale[p->dynamic ? row : 0], zero = (float)p->zero[p->dynamic ? row : 0];
            const float *restrict x = p->x + row * p->columns;
            const float half = p->half, low = p->low, high = p->high;
            uint8_t *restrict to = p->to + row * p->columns;
            const int64_t columns = p->columns;   /* bytes written could be any of these, as C has it */
            for (int64_t k = 0; k < columns; k++)
                to[k] = (uint8_t)(int32_t)clamped(rintf(x[k] / scale - half) + zero, low, high);
        }
}

void bitsmith_quantize(const float *x, int64_t rows, int64_t columns, int64_t dynamic, int64_t asymmetric, float *scale,
                       int32_t *zero, float low, float high, float half, float least, uint8_t *to, int64_t threads) {
    quantization p = {x, rows, columns, dynamic, asymmetric, scale, zero, low, high, half, least, to, 0};
    team(quantize_rows, &p, minimum(threads, rows * columns / PIECE + 1));
}

typedef struct {
    int8_t *codes;
    const float *step;
    int64_t count;
    uint32_t seed;
    float low, high;
    int64_t next;
} updating;

/* Noise in [0, 1) of element i: bitsmith.numerics.rounding.hash_uniform. */
INLINE float noise(uint32_t seed, uint32_t i) {
    uint32_t h = i * 2654435761u + seed;
    h = (h ^ h >> 16) * 2246822507u;
    h = (h ^ h >> 13) * 3266489909u;
    return (float)(int32_t)((h ^ h >> 16) >> 8) * 0x1p-24f;
}

static void update_codes(void *data) {
    updating *p = data;
    for (int64_t piece; (piece = draw(&p->next)) * PIECE < p->count;) {
        int64_t end = minimum((piece + 1) * PIECE, p->count);
        int8_t *restrict codes = p->codes;
        const float *restrict step = p->step;
        const float low = p->low, high = p->high;
        const uint32_t seed = p->seed;
        for (int64_t i = piece * PIECE; i < end; i++)
            codes[i] = (int8_t)clamped(floorf((float)codes[i] - step[i] + noise(seed, (uint32_t)i)), low, high);
    }
}

/* codes <- clamp(codes - step, low, high), rounded up or down with the probability that keeps the expectation; step
   counts in codes. The same seed gives the same codes, on any number of threads. */
void bitsmith_update(int8_t *codes, const float *step, int64_t count, int64_t seed, int64_t low, int64_t high,
                     int64_t threads) {
    updating p = {codes, step, count, (uint32_t)seed, (float)low, (float)high, 0};
    team(update_codes, &p, minimum(threads, count / PIECE + 1));
}
