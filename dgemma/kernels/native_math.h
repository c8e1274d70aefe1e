// Numbers and rows of numbers: bfloat16, exponentials, sums in a fixed order, the norm and the softmax of a row.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

// Arrays of one call never overlap, but where an op says that it works in place.
#define EACH_ALONE _Pragma("GCC ivdep")

struct bf16 {
    uint16_t bits;
};

static inline float wide(float x) { return x; }
static inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
template <class T> static inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits += 0x7fff + ((bits >> 16) & 1); // to nearest, ties to even; activations are finite
    return {uint16_t(bits >> 16)};
}
template <class T> static inline float round_(float x) { return wide(narrow<T>(x)); }

// exp(x) - 1 = s * p + (s - 1) with x = n ln 2 + r, s = 2^n, p = exp(r) - 1 as a polynomial; x in [-87, 88].
static inline void exp_parts(float x, float &s, float &p) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float q = 1.0f / 5040;
    q = q * r + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    q = q * r + 0.5f;
    p = q * r * r + r;
    int32_t bits = (int32_t(n) + 127) << 23;
    std::memcpy(&s, &bits, 4);
}
static inline float exp_(float x) { // 0 below -87, so that what is masked is nothing
    float s, p;
    exp_parts(x, s, p);
    return x < -87.0f ? 0.0f : s * p + s;
}
static inline float tanh_(float x) {
    float s, p;
    exp_parts(2 * x, s, p);
    float less = s * p + (s - 1); // exp(2x) - 1, exact for small x too
    return less / (less + 2);
}
static inline float gelu_(float x) { // tanh form: x (1 + tanh u) / 2 = x / (1 + exp(-2u))
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1 + exp_(-2 * u));
}

// f(0) + .. + f(n - 1). Element i always adds to lane i mod 32, so zeros at the end change no bit.
template <class F> static inline float total(int64_t n, F f) {
    float lanes[32] = {0};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; j++) lanes[j] += f(i + j);
    for (int j = 0; i + j < n; j++) lanes[j] += f(i + j);
    for (int step = 16; step; step /= 2)
        for (int j = 0; j < step; j++) lanes[j] += lanes[j + step];
    return *lanes;
}
template <class T> static inline float highest(const T *x, int64_t n) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = wide(x[i]) > top ? wide(x[i]) : top;
    return top;
}

static inline int64_t first_of(const float *x, int64_t n, float value) {
    int64_t at = 0;
    for (int found = 0; at + 64 <= n; at += 64) {
        for (int j = 0; j < 64; j++) found |= x[at + j] == value;
        if (found) break;
    }
    while (x[at] != value) at++;
    return at;
}

// 1 / sqrt(mean(x^2) + eps)
template <class T> static inline float inverse(const T *x, int64_t n, float eps) {
    return 1.0f / std::sqrt(total(n, [=](int64_t i) { return wide(x[i]) * wide(x[i]); }) / n + eps);
}
template <class T> static inline void norm_row(const T *x, const T *w, float eps, int64_t n, T *out) {
    float scale = inverse(x, n, eps);
    if (w)
        EACH_ALONE for (int64_t i = 0; i < n; i++) out[i] = narrow<T>(wide(x[i]) * scale * wide(w[i]));
    else
        EACH_ALONE for (int64_t i = 0; i < n; i++) out[i] = narrow<T>(wide(x[i]) * scale);
}

// Softmax of n entries, in place; -inf becomes exactly 0. `keep` has room for n floats; without it exponentials are taken
// twice, which gives the same bits.
template <class T> static inline void softmax_row(T *row, int64_t n, float *keep) {
    float top = highest(row, n);
    if (keep) {
        EACH_ALONE for (int64_t i = 0; i < n; i++) keep[i] = exp_(wide(row[i]) - top);
        float scale = 1 / total(n, [=](int64_t i) { return keep[i]; });
        EACH_ALONE for (int64_t i = 0; i < n; i++) row[i] = narrow<T>(keep[i] * scale);
    } else {
        float scale = 1 / total(n, [=](int64_t i) { return exp_(wide(row[i]) - top); });
        EACH_ALONE for (int64_t i = 0; i < n; i++) row[i] = narrow<T>(exp_(wide(row[i]) - top) * scale);
    }
}
