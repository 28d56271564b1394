/* Codes to the layout of kernels.h, and back. */
#include "kernels.h"

typedef struct {
    const uint8_t *from;
    int64_t row, column;       /* bytes from channel to channel and from input to input */
    int64_t n, k, group, bits, flip;
    uint8_t *to;
    int32_t *sums;             /* (panel, group, 16) of codes */
    int64_t next;
} packing;

/* A block of 32 inputs x 16 channels as eight cells of a word a channel, four inputs each (the machine is little-endian,
   or the self-test fails). This is a matter of speed: weights and activations that train are packed in each step. */
typedef uint32_t cells[8][PANEL];

static void whole_inputs(const uint8_t *from, int64_t row, uint32_t flip, cells to) {   /* that lie side by side */
    for (int c = 0; c < 8; c++)
        for (int j = 0; j < PANEL; j++)
            to[c][j] = (uint32_t)word(from + j * row + 4 * c) ^ flip;
}

static void whole_channels(const uint8_t *from, int64_t column, uint32_t flip, cells to) {
    for (int c = 0; c < 8; c++) {
        const uint8_t *x = from + 4 * c * column;
        for (int j = 0; j < PANEL; j++)
            to[c][j] = ((uint32_t)x[j] | (uint32_t)x[j + column] << 8 | (uint32_t)x[j + 2 * column] << 16
                        | (uint32_t)x[j + 3 * column] << 24) ^ flip;
    }
}

static void some(const packing *p, const uint8_t *from, int64_t channels, int64_t inputs, cells to) {
    memset(to, 0, sizeof(cells));
    for (int64_t j = 0; j < channels; j++)
        for (int64_t i = 0; i < inputs; i++)
            to[i / 4][j] |= (uint32_t)(uint8_t)(from[j * p->row + i * p->column] ^ p->flip) << i % 4 * 8;
}

/* Planes of 8, 4, 2 and 1 bits, so that one shift and one mask give a cell. */
static void write_block(cells code, int bits, uint8_t *to) {
    int at = 0;
    for (int plane = 8; plane; plane /= 2) {
        if (!(bits & plane))
            continue;
        const int each = 8 / plane;         /* cells in a vector */
        const uint32_t mask = ((1u << plane) - 1) * 0x01010101u;
        for (int c = 0; c < 8; c += each, to += CELL) {
            uint32_t made[PANEL] = {0};
            for (int e = 0; e < each; e++)
                for (int j = 0; j < PANEL; j++)
                    made[j] |= (code[c + e][j] >> at & mask) << e * plane;
            memcpy(to, made, CELL);
        }
        at += plane;
    }
}

static void pack_panels(void *data) {
    packing *p = data;
    int64_t groups = maximum(1, (p->k + p->group - 1) / p->group);
    int64_t stored = padded(p->k, p->group);
    const uint32_t flip = (uint32_t)p->flip * 0x01010101u;
    for (int64_t panel; (panel = draw(&p->next)) * PANEL < p->n;) {
        int64_t channels = minimum(PANEL, p->n - panel * PANEL);
        uint8_t *to = p->to + panel * (stored / BLOCK) * p->bits * CELL;
        for (int64_t g = 0; g < groups; g++) {
            int32_t sum[PANEL] = {0};
            int64_t end = minimum((g + 1) * p->group, p->k);
            for (int64_t k = g * p->group; k < end; k += BLOCK, to += p->bits * CELL) {
                cells code;
                const uint8_t *from = p->from + panel * PANEL * p->row + k * p->column;
                int64_t inputs = minimum(BLOCK, end - k);
                const int whole = inputs == BLOCK && channels == PANEL;
                if (whole && p->column == 1)
                    whole_inputs(from, p->row, flip, code);
                else if (whole && p->row == 1)
                    whole_channels(from, p->column, flip, code);
                else
                    some(p, from, channels, inputs, code);
                for (int c = 0; c < 8; c++)
                    for (int j = 0; j < PANEL; j++)
                        sum[j] += (int32_t)((code[c][j] & 255) + (code[c][j] >> 8 & 255) + (code[c][j] >> 16 & 255)
                                            + (code[c][j] >> 24));
                write_block(code, (int)p->bits, to);
            }
            memcpy(p->sums + (panel * groups + g) * PANEL, sum, sizeof sum);
        }
    }
}

/* Bytes that n x k codes take. */
int64_t bitsmith_packed_bytes(int64_t n, int64_t k, int64_t group, int64_t bits) {
    return (n + PANEL - 1) / PANEL * (padded(k, group) / BLOCK) * bits * CELL;
}

