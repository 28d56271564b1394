/* What a core can do at most, for benchmarks/kernels.py: products of bytes in registers alone, and a read of memory. */
#include <stdint.h>
#if defined(BITSMITH_AVX512VNNI) || defined(BITSMITH_AVXVNNI) || defined(BITSMITH_AVX2)
#include <immintrin.h>
#endif

enum { CHAINS = 12, TURN = 8, STREAMS = 4 };

static volatile int32_t sink;

/* Multiplications and additions done; bits: of the weights, which matter on AVX2 (micro_avx2.h). */
int64_t bitsmith_peak(int64_t rounds, int64_t bits) {
#if defined(BITSMITH_AVX512VNNI)
    __m512i sum[CHAINS], w = _mm512_set1_epi8((char)rounds), x = _mm512_set1_epi8((char)bits);
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
        sum[i] = _mm512_set1_epi32(i);
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 96
        for (int i = 0; i < TURN * CHAINS; i++)
            sum[i % CHAINS] = _mm512_dpbusd_epi32(sum[i % CHAINS], w, x);
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
        sink += _mm512_reduce_add_epi32(sum[i]);
    return rounds * TURN * CHAINS * 128;
#elif defined(BITSMITH_AVXVNNI) || defined(BITSMITH_AVX2)
    __m256i sum[CHAINS], w = _mm256_set1_epi8((char)rounds), x = _mm256_set1_epi8((char)bits);
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
        sum[i] = _mm256_set1_epi32(i);
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 96
        for (int i = 0; i < TURN * CHAINS; i++) {
#if defined(BITSMITH_AVXVNNI)
            sum[i % CHAINS] = _mm256_dpbusd_avx_epi32(sum[i % CHAINS], w, x);
#else
            __asm__ volatile("" : "+x"(w));   /* the product is made anew each time */
            sum[i % CHAINS] = bits == 8 ? _mm256_add_epi32(sum[i % CHAINS], _mm256_madd_epi16(w, x))
                                        : _mm256_add_epi16(sum[i % CHAINS], _mm256_maddubs_epi16(w, x));
#endif
        }
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++)
        sink += _mm256_extract_epi32(sum[i], 0);
#if defined(BITSMITH_AVX2)
    return rounds * TURN * CHAINS * (bits == 8 ? 32 : 64);
#else
    return rounds * TURN * CHAINS * 64;
#endif
#else
    int32_t sum = 0;
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+r"(bits));
        sum += (int32_t)(bits * bits);
    }
    sink += sum;
    return rounds * 2;
#endif
}

/* Reads bytes (a multiple of 1024) as a few streams. */
void bitsmith_read(const uint8_t *from, int64_t bytes) {
    uint64_t sum[STREAMS][8] = {{0}};
    int64_t part = bytes / STREAMS;
    for (int64_t at = 0; at < part; at += 64)
        for (int s = 0; s < STREAMS; s++) {
            const uint64_t *p = (const uint64_t *)(from + s * part + at);
            __builtin_prefetch((const char *)p + 2048);
            for (int i = 0; i < 8; i++)
                sum[s][i] += p[i];
        }
    for (int s = 0; s < STREAMS; s++)
        for (int i = 0; i < 8; i++)
            sink += (int32_t)sum[s][i];
}
