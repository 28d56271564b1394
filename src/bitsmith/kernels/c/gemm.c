/* The product of activations and packed weights: how it is cut into pieces that fit the caches, and its epilogue.

   A task is a block of rows times a range of panels. Its rows are copied once into a form that all instruction sets
   share (signed bytes, groups padded, chunks of 512 inputs, a fixed stride), with their sums; then each strip of
   panels is unpacked into L1 chunk by chunk and multiplied with all rows. Few rows skip the unpacking (`vector`). */
#include "kernels.h"
#include <stdlib.h>

#if defined(BITSMITH_AVX512VNNI)
#include "micro_avx512.h"
#elif defined(BITSMITH_AVXVNNI)
#include "micro_avxvnni.h"
#elif defined(BITSMITH_AVX2)
#include "micro_avx2.h"
#elif defined(BITSMITH_NEON)
#include "micro_neon.h"
#else
#include "micro_portable.h"
#endif
#include "widths.h"

enum { MOST_ROWS = 240, ROWS_CACHE = 384 << 10, STRIP = VECTOR_PANELS > TILE_PANELS ? VECTOR_PANELS : TILE_PANELS };

typedef struct {
    const product *p;
    int64_t groups, stored, panels, panel_bytes;    /* stored: inputs with padding */
    int64_t width;                                  /* bytes of a packed activation */
    int64_t block_rows, row_blocks, column_blocks, next;
    int failed;
} plan;

typedef struct {
    int64_t first, rows;        /* of the result */
    uint8_t *line;              /* one row: stored bytes */
    int8_t *a;                  /* (chunk, row, STRIDE) */
    int32_t *sums;              /* (row, group) */
    uint8_t *panel;             /* an unpacked chunk */
    int32_t *acc;               /* (row, STRIP * PANEL) */
    float *total;               /* the same, over groups */
} workspace;

/* Row `row` of the activations as signed bytes, zero where padded. */
static void fetch(const plan *t, int64_t row, uint8_t *line) {
    const product *p = t->p;
    const uint8_t *from = p->a + row * p->a_row;
    if (p->picture)
        image_row(p->picture, p->a, row, line);
    else if (p->a_kind == NIBBLES)
        for (int64_t k = 0; k < p->k; k++)
            line[k] = (uint8_t)((from[k / 2] >> (k % 2 * 4) & 15) + p->a_low);
    else if (p->a_column == 1)
        memcpy(line, from, p->k);
    else
        for (int64_t k = 0; k < p->k; k++)
            line[k] = from[k * p->a_column];
    const int64_t inputs = p->a_kind == UINT8 ? p->k : 0;
    for (int64_t k = 0; k < inputs; k++)
        line[k] ^= 0x80;
    int64_t whole = padded(p->group, p->group);
    for (int64_t g = t->groups - 1; g >= 0; g--) {  /* from the back, as groups only move back */
        int64_t size = minimum(p->group, p->k - g * p->group), end = minimum((g + 1) * whole, t->stored);
        if (whole != p->group)
            memmove(line + g * whole, line + g * p->group, size);
        memset(line + g * whole + size, 0, end - g * whole - size);
    }
}

/* Eight-bit codes do not fit vpmaddubsw; those sets multiply int16 and want inputs 0, 2, 1, 3 of each four. */
static void widen(const uint8_t *from, int64_t count, int8_t *to) {
    int16_t *wide = (int16_t *)to;
    for (int64_t k = 0; k < count; k += 4) {
        wide[k] = (int8_t)from[k];
        wide[k + 1] = (int8_t)from[k + 2];
        wide[k + 2] = (int8_t)from[k + 1];
        wide[k + 3] = (int8_t)from[k + 3];
    }
}

