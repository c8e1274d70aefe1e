// Products of rows with a packed weight, for processors with AVX-512 or AVX2. An output adds its terms in the order of the
// inputs, whatever rows and columns stand beside it, so a row's bits never depend on the batch.
//
// A weight [out, in] is packed into panels of 32 outputs, panel by panel [in][32] float, or [in / 2][32][2] bfloat16, with
// zeros for outputs that do not exist. A block of up to HEIGHT rows times one panel keeps its sums in registers.
#pragma once
#include "native_math.h"
#include <cstdlib>
#include <immintrin.h>

namespace gemm {

constexpr int64_t WIDTH = 32; // outputs of a panel
template <class T> struct Panel;
template <> struct Panel<float> { typedef float step; };
template <> struct Panel<bf16> { typedef uint32_t step; }; // two inputs at once

#ifdef __AVX512F__
typedef __m512 vec;
constexpr int64_t LANES = 16, HEIGHT = 14, DEPTH = 512; // numbers of a vector; rows and steps of a block
constexpr int64_t GROUP = 1, UNROLLED = 1; // blocks that meet a panel one after the other; steps at once
static inline vec zeros() { return _mm512_setzero_ps(); }
static inline vec each(const char *a, float) { return _mm512_set1_ps(*(const float *)a); }
static inline vec each(const char *a, uint32_t) { return _mm512_castsi512_ps(_mm512_set1_epi32(*(const int *)a)); }
static inline vec take(const float *b) { return _mm512_loadu_ps(b); }
static inline vec take(const uint32_t *b) { return _mm512_castsi512_ps(_mm512_loadu_si512(b)); }
static inline vec dot(vec sum, vec x, vec b, float) { return _mm512_fmadd_ps(x, b, sum); }
static inline vec dot(vec sum, vec x, vec b, uint32_t) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)b);
#else
    return sum;
#endif
}
static inline __mmask16 mask_of(int64_t cols) { return cols >= 16 ? 0xffff : cols > 0 ? (1 << cols) - 1 : 0; }
static inline void put(float *c, vec x, __mmask16 mask) { _mm512_mask_storeu_ps(c, mask, x); }
static inline void put(bf16 *c, vec x, __mmask16 mask) {
#ifdef __AVX512BF16__
    _mm256_mask_storeu_epi16(c, mask, (__m256i)_mm512_cvtneps_pbh(x));
#endif
}
static inline vec get(const float *c, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, c); }
static inline vec get(const bf16 *, __mmask16) { return zeros(); } // sums go on in float only
#else
typedef __m256 vec;
constexpr int64_t LANES = 8, HEIGHT = 6, DEPTH = 256, GROUP = 8, UNROLLED = 4;
static inline vec zeros() { return _mm256_setzero_ps(); }
static inline vec each(const char *a, float) { return _mm256_broadcast_ss((const float *)a); }
static inline vec take(const float *b) { return _mm256_loadu_ps(b); }
static inline vec dot(vec sum, vec x, vec b, float) { return _mm256_fmadd_ps(x, b, sum); }
static inline __m256i mask_of(int64_t cols) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(cols < 8 ? cols : 8), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline void put(float *c, vec x, __m256i mask) { _mm256_maskstore_ps(c, mask, x); }
static inline vec get(const float *c, __m256i mask) { return _mm256_maskload_ps(c, mask); }
// Two bfloat16 numbers in 32 bits: the upper one is a float as it stands, but for its last digits; the lower moves up.
static inline vec each(const char *a, uint32_t) { return _mm256_castsi256_ps(_mm256_set1_epi32(*(const int *)a)); }
static inline vec take(const uint32_t *b) { return _mm256_loadu_ps((const float *)b); }
static inline vec lower(vec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
static inline vec upper(vec x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff0000))); }
static inline vec dot(vec sum, vec x, vec b, uint32_t) {
    return _mm256_fmadd_ps(upper(x), upper(b), _mm256_fmadd_ps(lower(x), lower(b), sum));
}
static inline void put(bf16 *c, vec x, __m256i mask) {
    alignas(32) float numbers[8];
    _mm256_store_ps(numbers, x);
    int count = __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
    for (int i = 0; i < count; i++) c[i] = narrow<bf16>(numbers[i]);
}
static inline vec get(const bf16 *, __m256i) { return zeros(); } // sums go on in float only
#endif

template <class B> constexpr int PARTS = 1; // registers that the numbers of a vector take
template <> constexpr int PARTS<uint32_t> = LANES == 16 ? 1 : 2;