/* Unsigned codes (n, k), one a byte, xor `flip` (0x80 makes signed bytes codes from 0), packed at `bits`. */
void bitsmith_pack(const uint8_t *from, int64_t row, int64_t column, int64_t n, int64_t k, int64_t group, int64_t bits,
                   int64_t flip, uint8_t *to, int32_t *sums, int64_t threads) {
    packing p = {from, row, column, n, k, group, bits, flip, to, sums, 0};
    team(pack_panels, &p, minimum(threads, (n + PANEL - 1) / PANEL));
}

/* The inverse: (n, k) codes, one a byte. */
void bitsmith_unpack(const uint8_t *from, int64_t n, int64_t k, int64_t group, int64_t bits, uint8_t *to) {
    int64_t whole = padded(group, group), blocks = padded(k, group) / BLOCK;
    for (int64_t channel = 0; channel < n; channel++)
        for (int64_t input = 0; input < k; input++) {
            int64_t at = input / group * whole + input % group, c = at % BLOCK / 4;
            int64_t byte = channel % PANEL * 4 + at % 4, code = 0, shift = 0;
            const uint8_t *block = from + (channel / PANEL * blocks + at / BLOCK) * bits * CELL;
            for (int64_t plane = 8; plane; plane /= 2) {
                if (!(bits & plane))
                    continue;
                int64_t each = 8 / plane;
                code |= (int64_t)(block[c / each * CELL + byte] >> (c % each * plane) & ((1 << plane) - 1)) << shift;
                block += plane * CELL, shift += plane;
            }
            to[channel * k + input] = (uint8_t)code;
        }
}

/* `count` codes of the native format's dense bit stream, the first at bit `start`: one a byte, counted from 0. Widths
   that divide a byte go byte by byte, which becomes vectors. */
void bitsmith_decode(const uint8_t *stream, int64_t bytes, int64_t start, int64_t bits, int64_t count, uint8_t *to) {
    int64_t done = 0;
    if (start % 8 == 0 && 8 % bits == 0) {
        const uint8_t *restrict from = stream + start / 8;
        uint8_t *restrict out = to;
        const int64_t whole = count * bits / 8;
        if (bits == 8)
            memcpy(out, from, (size_t)whole);
        else if (bits == 4)
            for (int64_t i = 0; i < whole; i++) {
                out[2 * i] = from[i] & 15;
                out[2 * i + 1] = from[i] >> 4;
            }
        else if (bits == 2)
            for (int64_t i = 0; i < whole; i++)
                for (int64_t j = 0; j < 4; j++)
                    out[4 * i + j] = from[i] >> 2 * j & 3;
        else
            for (int64_t i = 0; i < whole; i++)
                for (int64_t j = 0; j < 8; j++)
                    out[8 * i + j] = from[i] >> j & 1;
        done = whole * 8 / bits;
    }
    for (int64_t i = done, bit = start + done * bits; i < count; i++, bit += bits) {
        int64_t byte = bit / 8, pair = stream[byte] | (byte + 1 < bytes ? stream[byte + 1] << 8 : 0);
        to[i] = (uint8_t)(pair >> bit % 8 & ((1 << bits) - 1));
    }
}

/* The inverse from a whole byte on: `to` takes (count * bits + 7) / 8 bytes, what is left of the last one is 0. */
void bitsmith_encode(const uint8_t *codes, int64_t count, int64_t bits, uint8_t *to) {
    int64_t done = 0, whole = count * bits / 8;
    const uint8_t *restrict from = codes;
    uint8_t *restrict out = to;
    if (bits == 8) {
        memcpy(out, from, (size_t)count);
        return;
    }
    if (bits == 4) {
        for (int64_t i = 0; i < whole; i++)
            out[i] = (uint8_t)(from[2 * i] | from[2 * i + 1] << 4);
        done = 2 * whole;
    } else if (bits == 2) {
        for (int64_t i = 0; i < whole; i++)
            out[i] = (uint8_t)(from[4 * i] | from[4 * i + 1] << 2 | from[4 * i + 2] << 4 | from[4 * i + 3] << 6);
        done = 4 * whole;
    }
    memset(out + done * bits / 8, 0, (size_t)((count * bits + 7) / 8 - done * bits / 8));
    for (int64_t i = done, bit = done * bits; i < count; i++, bit += bits) {
        int64_t byte = bit / 8, shift = bit % 8;
        out[byte] |= (uint8_t)(from[i] << shift);
        if (shift + bits > 8)
            out[byte + 1] |= (uint8_t)(from[i] >> (8 - shift));
    }
}
