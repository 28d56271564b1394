/* From a width known at run time to code made for it: the micro-kernels take `bits`, `rows` and `panels` as
   constants (they are inlined), and here is the only place that lists the widths. */

static void unpack(int bits, const uint8_t *from, int64_t blocks, uint8_t *to) {
    switch (bits) {
    case 1: unpack_width(1, from, blocks, to); break;
    case 2: unpack_width(2, from, blocks, to); break;
    case 3: unpack_width(3, from, blocks, to); break;
    case 4: unpack_width(4, from, blocks, to); break;
    case 5: unpack_width(5, from, blocks, to); break;
    case 6: unpack_width(6, from, blocks, to); break;
    case 7: unpack_width(7, from, blocks, to); break;
    default: unpack_width(8, from, blocks, to);
    }
}

INLINE void vector_width(const int bits, int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel,
                         int64_t blocks, int fresh, int32_t *acc, int64_t acc_row) {
    for (int p = 0; p < panels;) {
        const uint8_t *at = w + p * next_panel;
        int32_t *to = acc + p * PANEL;
        int step = panels - p >= VECTOR_PANELS && rows <= 2 ? VECTOR_PANELS : 1;
        if (rows == 1 && step > 1)
            vector_shape(bits, 1, VECTOR_PANELS, a, at, next_panel, blocks, fresh, to, acc_row);
        else if (rows == 1)
            vector_shape(bits, 1, 1, a, at, next_panel, blocks, fresh, to, acc_row);
        else if (rows == 2 && step > 1)
            vector_shape(bits, 2, VECTOR_PANELS, a, at, next_panel, blocks, fresh, to, acc_row);
        else if (rows == 2)
            vector_shape(bits, 2, 1, a, at, next_panel, blocks, fresh, to, acc_row);
        else if (rows == 3)
            vector_shape(bits, 3, 1, a, at, next_panel, blocks, fresh, to, acc_row);
        else
            vector_shape(bits, 4, 1, a, at, next_panel, blocks, fresh, to, acc_row);
        p += step;
    }
}

static void vector(int bits, int rows, int panels, const int8_t *a, const uint8_t *w, int64_t next_panel, int64_t blocks,
                   int fresh, int32_t *acc, int64_t acc_row) {
    switch (bits) {
    case 1: vector_width(1, rows, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 2: vector_width(2, rows, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 3: vector_width(3, rows, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 4: vector_width(4, rows, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 5: vector_width(5, rows, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 6: vector_width(6, rows, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    case 7: vector_width(7, rows, panels, a, w, next_panel, blocks, fresh, acc, acc_row); break;
    default: vector_width(8, rows, panels, a, w, next_panel, blocks, fresh, acc, acc_row);
    }
}
