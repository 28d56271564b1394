/* Products of cells by AVX2, which has no exact product of bytes: vpmaddubsw saturates its int16 pairs for codes of
   8 bits, but not below, where several pairs even add up in int16 before they are widened:
       2 (2^b - 1) 128 P <= 32767:  P = 127, 42, 18, 8, 4, 2, 1 for b = 1..7.
   Codes of 8 bits are multiplied as int16 (vpmaddwd): activations come widened, in the order 0, 2, 1, 3 of each
   four, in which the even and the odd bytes of a cell lie. */
#include "cell256.h"

enum { TILE_ROWS = 3, TILE_PANELS = 1, VECTOR_ROWS = 2, VECTOR_PANELS = 4, BYTE_BIAS = 0, WIDE_BITS = 8, DIRECT_BITS = 9 };

/* Cells whose products add up in int16, as a power of two. */
INLINE int depth_of(const int bits) { return bits > 3 ? 1 << (7 - bits) : bits == 3 ? 16 : bits == 2 ? 32 : 64; }

INLINE __m256i widened(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE __m256i even_bytes(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi16(255)); }
INLINE __m256i odd_bytes(__m256i codes) { return _mm256_srli_epi16(codes, 8); }

INLINE void unpack_width(const int bits, const uint8_t *from, int64_t blocks, uint8_t *to) {
    for (int64_t b = 0; b < blocks; b++, from += bits * CELL)
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            __m256i left = cell(from, bits, c), right = cell(from + HALF, bits, c);
            if (bits < WIDE_BITS) {
                save(to, left);
                save(to + HALF, right);
                to += CELL;
                continue;
            }
            save(to, even_bytes(left));
            save(to + HALF, even_bytes(right));
            save(to + CELL, odd_bytes(left));
            save(to + CELL + HALF, odd_bytes(right));
            to += 2 * CELL;
        }
}

INLINE void read_sums(__m256i sum[3][2], const int rows, int fresh, const int32_t *acc, int64_t acc_row) {
#pragma GCC unroll 6
    for (int i = 0; i < 2 * rows; i++)
        sum[i / 2][i % 2] = fresh ? _mm256_setzero_si256() : load(acc + i / 2 * acc_row + i % 2 * 8);
}

INLINE void write_sums(__m256i sum[3][2], const int rows, int32_t *acc, int64_t acc_row) {
#pragma GCC unroll 6
    for (int i = 0; i < 2 * rows; i++)
        save(acc + i / 2 * acc_row + i % 2 * 8, sum[i / 2][i % 2]);
}

INLINE void tile_narrow(const int depth, const int rows, const int8_t *a, const uint8_t *w, int64_t blocks, int fresh,
                        int32_t *acc, int64_t acc_row) {
    __m256i sum[3][2], pairs[3][2];
    read_sums(sum, rows, fresh, acc, acc_row);
#pragma GCC unroll 6
    for (int i = 0; i < 2 * rows; i++)
        pairs[i / 2][i % 2] = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; b++, a += BLOCK, w += 8 * CELL) {
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            __m256i left = load(w + c * CELL), right = load(w + c * CELL + HALF);
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) {
                __m256i x = _mm256_set1_epi32(word(a + r * STRIDE + 4 * c));
                __m256i first = _mm256_maddubs_epi16(left, x), second = _mm256_maddubs_epi16(right, x);
                int begins = depth <= 8 && c % depth == 0;
                pairs[r][0] = begins ? first : _mm256_add_epi16(pairs[r][0], first);
                pairs[r][1] = begins ? second : _mm256_add_epi16(pairs[r][1], second);
                if (depth <= 8 && c % depth == depth - 1) {
                    sum[r][0] = widened(sum[r][0], pairs[r][0]);
                    sum[r][1] = widened(sum[r][1], pairs[r][1]);
                }
            }
        }
        if (depth > 8 && ((b + 1) % (depth / 8) == 0 || b == blocks - 1))
#pragma GCC unroll 6
            for (int i = 0; i < 2 * rows; i++) {
                sum[i / 2][i % 2] = widened(sum[i / 2][i % 2], pairs[i / 2][i % 2]);
                pairs[i / 2][i % 2] = _mm256_setzero_si256();
            }
    }
    write_sums(sum, rows, acc, acc_row);
}

