/* What integer training does to whole matrices of floats, in one pass where torch's operators take ten: stochastic
   codes of a gradient, and the step in codes that a gradient asks for. kernels/training.py has both in words. */
#include "kernels.h"
#include <math.h>

enum { WIDE = 256, TALL = 64, PIECE = 1 << 14 };   /* columns and rows at once; values of a piece */

typedef struct {
    const float *x, *factor;
    int64_t rows, columns, by_column;
    uint32_t seed;
    float high, least;
    float *scale;
    int8_t *to;
    int64_t next;
} rounding;

INLINE int8_t drawn(float v, float scale, float high, float u) {
    return (int8_t)clamped(floorf(v / scale + u), -high, high);
}

INLINE float scale_for(int32_t largest, float high, float least) {
    float most;
    memcpy(&most, &largest, 4);
    float scale = most / high;
    return scale < least ? least : scale;        /* not a number stays so */
}

/* One scale for each row, factors by column. */
static void round_rows(void *data) {
    rounding *p = data;
    const int64_t columns = p->columns, each = maximum(1, PIECE / maximum(1, columns));
    const float *restrict factor = p->factor;
    const float high = p->high;
    const uint32_t seed = p->seed;
    for (int64_t piece; (piece = draw(&p->next)) * each < p->rows;)
        for (int64_t row = piece * each; row < minimum((piece + 1) * each, p->rows); row++) {
            const float *restrict x = p->x + row * columns;
            int8_t *restrict to = p->to + row * columns;
            int32_t largest = 0;
            for (int64_t k = 0; k < columns; k++) {
                float v = factor ? x[k] * factor[k] : x[k];
                int32_t size = word(&v) & 0x7fffffff;
                largest = size > largest ? size : largest;
            }
            const float scale = p->scale[row] = scale_for(largest, high, p->least);
            const uint32_t first = (uint32_t)(row * columns);
            for (int64_t k = 0; k < columns; k++)
                to[k] = drawn(factor ? x[k] * factor[k] : x[k], scale, high, noise(seed, first + (uint32_t)k));
        }
}

/* One scale for each column, factors by row; columns come as rows. */
static void round_columns(void *data) {
    rounding *p = data;
    const int64_t rows = p->rows, columns = p->columns;
    const float high = p->high;
    const uint32_t seed = p->seed;
    for (int64_t piece; (piece = draw(&p->next)) * WIDE < columns;) {
        const int64_t from = piece * WIDE, count = minimum(WIDE, columns - from);
        int32_t largest[WIDE] = {0};
        float scale[WIDE];
        for (int64_t row = 0; row < rows; row++) {
            const float *restrict x = p->x + row * columns + from;
            const float factor = p->factor ? p->factor[row] : 1;
            for (int64_t k = 0; k < count; k++) {
                float v = x[k] * factor;
                int32_t size = word(&v) & 0x7fffffff;
                largest[k] = size > largest[k] ? size : largest[k];
            }
        }
        for (int64_t k = 0; k < count; k++)
            scale[k] = p->scale[from + k] = scale_for(largest[k], high, p->least);
        for (int64_t start = 0; start < rows; start += TALL) {
            const int64_t tall = minimum(TALL, rows - start);
            int8_t made[TALL][WIDE];
            for (int64_t i = 0; i < tall; i++) {
                const float *restrict x = p->x + (start + i) * columns + from;
                int8_t *restrict to = made[i];
                const float factor = p->factor ? p->factor[start + i] : 1;
                const uint32_t first = (uint32_t)((start + i) * columns + from);
                for (int64_t k = 0; k < count; k++)
                    to[k] = drawn(x[k] * factor, scale[k], high, noise(seed, first + (uint32_t)k));
            }
            for (int64_t k = 0; k < count; k++) {
                int8_t *to = p->to + (from + k) * rows + start;
                for (int64_t i = 0; i < tall; i++)
                    to[i] = made[i][k];
            }
        }
    }
}

/* x (rows, columns) times factors as codes of -high .. high, rounded so that the expectation is right; by_column:
   (columns, rows). */
