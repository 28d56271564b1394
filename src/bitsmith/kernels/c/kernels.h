/* What every file of the library shares: the layout of packed weights and the operands of a product.

   A panel is 16 output channels. Its inputs come in blocks of 32, a block in 8 cells of 4 inputs x 16 channels:
   64 bytes, byte 4 j + i of which is input i of channel j. A block of b-bit codes takes b vectors of 64 bytes:
   planes of 8, 4, 2 or 1 bits, so that one shift and one mask give a cell (micro_*.h). Each group of inputs is
   padded to whole blocks, the last panel to 16 channels.
   The products are of unsigned codes (of weights) and signed bytes (activations), as vpdpbusd and vpmaddubsw
   take them; what that shifts is put right by sums of rows and columns (gemm.c). */
#ifndef BITSMITH_KERNELS_H
#define BITSMITH_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    PANEL = 16,           /* channels of a panel */
    BLOCK = 32,           /* inputs of a block */
    CELL = 64,            /* bytes of a cell: 4 inputs of 16 channels */
    CHUNK = 512,          /* inputs that are multiplied at once: 8 KB of unpacked panel, four of which fit in L1 */
    STRIDE = CHUNK + 64   /* between packed rows; a power of two would fall on one set of the cache */
};

enum { INT8 = 0, UINT8 = 1, NIBBLES = 2 };                      /* activations */
enum { SUMS = 0, FLOATS = 1, CODES = 2, CODE_NIBBLES = 3 };     /* results */

/* How rows of a matrix come from an image (batch, height, width, channels): input k = (tap y, tap x, channel) of
   row (b, y, x) is the pixel (y * up + tap * dilation + shift) / down, or `empty` off the image and off its grid. */
typedef struct {
    int64_t height, width, channels, pixel;   /* of the image; bytes from pixel to pixel */
    int64_t rows, columns;                    /* of the result */
    int64_t taps_y, taps_x;
    int64_t up_y, up_x, down_y, down_x, tap_y, tap_x, shift_y, shift_x;
    int64_t empty;
} image;

/* out (m, n) = epilogue of  sum over k of a (m, k) w (n, k), exact in int32. With u the stored code of w, w stands
   for u * factor + offset, and a for its code minus a zero point. Arrays by channel and group are (panel, group, 16).
       SUMS    the integers, added to out where `accumulate`
       FLOATS  (sum over groups of integer * scale) * row_scale + bias, in this order
       CODES   clamp(round(float / out_scale - out_half) + out_zero, out_low, out_high), int8
       CODE_NIBBLES  the same minus out_low, two in a byte, the even channel in the low half */
typedef struct {
    int64_t m, n, k, group;                   /* group: inputs that share a scale; k for one group */
    const uint8_t *a;
    int64_t a_row, a_column;                  /* bytes from row to row and from input to input */
    int64_t a_kind, a_low;                    /* a_low is added to nibbles */
    const image *picture;                     /* or NULL */
    const uint8_t *w;
    int64_t bits, factor, low;                /* low: the offset of all, where `offset` is NULL */
    const int32_t *offset, *column_sum;       /* of w; NULL: not needed */
    const float *scale, *row_scale, *bias;    /* row_scale and bias may be NULL */
    const int32_t *row_zero;                  /* zero point of each row, or NULL for `zero` */
    int64_t zero, out_kind, accumulate;
    void *out;
    int64_t out_row;                          /* elements (nibbles: bytes) from row to row */
    float out_scale, out_half;
    int64_t out_zero, out_low, out_high, threads;
} product;

/* The stored inputs: k with each group padded to whole blocks. */
INLINE int64_t padded(int64_t k, int64_t group) {
    int64_t whole = (group + BLOCK - 1) / BLOCK * BLOCK, rest = k % group;
    return k / group * whole + (rest + BLOCK - 1) / BLOCK * BLOCK;
}

INLINE int64_t minimum(int64_t x, int64_t y) { return x < y ? x : y; }
INLINE int64_t maximum(int64_t x, int64_t y) { return x > y ? x : y; }

INLINE int32_t word(const void *p) {          /* four bytes, wherever they lie */
    int32_t value;
    memcpy(&value, p, 4);
    return value;
}

INLINE float clamped(float x, float low, float high) {
    x = x > low ? x : low;     /* a NaN becomes low */
    return x < high ? x : high;
}

/* Noise in [0, 1) of element i: bitsmith.numerics.rounding.hash_uniform. */
INLINE float noise(uint32_t seed, uint32_t i) {
    uint32_t h = i * 2654435761u + seed;
    h = (h ^ h >> 16) * 2246822507u;
    h = (h ^ h >> 13) * 3266489909u;
    return (float)(int32_t)((h ^ h >> 16) >> 8) * 0x1p-24f;
}

void image_row(const image *p, const uint8_t *from, int64_t row, uint8_t *to);
void team(void (*work)(void *), void *data, int64_t threads);
int64_t draw(int64_t *next);                  /* *next++, by several threads */

#endif
