/* Products of cells by AVX-VNNI, the 256-bit form of micro_avx512.h. */
#include "cell256.h"

enum { TILE_ROWS = 6, TILE_PANELS = 1, VECTOR_ROWS = 4, VECTOR_PANELS = 4, BYTE_BIAS = 0, WIDE_BITS = 9, DIRECT_BITS = 8 };

INLINE __m256i products(__m256i sum, __m256i codes, __m256i x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
#else
    return _mm256_dpbusd_epi32(sum, codes, x);   /* the same by AVX512-VL: how the tests run this file */
#endif
}

INLINE void unpack_width(const int bits, const uint8_t *from, int64_t blocks, uint8_t *to) {
    for (int64_t b = 0; b < blocks; b++, from += bits * CELL, to += 8 * CELL)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            save(to + i * HALF, cell(from + i % 2 * HALF, bits, i / 2));
}

INLINE void tile_rows(const int rows, const int8_t *a, const uint8_t *w, int64_t blocks, int fresh, int32_t *acc,
                      int64_t acc_row) {
    __m256i sum[6][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
            sum[r][h] = fresh ? _mm256_setzero_si256() : load(acc + r * acc_row + h * 8);
    for (int64_t b = 0; b < blocks; b++, a += BLOCK, w += 8 * CELL)
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            __m256i left = load(w + c * CELL), right = load(w + c * CELL + HALF);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                __m256i x = _mm256_set1_epi32(word(a + r * STRIDE + 4 * c));
                sum[r][0] = products(sum[r][0], left, x);
                sum[r][1] = products(sum[r][1], right, x);
            }
        }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
            save(acc + r * acc_row + h * 8, sum[r][h]);
}

static void tile(int bits, int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel, int64_t blocks,
                 int fresh, int32_t *acc, int64_t acc_row) {
    (void)bits, (void)panels, (void)next_panel;
    switch (rows) {
    case 1: tile_rows(1, a, w, blocks, fresh, acc, acc_row); break;
    case 2: tile_rows(2, a, w, blocks, fresh, acc, acc_row); break;
    case 3: tile_rows(3, a, w, blocks, fresh, acc, acc_row); break;
    case 4: tile_rows(4, a, w, blocks, fresh, acc, acc_row); break;
    case 5: tile_rows(5, a, w, blocks, fresh, acc, acc_row); break;
    default: tile_rows(6, a, w, blocks, fresh, acc, acc_row);
    }
}

INLINE void vector_shape(const int bits, const int rows, const int panels, const int8_t *a, const uint8_t *w,
                         int64_t next_panel, int64_t blocks, int fresh, int32_t *acc, int64_t acc_row) {
    __m256i sum[4][8];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int h = 0; h < 2 * panels; h++)
            sum[r][h] = fresh ? _mm256_setzero_si256() : load(acc + r * acc_row + h * 8);
    for (int64_t b = 0; b < blocks; b++, a += BLOCK, w += bits * CELL) {
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++)
            fetch_ahead(w + p * next_panel, bits);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++)
#pragma GCC unroll 8
            for (int h = 0; h < 2 * panels; h++) {
                __m256i codes = cell(w + h / 2 * next_panel + h % 2 * HALF, bits, c);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++)
                    sum[r][h] = products(sum[r][h], codes, _mm256_set1_epi32(word(a + r * STRIDE + 4 * c)));
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int h = 0; h < 2 * panels; h++)
            save(acc + r * acc_row + h * 8, sum[r][h]);
}
