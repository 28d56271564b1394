/* Products of cells by AVX512-VNNI: one vpdpbusd multiplies a cell of weights by four inputs of one row. */
#include <immintrin.h>

enum { TILE_ROWS = 12, TILE_PANELS = 2, VECTOR_ROWS = 4, VECTOR_PANELS = 4, BYTE_BIAS = 0, WIDE_BITS = 9, DIRECT_BITS = 8 };

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

/* acc (rows, panels of 16) (+)= a (rows, 4 cells) times unpacked panels. */
INLINE void tile_shape(const int rows, const int panels, const int8_t *a, const uint8_t *w, int64_t next_panel,
                       int64_t cells, int fresh, int32_t *acc, int64_t acc_row) {
    __m512i sum[12][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++)
            sum[r][p] = fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + r * acc_row + p * PANEL);
    for (int64_t c = 0; c < cells; c++) {
        __m512i left = _mm512_loadu_si512(w + c * CELL);
        __m512i right = panels > 1 ? _mm512_loadu_si512(w + next_panel + c * CELL) : left;
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512i x = _mm512_set1_epi32(word(a + r * STRIDE + 4 * c));
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], left, x);
            if (panels > 1)
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], right, x);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++)
            _mm512_storeu_si512(acc + r * acc_row + p * PANEL, sum[r][p]);
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

INLINE void tile_rows(const int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel, int64_t cells,
                      int fresh, int32_t *acc, int64_t acc_row) {
    if (panels == 2)
        tile_shape(rows, 2, a, w, next_panel, cells, fresh, acc, acc_row);
    else
        tile_shape(rows, 1, a, w, next_panel, cells, fresh, acc, acc_row);
}

static void tile(int bits, int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel, int64_t cells,
                 int fresh, int32_t *acc, int64_t acc_row) {
    (void)bits;
    switch (rows) {
    case 1: tile_rows(1, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 2: tile_rows(2, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 3: tile_rows(3, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 4: tile_rows(4, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 5: tile_rows(5, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 6: tile_rows(6, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 7: tile_rows(7, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 8: tile_rows(8, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 9: tile_rows(9, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 10: tile_rows(10, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    case 11: tile_rows(11, panels, a, w, next_panel, cells, fresh, acc, acc_row); break;
    default: tile_rows(12, panels, a, w, next_panel, cells, fresh, acc, acc_row);
    }
}
