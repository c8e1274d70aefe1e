// The two loops over logits that the vocabulary pass spends its time in. With AVX-512 by hand: a compiler neither drops the
// division nor keeps the sums in registers.
#pragma once
#include "native_math.h"

#ifdef __AVX512F__
#include <immintrin.h>

static inline __m512 load_(const float *x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
static inline __m512 load_(const bf16 *x, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
static inline void store_(float *x, __m512 value, __mmask16 mask) { _mm512_mask_storeu_ps(x, mask, value); }
static inline void store_(bf16 *x, __m512 value, __mmask16 mask) {
    __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    _mm256_mask_storeu_epi16(x, mask, _mm512_cvtepi32_epi16(bits));
}

// As `exp_parts`, sixteen at a time: exp(x) = 2^n (1 + p).
static inline __m512 exp_parts(__m512 x, __m512 &n) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x), q = _mm512_set1_ps(1.0f / 5040);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f / 720));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f / 120));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f / 24));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f / 6));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(_mm512_mul_ps(q, r), r, r);
}

// z = outside tanh(inside l); the highest.
template <class T> static inline float cap_row(const T *l, int64_t n, float inside, float outside, float *z) {
    __m512 top = _mm512_set1_ps(-INFINITY), one = _mm512_set1_ps(1), two = _mm512_set1_ps(2);
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = n - i >= 16 ? 0xffff : (1 << (n - i)) - 1;
        __m512 x = _mm512_mul_ps(load_(l + i, mask), _mm512_set1_ps(2 * inside)), e;
        __m512 p = exp_parts(x, e), s = _mm512_scalef_ps(one, e);
        __m512 less = _mm512_fmadd_ps(s, p, _mm512_sub_ps(s, one)), more = _mm512_add_ps(less, two);
        __m512 y = _mm512_rcp14_ps(more); // twice refined: as good as a division
        y = _mm512_fmadd_ps(y, _mm512_fnmadd_ps(more, y, one), y);
        y = _mm512_fmadd_ps(y, _mm512_fnmadd_ps(more, y, one), y);
        x = _mm512_mul_ps(_mm512_mul_ps(less, y), _mm512_set1_ps(outside));
        top = _mm512_mask_max_ps(top, mask, top, x);
        _mm512_mask_storeu_ps(z + i, mask, x);
    }
    return _mm512_reduce_max_ps(top);
}

// below = z - peak, exps = exp(below), also into probs; their sum, and the sum of exps below.
template <class T>
static inline void weigh(const float *z, int64_t n, float peak, float *below, float *exps, T *probs, float &sum, float &moment) {
    __m512 sums = _mm512_setzero_ps(), moments = sums;
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = n - i >= 16 ? 0xffff : (1 << (n - i)) - 1;
        __m512 d = _mm512_maskz_sub_ps(mask, load_(z + i, mask), _mm512_set1_ps(peak)), e;
        __m512 p = exp_parts(d, e);
        __mmask16 alive = mask & _mm512_cmp_ps_mask(d, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
        __m512 value = _mm512_maskz_scalef_ps(alive, _mm512_add_ps(p, _mm512_set1_ps(1)), e);
        sums = _mm512_add_ps(sums, value), moments = _mm512_fmadd_ps(value, d, moments);
        _mm512_mask_storeu_ps(below + i, mask, d), _mm512_mask_storeu_ps(exps + i, mask, value);
        store_(probs + i, value, mask);
    }
    sum = _mm512_reduce_add_ps(sums), moment = _mm512_reduce_add_ps(moments);
}
#else
template <class T> static inline float cap_row(const T *l, int64_t n, float inside, float outside, float *z) {
    EACH_ALONE
    for (int64_t i = 0; i < n; i++) z[i] = tanh_(wide(l[i]) * inside) * outside;
    return highest(z, n);
}
template <class T>
static inline void weigh(const float *z, int64_t n, float peak, float *below, float *exps, T *probs, float &sum, float &moment) {
    EACH_ALONE
    for (int64_t i = 0; i < n; i++) {
        below[i] = z[i] - peak, exps[i] = exp_(below[i]);
        probs[i] = narrow<T>(exps[i]);
    }
    sum = total(n, [=](int64_t i) { return exps[i]; });
    moment = total(n, [=](int64_t i) { return exps[i] * below[i]; });
}
#endif