// R rows (of `lda` bytes) times `steps` of a panel; the first `cols` sums go to c, after what is there if they go `on`.
template <int R, class B, class C>
static inline void block(const char *a, int64_t lda, const B *b, int64_t steps, C *c, int64_t ldc, int64_t cols, bool on) {
    constexpr int N = LANES == 16 || R * PARTS<B> > 2 ? 2 : 4; // vectors of a row; there are 16 registers with AVX2
    const char *base[5]; // of every third row: an address has room for twice a stride
    for (int64_t at = 0; at < cols; at += N * LANES, b += N * LANES, c += N * LANES) {
        vec sums[R][N];
        for (int r = 0; r < 5; r++) base[r] = a + 3 * r * lda;
        decltype(mask_of(0)) masks[N];
        for (int n = 0; n < N; n++) masks[n] = mask_of(cols - at - n * LANES);
#pragma GCC unroll 14
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[r][n] = on ? get(c + r * ldc + n * LANES, masks[n]) : zeros();
        const B *step = b;
#pragma GCC unroll UNROLLED
        for (int64_t i = 0; i < steps; i++, step += WIDTH) {
            vec right[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) right[n] = take(step + n * LANES);
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) {
                vec x = each(base[r / 3] + (r % 3) * lda, B());
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sums[r][n] = dot(sums[r][n], x, right[n], B());
            }
#pragma GCC unroll 5
            for (int r = 0; r < 5; r++) base[r] += 4;
        }
#pragma GCC unroll 14
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++)
                if (cols - at > n * LANES) put(c + r * ldc + n * LANES, sums[r][n], masks[n]);
    }
}

template <class B, class C>
static inline void some(int64_t rows, const char *a, int64_t lda, const B *b, int64_t steps, C *c, int64_t ldc, int64_t cols,
                        bool on = false) {
    switch (rows) {
#define ROWS(n)                                                                                                         \
    case n: block<n>(a, lda, b, steps, c, ldc, cols, on); break;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#ifdef __AVX512F__
        ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14)
#endif
#undef ROWS
    }
}

// Blocks of nearly equal height cover m rows.
static inline int64_t height_of(int64_t m, int64_t most = HEIGHT) {
    int64_t blocks = (m + most - 1) / most;
    return m ? (m + blocks - 1) / blocks : 1;
}

static inline int64_t cols_of(int64_t n, int64_t p) { return n - p * WIDTH < WIDTH ? n - p * WIDTH : WIDTH; }

// c [m, n] = a [m, k] times a packed weight. Long sums go on from block to block of steps, in the same order.
template <class T> static void multiply(const T *a, int64_t m, const void *packed, int64_t n, int64_t k, T *c, int threads) {
    auto b = (const typename Panel<T>::step *)packed;
    int64_t steps = k * sizeof(T) / 4, panels = (n + WIDTH - 1) / WIDTH, lda = k * sizeof(T);
    int64_t height = height_of(m);
    if (steps <= 1024 && lda % 2048) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t p = 0; p < panels; p++)
            for (int64_t r = 0; r < m; r += height)
                some(m - r < height ? m - r : height, (const char *)a + r * lda, lda, b + p * WIDTH * steps, steps,
                     c + r * n + p * WIDTH, n, cols_of(n, p));
        return;
    }
    float *sums = sizeof(T) == 4 ? (float *)c : (float *)std::malloc(m * n * sizeof(float));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        constexpr int64_t ROW = DEPTH * 4 + 64; // rows whose addresses share cache sets would push each other out
        alignas(64) char rows[GROUP * HEIGHT * ROW];
        int64_t each = (panels + omp_get_num_threads() - 1) / omp_get_num_threads(), low = omp_get_thread_num() * each;
        int64_t high = low + each < panels ? low + each : panels;
        for (int64_t i = 0; i < steps; i += DEPTH) {
            int64_t count = steps - i < DEPTH ? steps - i : DEPTH;
            for (int64_t r = 0; r < m; r += GROUP * height) {
                int64_t group = m - r < GROUP * height ? m - r : GROUP * height;
                for (int64_t j = 0; j < group; j++)
                    std::memcpy(rows + j * ROW, (const char *)a + (r + j) * lda + i * 4, count * 4);
                for (int64_t p = low; p < high; p++)
                    for (int64_t j = 0; j < group; j += height)
                        some(group - j < height ? group - j : height, rows + j * ROW, ROW, b + (p * steps + i) * WIDTH, count,
                             sums + (r + j) * n + p * WIDTH, n, cols_of(n, p), i > 0);
            }
        }
    }
    if (sizeof(T) == 4) return;
    for (int64_t i = 0; i < m * n; i++) c[i] = narrow<T>(sums[i]);
    std::free(sums);
}

