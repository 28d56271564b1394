/* Cells in vectors of 256 bits: half h of cell c holds channels 8 h to 8 h + 7. */
#include <immintrin.h>

enum { HALF = CELL / 2 };

INLINE __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void save(void *p, __m256i v) { _mm256_storeu_si256((__m256i *)p, v); }

/* The bits [from, from + count) of each byte of v, moved to [to, to + count). */
INLINE __m256i field(__m256i v, const int from, const int count, const int to) {
    __m256i moved = from > to ? _mm256_srli_epi16(v, from - to) : to > from ? _mm256_slli_epi16(v, to - from) : v;
    return _mm256_and_si256(moved, _mm256_set1_epi8((char)(((1 << count) - 1) << to)));
}

/* Cell c of 0..7 of the block at p, whose address is of the half wanted. */
INLINE __m256i cell(const uint8_t *p, const int bits, const int c) {
    if (bits == 8)
        return load(p + c * CELL);
    __m256i code = _mm256_setzero_si256();
    int at = 0;
    if (bits & 4) {
        code = field(load(p + c / 2 * CELL), c % 2 * 4, 4, 0);
        p += 4 * CELL, at = 4;
    }
    if (bits & 2) {
        code = _mm256_or_si256(code, field(load(p + c / 4 * CELL), c % 4 * 2, 2, at));
        p += 2 * CELL, at += 2;
    }
    if (bits & 1)
        code = _mm256_or_si256(code, field(load(p), c, 1, at));
    return code;
}

INLINE void fetch_ahead(const uint8_t *w, const int vectors) {
    enum { AHEAD = 2048 };
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++)
        _mm_prefetch((const char *)w + v * CELL + AHEAD, _MM_HINT_T0);
}
