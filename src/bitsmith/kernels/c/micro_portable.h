/* Products of cells in plain C, for processors that have no file of their own. */

enum { TILE_ROWS = 4, TILE_PANELS = 1, VECTOR_ROWS = 0, VECTOR_PANELS = 1, BYTE_BIAS = 0, WIDE_BITS = 9, DIRECT_BITS = 8 };

/* Byte `at` of cell c of the block at p. */
INLINE uint8_t code_of(const uint8_t *p, const int bits, const int c, const int at) {
    int code = 0, shift = 0;
    for (int plane = 8; plane; plane /= 2) {
        if (!(bits & plane))
            continue;
        int each = 8 / plane;
        code |= (p[c / each * CELL + at] >> (c % each * plane) & ((1 << plane) - 1)) << shift;
        p += plane * CELL, shift += plane;
    }
    return (uint8_t)code;
}

INLINE void unpack_width(const int bits, const uint8_t *from, int64_t blocks, uint8_t *to) {
    for (int64_t b = 0; b < blocks; b++, from += bits * CELL, to += 8 * CELL)
        for (int c = 0; c < 8; c++)
            for (int i = 0; i < CELL; i++)
                to[c * CELL + i] = code_of(from, bits, c, i);
}

static void tile(int bits, int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel, int64_t blocks,
                 int fresh, int32_t *acc, int64_t acc_row) {
    (void)bits, (void)panels, (void)next_panel;
    for (int r = 0; r < rows; r++, a += STRIDE, acc += acc_row) {
        if (fresh)
            memset(acc, 0, PANEL * sizeof *acc);
        for (int64_t c = 0; c < 8 * blocks; c++)
            for (int j = 0; j < PANEL; j++)
                for (int i = 0; i < 4; i++)
                    acc[j] += w[c * CELL + 4 * j + i] * a[4 * c + i];
    }
}

INLINE void vector_shape(const int bits, const int rows, const int panels, const int8_t *a, const uint8_t *w,
                         int64_t next_panel, int64_t blocks, int fresh, int32_t *acc, int64_t acc_row) {
    (void)bits, (void)rows, (void)panels, (void)a, (void)w, (void)next_panel, (void)blocks, (void)fresh, (void)acc;
    (void)acc_row;   /* never called: VECTOR_ROWS is 0 */
}
