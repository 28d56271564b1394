/* Products of cells by Arm's dot product of signed bytes; codes of 8 bits are moved by 128 (BYTE_BIAS) to fit. */
#include <arm_neon.h>

enum { TILE_ROWS = 6, TILE_PANELS = 1, VECTOR_ROWS = 4, VECTOR_PANELS = 1, BYTE_BIAS = 128, WIDE_BITS = 9, DIRECT_BITS = 9 };

enum { QUARTER = CELL / 4 };

/* The bits [from, from + count) of each byte of v, moved to [to, to + count). */
INLINE uint8x16_t field(uint8x16_t v, const int from, const int count, const int to) {
    uint8x16_t moved = vshlq_u8(v, vdupq_n_s8((int8_t)(to - from)));
    return vandq_u8(moved, vdupq_n_u8((uint8_t)(((1 << count) - 1) << to)));
}

/* Cell c of 0..7 of the block at p, whose address is of the quarter (four channels) wanted. */
INLINE int8x16_t cell(const uint8_t *p, const int bits, const int c) {
    if (bits == 8)
        return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + c * CELL), vdupq_n_u8(128)));
    uint8x16_t code = vdupq_n_u8(0);
    int at = 0;
    if (bits & 4) {
        code = field(vld1q_u8(p + c / 2 * CELL), c % 2 * 4, 4, 0);
        p += 4 * CELL, at = 4;
    }
    if (bits & 2) {
        code = vorrq_u8(code, field(vld1q_u8(p + c / 4 * CELL), c % 4 * 2, 2, at));
        p += 2 * CELL, at += 2;
    }
    if (bits & 1)
        code = vorrq_u8(code, field(vld1q_u8(p), c, 1, at));
    return vreinterpretq_s8_u8(code);
}

INLINE int8x16_t four(const int8_t *a) { return vreinterpretq_s8_s32(vdupq_n_s32(word(a))); }

INLINE void unpack_width(const int bits, const uint8_t *from, int64_t blocks, uint8_t *to) {
    for (int64_t b = 0; b < blocks; b++, from += bits * CELL, to += 8 * CELL)
#pragma GCC unroll 32
        for (int i = 0; i < 32; i++)
            vst1q_u8(to + i * QUARTER, vreinterpretq_u8_s8(cell(from + i % 4 * QUARTER, bits, i / 4)));
}

INLINE void tile_rows(const int rows, const int8_t *a, const uint8_t *w, int64_t blocks, int fresh, int32_t *acc,
                      int64_t acc_row) {
    int32x4_t sum[6][4];
#pragma GCC unroll 24
    for (int i = 0; i < 4 * rows; i++)
        sum[i / 4][i % 4] = fresh ? vdupq_n_s32(0) : vld1q_s32(acc + i / 4 * acc_row + i % 4 * 4);
    for (int64_t b = 0; b < blocks; b++, a += BLOCK, w += 8 * CELL)
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            int8x16_t codes[4];
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++)
                codes[q] = vreinterpretq_s8_u8(vld1q_u8(w + c * CELL + q * QUARTER));
#pragma GCC unroll 24
            for (int i = 0; i < 4 * rows; i++)
                sum[i / 4][i % 4] = vdotq_s32(sum[i / 4][i % 4], codes[i % 4], four(a + i / 4 * STRIDE + 4 * c));
        }
#pragma GCC unroll 24
    for (int i = 0; i < 4 * rows; i++)
        vst1q_s32(acc + i / 4 * acc_row + i % 4 * 4, sum[i / 4][i % 4]);
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
    (void)panels, (void)next_panel;
    int32x4_t sum[4][4];
#pragma GCC unroll 16
    for (int i = 0; i < 4 * rows; i++)
        sum[i / 4][i % 4] = fresh ? vdupq_n_s32(0) : vld1q_s32(acc + i / 4 * acc_row + i % 4 * 4);
    for (int64_t b = 0; b < blocks; b++, a += BLOCK, w += bits * CELL)
#pragma GCC unroll 32
        for (int i = 0; i < 32; i++) {
            int8x16_t codes = cell(w + i % 4 * QUARTER, bits, i / 4);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sum[r][i % 4] = vdotq_s32(sum[r][i % 4], codes, four(a + r * STRIDE + i / 4 * 4));
        }
#pragma GCC unroll 16
    for (int i = 0; i < 4 * rows; i++)
        vst1q_s32(acc + i / 4 * acc_row + i % 4 * 4, sum[i / 4][i % 4]);
}
