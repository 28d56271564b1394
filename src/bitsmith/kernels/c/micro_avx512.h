/* Products of cells by AVX512-VNNI: one vpdpbusd multiplies a cell of weights by four inputs of one row. */
#include <immintrin.h>

enum { TILE_ROWS = 6, TILE_PANELS = 4, VECTOR_ROWS = 4, VECTOR_PANELS = 4, BYTE_BIAS = 0, WIDE_BITS = 9, DIRECT_BITS = 8 };

/* The bits [from, from + count) of each byte of v, moved to [to, to + count). */
INLINE __m512i field(__m512i v, const int from, const int count, const int to) {
    __m512i moved = from > to ? _mm512_srli_epi16(v, from - to) : to > from ? _mm512_slli_epi16(v, to - from) : v;
    return _mm512_and_si512(moved, _mm512_set1_epi8((char)(((1 << count) - 1) << to)));
}

/* Cell c of 0..7 of the block at p: its codes, whatever their width. */
INLINE __m512i cell(const uint8_t *p, const int bits, const int c) {
    if (bits == 8)
        return _mm512_loadu_si512(p + c * CELL);
    __m512i code = _mm512_setzero_si512();
    int at = 0;
    if (bits & 4) {
        code = field(_mm512_loadu_si512(p + c / 2 * CELL), c % 2 * 4, 4, 0);
        p += 4 * CELL, at = 4;
    }
    if (bits & 2) {
        code = _mm512_or_si512(code, field(_mm512_loadu_si512(p + c / 4 * CELL), c % 4 * 2, 2, at));
        p += 2 * CELL, at += 2;
    }
    if (bits & 1)
        code = _mm512_or_si512(code, field(_mm512_loadu_si512(p), c, 1, at));
    return code;
}

INLINE void unpack_width(const int bits, const uint8_t *from, int64_t blocks, uint8_t *to) {
    for (int64_t b = 0; b < blocks; b++, from += bits * CELL, to += 8 * CELL)
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++)
            _mm512_storeu_si512(to + c * CELL, cell(from, bits, c));
}

/* acc (rows, panels of 16) (+)= a (rows, blocks) times unpacked panels. A block is one turn of the loop: measured,
   turns of one cell reach half the speed. */
INLINE void tile_shape(const int rows, const int panels, const int8_t *a, const uint8_t *w, int64_t next_panel,
                       int64_t blocks, int fresh, int32_t *acc, int64_t acc_row) {
    __m512i sum[6][4], codes[4];
#pragma GCC unroll 24
    for (int i = 0; i < rows * panels; i++)
        sum[i / panels][i % panels] =
            fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + i / panels * acc_row + i % panels * PANEL);
    for (int64_t b = 0; b < blocks; b++, a += BLOCK, w += 8 * CELL)
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++)
                codes[p] = _mm512_loadu_si512(w + p * next_panel + c * CELL);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                __m512i x = _mm512_set1_epi32(word(a + r * STRIDE + 4 * c));
#pragma GCC unroll 4
                for (int p = 0; p < panels; p++)
                    sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], codes[p], x);
            }
        }
#pragma GCC unroll 24
    for (int i = 0; i < rows * panels; i++)
        _mm512_storeu_si512(acc + i / panels * acc_row + i % panels * PANEL, sum[i / panels][i % panels]);
}

/* The same for few rows, straight from packed panels: weights are read once, so they are not unpacked to memory. */
INLINE void vector_shape(const int bits, const int rows, const int panels, const int8_t *a, const uint8_t *w,
                         int64_t next_panel, int64_t blocks, int fresh, int32_t *acc, int64_t acc_row) {
    enum { AHEAD = 2048 };
    const int chains = rows == 1 ? 2 : 1;      /* of dependent additions, 5 cycles each */
    __m512i sum[4][4][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            sum[r][p][0] = fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + r * acc_row + p * PANEL);
            sum[r][p][1] = _mm512_setzero_si512();
        }
    for (int64_t b = 0; b < blocks; b++, a += BLOCK, w += bits * CELL) {
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++)
#pragma GCC unroll 8
            for (int v = 0; v < bits; v++)
                _mm_prefetch((const char *)w + p * next_panel + v * CELL + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++)
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++) {
                __m512i codes = cell(w + p * next_panel, bits, c);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    __m512i x = _mm512_set1_epi32(word(a + r * STRIDE + 4 * c));
                    sum[r][p][c % chains] = _mm512_dpbusd_epi32(sum[r][p][c % chains], codes, x);
                }
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++)
            _mm512_storeu_si512(acc + r * acc_row + p * PANEL, _mm512_add_epi32(sum[r][p][0], sum[r][p][1]));
}

INLINE void tile_rows(const int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel, int64_t blocks,
                      int fresh, int32_t *acc, int64_t acc_row) {
    if (panels == TILE_PANELS) {
        tile_shape(rows, TILE_PANELS, a, w, next_panel, blocks, fresh, acc, acc_row);
        return;
    }
    for (int p = 0; p < panels; p++)
        tile_shape(rows, 1, a, w + p * next_panel, next_panel, blocks, fresh, acc + p * PANEL, acc_row);
}

static void tile(int bits, int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel, int64_t blocks,
                 int fresh, int32_t *acc, int64_t acc_row) {
    (void)bits;
    switch (rows) {
    case 1: tile_rows(1, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 2: tile_rows(2, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 3: tile_rows(3, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 4: tile_rows(4, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 5: tile_rows(5, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    default: tile_rows(6, panels, a, w, next_panel, blocks, fresh, acc, acc_row);
    }
}