static void pack_rows(const plan *t, workspace *s) {
    int64_t whole = padded(t->p->group, t->p->group);
    for (int64_t r = 0; r < s->rows; r++) {
        fetch(t, s->first + r, s->line);
        for (int64_t g = 0; g < t->groups; g++) {
            int32_t sum = 0;
            const int8_t *line = (const int8_t *)s->line;
            const int64_t end = minimum((g + 1) * whole, t->stored);
            for (int64_t k = g * whole; k < end; k++)
                sum += line[k];
            s->sums[r * t->groups + g] = sum;
        }
        for (int64_t k = 0; k < t->stored; k += CHUNK) {
            int64_t size = minimum(CHUNK, t->stored - k);
            int8_t *to = s->a + (k / CHUNK * s->rows + r) * STRIDE * t->width;
            if (t->width == 2)
                widen(s->line + k, size, to);
            else
                memcpy(to, s->line + k, size);
        }
    }
}

/* Vectors of a panel's channels; the compiler cuts them to the width of the machine. */
typedef int32_t ints __attribute__((vector_size(PANEL * 4)));
typedef float floats __attribute__((vector_size(PANEL * 4), may_alias));

static void store_codes(const product *p, int64_t row, int64_t column, const float *y, int64_t count) {
    const float low = (float)p->out_low, high = (float)p->out_high, zero = (float)p->out_zero;
    const float scale = p->out_scale, half = p->out_half;
    uint8_t code[PANEL];
    for (int j = 0; j < PANEL; j++) {
        float x = __builtin_rintf(y[j] / scale - half) + zero;
        x = x > low ? x : low;
        code[j] = (uint8_t)(int32_t)(x < high ? x : high);
    }
    if (p->out_kind == CODES) {
        memcpy((uint8_t *)p->out + row * p->out_row + column, code, count);
        return;
    }
    for (int64_t j = count; j < PANEL; j++)
        code[j] = (uint8_t)p->out_low;
    uint8_t *to = (uint8_t *)p->out + row * p->out_row + column / 2;
    for (int64_t j = 0; j < count; j += 2)
        to[j / 2] = (uint8_t)((code[j] - p->out_low) | (code[j + 1] - p->out_low) << 4);
}

INLINE void give_out(void *to, const void *from, int64_t count) {
    if (count == PANEL)
        memcpy(to, from, PANEL * 4);
    else
        memcpy(to, from, count * 4);
}

/* A group's sums of all rows and a strip of panels: corrected, added to the groups before, given out after the last.
   plain: nothing but the rows' sums corrects them, and by one number for all channels. */
INLINE void finish_as(const int plain, const int kind, const int first, const int last, const plan *t,
                      const workspace *s, int64_t strip, int panels, int64_t group) {
    const product *p = t->p;
    const int64_t rows = s->rows, groups = t->groups, out_row = p->out_row;
    const int32_t factor = (int32_t)p->factor, moved = p->a_kind == UINT8 ? 128 : 0;
    const int32_t shift = p->bits == 8 ? BYTE_BIAS * factor : 0, low = (int32_t)p->low + shift;
    const int32_t *acc = s->acc;
    float *total = s->total;
    ints offset[STRIP] = {{0}}, columns[STRIP] = {{0}}, sum;
    floats scale[STRIP] = {{0}}, bias[STRIP] = {{0}}, y;
    for (int i = 0; i < panels; i++) {
        const int64_t at = ((strip + i) * groups + group) * PANEL, column = (strip + i) * PANEL;
        offset[i] += low;
        if (p->offset) {
            memcpy(&offset[i], p->offset + at, sizeof *offset);
            offset[i] += shift;
        }
        if (p->column_sum)
            memcpy(&columns[i], p->column_sum + at, sizeof *columns);
        if (p->scale)
            memcpy(&scale[i], p->scale + at, sizeof *scale);
        if (p->bias)
            memcpy(&bias[i], p->bias + column, minimum(PANEL, p->n - column) * sizeof *p->bias);
    }
    for (int64_t r = 0; r < rows; r++, acc += STRIP * PANEL, total += STRIP * PANEL) {
        const int64_t row = s->first + r;
        const int32_t row_sum = s->sums[r * groups + group];
        const int32_t zero = (p->row_zero ? p->row_zero[row] : (int32_t)p->zero) - moved;
        const float row_scale = p->row_scale ? p->row_scale[row] : 1.0f;
        for (int i = 0; i < panels; i++) {
            const int64_t column = (strip + i) * PANEL, count = minimum(PANEL, p->n - column);
            memcpy(&sum, acc + i * PANEL, sizeof sum);
            if (plain)
                sum += low * row_sum;
            else
                sum = factor * sum + offset[i] * row_sum - zero * columns[i];
            if (kind == SUMS) {
                int32_t *to = (int32_t *)p->out + row * out_row + column;
                for (int64_t j = 0; j < count && p->accumulate; j++)
                    sum[j] += to[j];
                give_out(to, &sum, count);
                continue;
            }
            y = __builtin_convertvector(sum, floats) * scale[i];
            if (!first)
                y += *(const floats *)(total + i * PANEL);
            if (!last) {
                *(floats *)(total + i * PANEL) = y;
                continue;
            }
            y *= row_scale;
            y += bias[i];
            if (kind == FLOATS)
                give_out((float *)p->out + row * out_row + column, &y, count);
            else
                store_codes(p, row, column, (const float *)&y, count);
        }
    }
}

