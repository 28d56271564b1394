/* Rows of a convolution's matrix, taken from the image as they are needed. Forward and the gradient of the input
   differ in the numbers of `image` only; the gradient of the weights reads the same rows. */
#include "kernels.h"

void image_row(const image *p, const uint8_t *from, int64_t row, uint8_t *to) {
    int64_t x = row % p->columns, y = row / p->columns % p->rows, b = row / (p->columns * p->rows);
    for (int64_t i = 0; i < p->taps_y; i++) {
        int64_t v = y * p->up_y + i * p->tap_y + p->shift_y;
        int inside = v >= 0 && v % p->down_y == 0 && v / p->down_y < p->height;
        for (int64_t j = 0; j < p->taps_x; j++, to += p->channels) {
            int64_t u = x * p->up_x + j * p->tap_x + p->shift_x;
            if (inside && u >= 0 && u % p->down_x == 0 && u / p->down_x < p->width)
                memcpy(to, from + ((b * p->height + v / p->down_y) * p->width + u / p->down_x) * p->pixel, p->channels);
            else
                memset(to, (int)p->empty, p->channels);
        }
    }
}

/* Rows [first, first + count) as a matrix. */
void bitsmith_rows(const image *p, const uint8_t *from, int64_t first, int64_t count, uint8_t *to) {
    int64_t size = p->taps_y * p->taps_x * p->channels;
    for (int64_t r = 0; r < count; r++)
        image_row(p, from, first + r, to + r * size);
}