#ifndef __AVX512F__
// Many rows of bfloat16: each panel is widened once, and the same sums in the same order are taken of floats.
static void multiply_widened(const bf16 *a, int64_t m, const uint32_t *b, int64_t n, int64_t k, bf16 *c, int threads) {
    int64_t panels = (n + WIDTH - 1) / WIDTH, height = height_of(m), steps = k / 2;
    int64_t lda = k + 16; // rows whose addresses share cache sets would push each other out
    float *rows = (float *)std::malloc(m * lda * sizeof(float));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *panel = (float *)std::malloc((k + m) * WIDTH * sizeof(float)), *sums = panel + k * WIDTH;
#pragma omp for
        for (int64_t r = 0; r < m; r++)
            for (int64_t i = 0; i < k; i++) rows[r * lda + i] = wide(a[r * k + i]);
#pragma omp for
        for (int64_t p = 0; p < panels; p++) {
            for (int64_t i = 0; i < steps * WIDTH; i += LANES) {
                vec both = take(b + p * steps * WIDTH + i);
                float *to = panel + i / WIDTH * 2 * WIDTH + i % WIDTH;
                _mm256_storeu_ps(to, lower(both)), _mm256_storeu_ps(to + WIDTH, upper(both));
            }
            for (int64_t i = 0; i < k; i += DEPTH)
                for (int64_t r = 0; r < m; r += height)
                    some(m - r < height ? m - r : height, (const char *)(rows + r * lda + i), lda * 4, (const float *)panel + i * WIDTH,
                         k - i < DEPTH ? k - i : DEPTH, sums + r * WIDTH, WIDTH, WIDTH, i > 0);
            for (int64_t r = 0; r < m; r++)
                for (int64_t j = 0; j < cols_of(n, p); j++) c[r * n + p * WIDTH + j] = narrow<bf16>(sums[r * WIDTH + j]);
        }
        std::free(panel);
    }
    std::free(rows);
}
template <> void multiply(const bf16 *a, int64_t m, const void *packed, int64_t n, int64_t k, bf16 *c, int threads) {
    auto b = (const uint32_t *)packed;
    int64_t steps = k / 2, panels = (n + WIDTH - 1) / WIDTH, height = height_of(m, HEIGHT - 2); // more would spill registers
    if (m >= 4 * HEIGHT) return multiply_widened(a, m, b, n, k, c, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t r = 0; r < m; r += height)
            some(m - r < height ? m - r : height, (const char *)(a + r * k), k * 2, b + p * WIDTH * steps, steps, c + r * n + p * WIDTH, n,
                 cols_of(n, p));
}
#endif

#ifdef __AVX512VNNI__
static inline __m512 sized(__m512i sum, const int32_t *zero, const float *scale, float step) {
    __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_loadu_si512(zero)));
    return _mm512_mul_ps(_mm512_mul_ps(whole, _mm512_loadu_ps(scale)), _mm512_set1_ps(step));
}

// Whole numbers: unsigned activations (128 stands for 0), four at a time, times signed weights.
template <int R, class T>
static inline void block_of_bytes(const char *a, int64_t lda, const int32_t *b, int64_t steps, const int32_t *zero, const float *scale,
                                  const float *step, T *c, int64_t ldc, int64_t cols) {
    __m512i sums[R][2];
    const char *base[5];
    for (int r = 0; r < 5; r++) base[r] = a + 3 * r * lda;
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < steps; i++, b += WIDTH) {
        __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            __m512i x = _mm512_set1_epi32(*(const int *)(base[r / 3] + (r % 3) * lda));
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, left);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, right);
        }
#pragma GCC unroll 5
        for (int r = 0; r < 5; r++) base[r] += 4;
    }
    __mmask16 first = mask_of(cols), second = mask_of(cols - 16);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
        put(c + r * ldc, sized(sums[r][0], zero, scale, step[r]), first);
        if (second) put(c + r * ldc + 16, sized(sums[r][1], zero + 16, scale + 16, step[r]), second);
    }
}

// c [m, n] (rows ldc apart) from rounded rows of `wide` bytes each and their steps; `zero` is 128 times a panel's sums.
template <class T>
static void multiply_bytes(const uint8_t *a, const float *step, int64_t m, int64_t wide, const int32_t *b, const int32_t *zero,
                           const float *scale, int64_t n, int64_t steps, T *c, int64_t ldc, int threads) {
    int64_t panels = (n + WIDTH - 1) / WIDTH, height = height_of(m, 10); // more rows spill registers
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t r = 0; r < m; r += height) {
            const char *rows = (const char *)a + r * wide;
            const int32_t *panel = b + p * WIDTH * steps, *none = zero + p * WIDTH;
            const float *size = scale + p * WIDTH;
            T *out = c + r * ldc + p * WIDTH;
            int64_t cols = cols_of(n, p);
            switch (m - r < height ? m - r : height) {
#define ROWS(n)                                                                                                         \
    case n: block_of_bytes<n>(rows, wide, panel, steps, none, size, step + r, out, ldc, cols); break;
                ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13)
                ROWS(14)
#undef ROWS
            }
        }
}
#else
template <class T>
static void multiply_bytes(const uint8_t *, const float *, int64_t, int64_t, const int32_t *, const int32_t *, const float *, int64_t,
                           int64_t, T *, int64_t, int) {}
