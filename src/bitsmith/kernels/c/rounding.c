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

enum { MOST_BLOCK = 1024 };

typedef struct {
    int8_t *codes, *momentum, *residual;      /* the last two may be NULL */
    uint16_t *scale;                          /* bfloat16, of the momentum's blocks */
    const float *d;
    int64_t rows, columns, block;
    float keep, take, carry, low, high;
    int64_t clip, nearest;
    uint32_t seed, momentum_seed, residual_seed;
    int64_t cut, moved, next;
} moving;

INLINE float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* One block of momentum, `count` values from element `first` on; the flags are constants where it is called. */
INLINE void move_block(moving *p, int64_t first, int64_t count, uint16_t *scale, int momentum, int residual, int nearest) {
    float made[MOST_BLOCK];
    int8_t *restrict codes = p->codes + first;
    int8_t *restrict m = momentum ? p->momentum + first : NULL, *restrict r = residual ? p->residual + first : NULL;
    const float *restrict d = p->d + first;
    const float low = p->low, high = p->high, top = p->clip ? high : INFINITY, bottom = p->clip ? low : -INFINITY;
    const float keep = p->keep, take = p->take, carry = p->carry, old = momentum ? from_bfloat16(*scale) : 0;
    const uint32_t seed = p->seed, left_seed = p->residual_seed, m_seed = p->momentum_seed;
    int32_t cut = 0, moved = 0, largest = 0;
    for (int64_t i = 0; i < count; i++) {
        float before = codes[i], own = d[i];
        own = ((before >= top) & (own < 0)) | ((before <= bottom) & (own > 0)) ? 0 : own;
        float step = momentum ? (float)m[i] * old * keep + own * take : own;
        float wanted = before - (residual ? step - (float)r[i] / 127 : step);
        float kept = clamped(wanted, low, high);
        float rounded = nearest ? rintf(kept) : clamped(floorf(wanted + noise(seed, (uint32_t)(first + i))), low, high);
        float error = kept - rounded;
        cut += kept != wanted;
        moved += rounded != before;
        codes[i] = (int8_t)rounded;
        if (residual)
            r[i] = (int8_t)clamped(floorf(error * 127 + noise(left_seed, (uint32_t)(first + i))), -127, 127);
        if (momentum) {
            made[i] = step + error * carry;
            int32_t size = word(made + i) & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
    }
    __atomic_fetch_add(&p->cut, cut, __ATOMIC_RELAXED);
    __atomic_fetch_add(&p->moved, moved, __ATOMIC_RELAXED);
    if (!momentum)
        return;
    float most;
    memcpy(&most, &largest, 4);
    most *= (1 + 0x1p-7) / 127;               /* room for the rounding of the scale */
    *scale = to_bfloat16(most > 0x1p-120f ? most : 0x1p-120f);
    const float now = from_bfloat16(*scale);
    for (int64_t i = 0; i < count; i++)
        m[i] = (int8_t)clamped(floorf(made[i] / now + noise(m_seed, (uint32_t)(first + i))), -127, 127);
}

static void move_rows(void *data) {
    moving *p = data;
    int64_t each = maximum(1, PIECE / maximum(1, p->columns)), blocks = (p->columns + p->block - 1) / p->block;
    for (int64_t piece; (piece = draw(&p->next)) * each < p->rows;)
        for (int64_t row = piece * each; row < minimum((piece + 1) * each, p->rows); row++)
            for (int64_t b = 0; b < blocks; b++) {
                int64_t start = b * p->block, count = minimum(p->block, p->columns - start);
                int64_t first = row * p->columns + start;
                uint16_t *scale = p->scale + row * blocks + b;
                switch ((p->momentum ? 4 : 0) + (p->residual ? 2 : 0) + (p->nearest ? 1 : 0)) {
                case 0: move_block(p, first, count, scale, 0, 0, 0); break;
                case 1: move_block(p, first, count, scale, 0, 0, 1); break;
                case 2: move_block(p, first, count, scale, 0, 1, 0); break;
                case 3: move_block(p, first, count, scale, 0, 1, 1); break;
                case 4: move_block(p, first, count, scale, 1, 0, 0); break;
                case 5: move_block(p, first, count, scale, 1, 0, 1); break;
                case 6: move_block(p, first, count, scale, 1, 1, 0); break;
                default: move_block(p, first, count, scale, 1, 1, 1); break;
                }
            }
}

/* A step of an integer optimizer, d (rows, columns) in codes (kernels/torch_path.py has it in words): the new codes,
   momentum (int8, a bfloat16 scale for each block of a row) and residual (1/127 of a code). counts: what the range cut
   off, and codes that moved. */
void bitsmith_move(int8_t *codes, int8_t *momentum, uint16_t *scale, int8_t *residual, const float *d, int64_t rows,
                   int64_t columns, int64_t block, float keep, float take, float carry, int64_t low, int64_t high,
                   int64_t clip, int64_t nearest, int64_t seed, int64_t momentum_seed, int64_t residual_seed,
                   int64_t *counts, int64_t threads) {
    moving p = {codes, momentum, residual, scale, d, rows, columns, minimum(block, MOST_BLOCK), keep, take, carry,
                (float)low, (float)high, clip, nearest, (uint32_t)seed, (uint32_t)momentum_seed,
                (uint32_t)residual_seed, 0, 0, 0};
    team(move_rows, &p, minimum(threads, rows * columns / PIECE + 1));
    counts[0] = p.cut;
    counts[1] = p.moved;
}