void bitsmith_stochastic(const float *x, const float *factor, int64_t rows, int64_t columns, int64_t by_column,
                         int64_t seed, float high, float least, float *scale, int8_t *to, int64_t threads) {
    rounding p = {x, factor, rows, columns, by_column, (uint32_t)seed, high, least, scale, to, 0};
    team(by_column ? round_columns : round_rows, &p, minimum(threads, rows * columns / PIECE + 1));
}

typedef struct {
    const float *g;
    float *d;
    const int8_t *codes, *residual;
    const float *row, *column;
    int64_t rows, columns, group;
    float half, decay;
    double *dots, *squares;
    int64_t next;
} aiming;

enum { LANES = 8 };                         /* sums that run side by side: the same on every instruction set */

/* Flags are constants where it is called. */
INLINE void aim_group(aiming *p, int64_t first, int64_t at, int64_t count, int64_t sums, int column, int residual) {
    const float *restrict g = p->g + first;
    float *restrict d = p->d + first;
    const int8_t *restrict codes = p->codes + first, *restrict r = residual ? p->residual + first : NULL;
    const float *restrict factor = column ? p->column + at : NULL;
    const float row = p->row[sums], half = p->half, decay = p->decay;
    double dot[LANES] = {0};
    for (int64_t from = 0; from < count; from += WIDE) {
        const int64_t here = minimum(WIDE, count - from);
        float part[WIDE] = {0};
        for (int64_t k = 0; k < here; k++) {
            float step = g[from + k] * row;
            step = column ? step * factor[from + k] : step;
            part[k] = ((float)codes[from + k] + half) * step;
            d[from + k] = step;
        }
        for (int64_t k = 0; k < WIDE; k += LANES)
            for (int i = 0; i < LANES; i++)
                dot[i] += (double)part[k + i];
    }
    if (decay != 0)
        for (int64_t k = 0; k < count; k++)
            d[k] += ((float)codes[k] + half) * decay;
    if (residual)
        for (int64_t k = 0; k < count; k++) {
            float carried = fabsf((float)r[k] / 127);
            d[k] *= 0.5f + 2 * (carried < 0.5f ? carried : 0.5f);
        }
    int32_t whole = 0, plain = 0;           /* of codes and of their squares: at most 2^15 codes of 8 bits */
    for (int64_t k = 0; k < count; k++) {
        whole += codes[k] * codes[k];
        plain += codes[k];
    }
    double total = 0;
    for (int i = 0; i < LANES; i++)
        total += dot[i];
    p->dots[sums] = total;
    p->squares[sums] = (double)whole + 2 * (double)half * plain + (double)half * half * (double)count;
}

static void aim_rows(void *data) {
    aiming *p = data;
    const int64_t each = maximum(1, PIECE / maximum(1, p->columns)), groups = (p->columns + p->group - 1) / p->group;
    for (int64_t piece; (piece = draw(&p->next)) * each < p->rows;)
        for (int64_t row = piece * each; row < minimum((piece + 1) * each, p->rows); row++)
            for (int64_t g = 0; g < groups; g++) {
                int64_t at = g * p->group, count = minimum(p->group, p->columns - at), first = row * p->columns + at;
                switch ((p->column ? 2 : 0) + (p->residual ? 1 : 0)) {
                case 0: aim_group(p, first, at, count, row * groups + g, 0, 0); break;
                case 1: aim_group(p, first, at, count, row * groups + g, 0, 1); break;
                case 2: aim_group(p, first, at, count, row * groups + g, 1, 0); break;
                default: aim_group(p, first, at, count, row * groups + g, 1, 1); break;
                }
            }
}

/* d (rows, columns) = (g row column + (code + half) decay) (1/2 + 2 |residual|), and before the decay the sums over
   groups of (code + half) d, and those of (code + half)^2. */
void bitsmith_aim(const float *g, float *d, const int8_t *codes, const int8_t *residual, const float *row,
                  const float *column, int64_t rows, int64_t columns, int64_t group, float half, float decay,
                  double *dots, double *squares, int64_t threads) {
    aiming p = {g, d, codes, residual, row, column, rows, columns, group, half, decay, dots, squares, 0};
    team(aim_rows, &p, minimum(threads, rows * columns / PIECE + 1));
}