#endif

// `weight [n, k]`, whose element (j, i) lies at j * row + i * column, into panels; k odd is filled up with a zero.
template <class T> static void pack(const T *weight, int64_t n, int64_t k, int64_t row, int64_t column, T *b) {
    constexpr int64_t PAIR = 4 / sizeof(T);
    for (int64_t first = 0; first < n; first += WIDTH)
        for (int64_t i = 0; i < k; i += PAIR)
            for (int64_t j = first; j < first + WIDTH; j++)
                for (int64_t h = i; h < i + PAIR; h++) *b++ = j < n && h < k ? weight[j * row + h * column] : narrow<T>(0);
}

// Softmax attention of one sequence: q [tokens, heads, dim], k, v [keys, groups, dim], out like q. Query t sees the keys
// spans[2t] .. spans[2t + 1] - 1, or all. Sums run over keys in their order, so what is not seen changes no bit.
template <class T>
static void attention(const T *q, const T *k, const T *v, int64_t tokens, int64_t heads, int64_t groups, int64_t dim, int64_t keys,
                      const int64_t *spans, T *out, int threads) {
    typedef typename Panel<T>::step B;
    constexpr int64_t PAIR = 4 / sizeof(T);
    int64_t wide = (keys + WIDTH - 1) / WIDTH * WIDTH, deep = (dim + WIDTH - 1) / WIDTH * WIDTH;
    int64_t key_size = wide * dim, value_size = deep * ((keys + 1) / PAIR * PAIR + PAIR);
    T *packed = (T *)std::malloc(groups * (key_size + value_size) * sizeof(T));
    int64_t blocks = (tokens + HEIGHT - 1) / HEIGHT, row = wide + 64 / sizeof(T), narrow_row = dim + 64 / sizeof(T);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        T *scores = (T *)std::malloc(HEIGHT * (row + narrow_row) * sizeof(T) + wide * 4), *some_q = scores + HEIGHT * row;
        float *keep = (float *)(some_q + HEIGHT * narrow_row);
#pragma omp for
        for (int64_t g = 0; g < groups; g++) {
            pack(k + g * dim, keys, dim, groups * dim, (int64_t)1, packed + g * (key_size + value_size));
            pack(v + g * dim, dim, keys, (int64_t)1, groups * dim, packed + g * (key_size + value_size) + key_size);
        }
#pragma omp for collapse(2)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t n = 0; n < blocks; n++) {
                int64_t start = n * HEIGHT, rows = tokens - start < HEIGHT ? tokens - start : HEIGHT, low = 0, high = keys;
                const T *pk = packed + h / (heads / groups) * (key_size + value_size), *pv = pk + key_size;
                for (int64_t r = 0; r < rows; r++)
                    std::memcpy(some_q + r * narrow_row, q + ((start + r) * heads + h) * dim, dim * sizeof(T));
                if (spans) {
                    low = keys, high = 0;
                    for (int64_t t = start; t < start + rows; t++) {
                        low = spans[2 * t] < low ? spans[2 * t] : low;
                        high = spans[2 * t + 1] > high ? spans[2 * t + 1] : high;
                    }
                    low = low / WIDTH * WIDTH;
                }
                for (int64_t c = low; c < high; c += WIDTH)
                    some(rows, (const char *)some_q, narrow_row * sizeof(T), (const B *)(pk + c * dim), dim / PAIR, scores + c,
                         row, WIDTH);
                int64_t end = (high + PAIR - 1) / PAIR * PAIR;
                for (int64_t r = 0; r < rows; r++) {
                    int64_t a = spans ? spans[2 * (start + r)] : 0, b = spans ? spans[2 * (start + r) + 1] : keys;
                    T *x = scores + r * row;
                    for (int64_t i = low; i < a; i++) x[i] = narrow<T>(-INFINITY);
                    for (int64_t i = b; i < end; i++) x[i] = narrow<T>(-INFINITY);
                    softmax_row(x + low, end - low, keep);
                }
                for (int64_t c = 0; c < dim; c += WIDTH)
                    some(rows, (const char *)(scores + low), row * sizeof(T), (const B *)(pv + c * ((keys + PAIR - 1) / PAIR * PAIR) + low * WIDTH),
                         (end - low) / PAIR, out + (start * heads + h) * dim + c, heads * dim, dim - c < WIDTH ? dim - c : WIDTH);
            }
        std::free(scores);
    }
    std::free(packed);
}

} // namespace gemm