INLINE void tile_wide(const int rows, const int8_t *a, const uint8_t *w, int64_t blocks, int fresh, int32_t *acc,
                      int64_t acc_row) {
    __m256i sum[3][2];
    read_sums(sum, rows, fresh, acc, acc_row);
    for (int64_t b = 0; b < blocks; b++, a += 2 * BLOCK, w += 16 * CELL)
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) {
            __m256i left = load(w + c * CELL), right = load(w + c * CELL + HALF);
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) {
                __m256i x = _mm256_set1_epi32(word(a + 2 * r * STRIDE + 4 * c));
                sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(left, x));
                sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(right, x));
            }
        }
    write_sums(sum, rows, acc, acc_row);
}

INLINE void tile_rows(int bits, const int rows, const int8_t *a, const uint8_t *w, int64_t blocks, int fresh,
                      int32_t *acc, int64_t acc_row) {
    switch (bits) {
    case 1: tile_narrow(depth_of(1), rows, a, w, blocks, fresh, acc, acc_row); break;
    case 2: tile_narrow(depth_of(2), rows, a, w, blocks, fresh, acc, acc_row); break;
    case 3: tile_narrow(depth_of(3), rows, a, w, blocks, fresh, acc, acc_row); break;
    case 4: tile_narrow(depth_of(4), rows, a, w, blocks, fresh, acc, acc_row); break;
    case 5: tile_narrow(depth_of(5), rows, a, w, blocks, fresh, acc, acc_row); break;
    case 6: tile_narrow(depth_of(6), rows, a, w, blocks, fresh, acc, acc_row); break;
    case 7: tile_narrow(depth_of(7), rows, a, w, blocks, fresh, acc, acc_row); break;
    default: tile_wide(rows, a, w, blocks, fresh, acc, acc_row);
    }
}

static void tile(int bits, int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel, int64_t blocks,
                 int fresh, int32_t *acc, int64_t acc_row) {
    (void)panels, (void)next_panel;
    switch (rows) {
    case 1: tile_rows(bits, 1, a, w, blocks, fresh, acc, acc_row); break;
    case 2: tile_rows(bits, 2, a, w, blocks, fresh, acc, acc_row); break;
    default: tile_rows(bits, 3, a, w, blocks, fresh, acc, acc_row);
    }
}

/* One half of one panel's block, for few rows. */
INLINE void block_half(const int bits, const int rows, const int8_t *a, const uint8_t *w, __m256i *sum, int next_sum) {
    const int depth = depth_of(bits) < 8 ? depth_of(bits) : 8;
    __m256i pairs[4];
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
        __m256i codes = cell(w, bits, c);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            if (bits == WIDE_BITS) {
                const int8_t *four = a + 2 * (r * STRIDE + 4 * c);
                __m256i even = _mm256_madd_epi16(even_bytes(codes), _mm256_set1_epi32(word(four)));
                __m256i odd = _mm256_madd_epi16(odd_bytes(codes), _mm256_set1_epi32(word(four + 4)));
                sum[r * next_sum] = _mm256_add_epi32(sum[r * next_sum], _mm256_add_epi32(even, odd));
                continue;
            }
            __m256i product = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(word(a + r * STRIDE + 4 * c)));
            pairs[r] = c % depth ? _mm256_add_epi16(pairs[r], product) : product;
            if (c % depth == depth - 1)
                sum[r * next_sum] = widened(sum[r * next_sum], pairs[r]);
        }
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
    for (int64_t b = 0; b < blocks; b++, a += BLOCK * (bits == WIDE_BITS ? 2 : 1), w += bits * CELL)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            fetch_ahead(w + p * next_panel, bits);
            block_half(bits, rows, a, w + p * next_panel, &sum[0][2 * p], 8);
            block_half(bits, rows, a, w + p * next_panel + HALF, &sum[0][2 * p + 1], 8);
        }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int h = 0; h < 2 * panels; h++)
            save(acc + r * acc_row + h * 8, sum[r][h]);
}