INLINE void finish_kind(const int plain, const plan *t, const workspace *s, int64_t strip, int panels, int64_t group) {
    int first = !group, last = group == t->groups - 1;
    if (t->p->out_kind == SUMS)
        finish_as(plain, SUMS, 1, 1, t, s, strip, panels, group);
    else if (first && !last)
        finish_as(plain, FLOATS, 1, 0, t, s, strip, panels, group);
    else if (!last)
        finish_as(plain, FLOATS, 0, 0, t, s, strip, panels, group);
    else if (t->p->out_kind == FLOATS && first)
        finish_as(plain, FLOATS, 1, 1, t, s, strip, panels, group);
    else if (t->p->out_kind == FLOATS)
        finish_as(plain, FLOATS, 0, 1, t, s, strip, panels, group);
    else
        finish_as(plain, CODES, first, 1, t, s, strip, panels, group);
}

static void finish(const plan *t, const workspace *s, int64_t strip, int panels, int64_t group) {
    if (t->p->offset || t->p->column_sum || t->p->factor != 1)
        finish_kind(0, t, s, strip, panels, group);
    else
        finish_kind(1, t, s, strip, panels, group);
}

static void strip(const plan *t, workspace *s, int64_t first, int panels) {
    const product *p = t->p;
    int bits = (int)p->bits;
    int64_t whole = padded(p->group, p->group);
    const uint8_t *packed = p->w + first * t->panel_bytes;
    for (int64_t k = 0, fresh = 1; k < t->stored;) {
        int64_t group = k / whole, group_end = minimum((group + 1) * whole, t->stored);
        int64_t end = minimum(group_end, (k / CHUNK + 1) * CHUNK), blocks = (end - k) / BLOCK;
        const uint8_t *w = packed + k / BLOCK * bits * CELL;
        const int8_t *a = s->a + (k / CHUNK * s->rows * STRIDE + k % CHUNK) * t->width;
        if (s->rows <= VECTOR_ROWS) {
            vector(bits, (int)s->rows, panels, a, w, t->panel_bytes, blocks, (int)fresh, s->acc, STRIP * PANEL);
        } else {
            for (int q = 0; q < panels; q += TILE_PANELS) {
                int some = (int)minimum(TILE_PANELS, panels - q);
                const uint8_t *codes = w + q * t->panel_bytes;
                int64_t next_panel = t->panel_bytes;
                if (bits != DIRECT_BITS) {
                    next_panel = CHUNK * PANEL * t->width;
                    for (int i = 0; i < some; i++)
                        unpack(bits, w + (q + i) * t->panel_bytes, blocks, s->panel + i * next_panel);
                    codes = s->panel;
                }
                int64_t tiles = (s->rows + TILE_ROWS - 1) / TILE_ROWS, each = (s->rows + tiles - 1) / tiles;
                for (int64_t r = 0; r < s->rows; r += each)
                    tile(bits, (int)minimum(each, s->rows - r), some, a + r * STRIDE * t->width, codes, next_panel,
                         blocks, (int)fresh, s->acc + r * STRIP * PANEL + q * PANEL, STRIP * PANEL);
            }
        }
        fresh = end == group_end;
        if (fresh)
            finish(t, s, first, panels, group);
        k = end;
    }
}

static int reserve(const plan *t, workspace *s, uint8_t **memory) {
    int64_t rows = t->block_rows, chunks = (t->stored + CHUNK - 1) / CHUNK;
    int64_t sizes[6] = {t->stored + CELL, chunks * rows * STRIDE * t->width, rows * t->groups * 4,
                        TILE_PANELS * CHUNK * PANEL * t->width, rows * STRIP * PANEL * 4,
                        t->groups > 1 ? rows * STRIP * PANEL * 4 : CELL};
    int64_t starts[6], total = 0;
    for (int i = 0; i < 6; i++) {
        starts[i] = total;
        total += (sizes[i] + CELL - 1) / CELL * CELL;
    }
    *memory = aligned_alloc(CELL, total);
    if (!*memory)
        return 0;
    s->line = *memory + starts[0];
    s->a = (int8_t *)(*memory + starts[1]);
    s->sums = (int32_t *)(*memory + starts[2]);
    s->panel = *memory + starts[3];
    s->acc = (int32_t *)(*memory + starts[4]);
    s->total = (float *)(*memory + starts[5]);
    return 1;
}

static void worker(void *data) {
    plan *t = data;
    workspace s = {.first = -1};
    uint8_t *memory;
    if (!reserve(t, &s, &memory)) {
        t->failed = 1;
        return;
    }
    int64_t strips = (t->panels + STRIP - 1) / STRIP;
    for (int64_t task; (task = draw(&t->next)) < t->row_blocks * t->column_blocks;) {
        int64_t first = task / t->column_blocks * t->block_rows, part = task % t->column_blocks;
        if (first != s.first) {
            s.first = first;
            s.rows = minimum(t->block_rows, t->p->m - first);
            pack_rows(t, &s);
        }
        int64_t end = strips * (part + 1) / t->column_blocks;
        for (int64_t i = strips * part / t->column_blocks; i < end; i++)
            strip(t, &s, i * STRIP, (int)minimum(STRIP, t->panels - i * STRIP));
    }
    free(memory);
}

/* 0, or 1 where memory is short. */
int bitsmith_product(const product *p) {
    plan t = {.p = p, .groups = maximum(1, (p->k + p->group - 1) / p->group), .stored = padded(p->k, p->group)};
    t.width = p->bits == WIDE_BITS ? 2 : 1;
    t.panels = (p->n + PANEL - 1) / PANEL;
    t.panel_bytes = t.stored / BLOCK * p->bits * CELL;
    int64_t most = ROWS_CACHE / maximum(1, t.stored * t.width) / TILE_ROWS * TILE_ROWS;
    most = minimum(MOST_ROWS, maximum(TILE_ROWS, most));
    t.row_blocks = (p->m + most - 1) / most;
    if (!t.row_blocks || !t.panels)
        return 0;
    t.block_rows = (p->m + t.row_blocks - 1) / t.row_blocks;
    if (t.block_rows > VECTOR_ROWS)
        t.block_rows = (t.block_rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    t.block_rows = minimum(t.block_rows, p->m);
    t.row_blocks = (p->m + t.block_rows - 1) / t.block_rows;
    int64_t pieces = p->threads > 1 ? 4 * p->threads : 1;
    t.column_blocks = minimum((pieces + t.row_blocks - 1) / t.row_blocks, (t.panels + STRIP - 1) / STRIP);
    team(worker, &t, minimum(p->threads, t.row_blocks * t.column_blocks));
    return t.failed;
}
