// The row-by-row parts of a layer and of the vocabulary op, fused. Plain C interface, no torch headers.
//
// Every function treats rows apart, in one fixed order of operations: a row's bits depend neither on the number of
// rows nor on the number of threads. T is float or bfloat16; bfloat16 values are rounded wherever the reference op by op
// would have rounded them (`round_<T>`), sums and exponentials are float.
#include "native_math.h"
#include "native_vocab.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define PRODUCTS
#include "native_gemm.h"
#else
namespace gemm { // none here: the caller asks `products` first
template <class T> static void multiply(const T *, int64_t, const void *, int64_t, int64_t, T *, int) {}
template <class T>
static void multiply_bytes(const uint8_t *, const float *, int64_t, int64_t, const int32_t *, const int32_t *, const float *, int64_t,
                           int64_t, T *, int64_t, int) {}
template <class T>
static void attention(const T *, const T *, const T *, int64_t, int64_t, int64_t, int64_t, int64_t, const int64_t *, T *, int) {}
}
#endif

// Codes [n, k] into panels [n / 32][k / 4][32][4], and 128 times the sums of each row's codes: what stands for 0 adds that.
extern "C" void pack_bytes(const int8_t *codes, int64_t n, int64_t k, int8_t *panels, int32_t *zero) {
    for (int64_t first = 0; first < n; first += 32)
        for (int64_t i = 0; i < k; i += 4)
            for (int64_t j = first; j < first + 32; j++)
                for (int64_t h = i; h < i + 4; h++) {
                    int8_t code = j < n && h < k ? codes[j * k + h] : 0;
                    *panels++ = code;
                    zero[j] += 128 * code;
                }
}

// Whether there are products in float (1), bfloat16 (2) and bytes (4).
extern "C" int products() {
    int found = 0;
#ifdef PRODUCTS
    found |= 1;
#if defined(__AVX512BF16__) || !defined(__AVX512F__)
    found |= 2;
#endif
#ifdef __AVX512VNNI__
    found |= 4;
#endif
#endif
    return found;
}

template <class T> struct Ops {
    static void attention(const T *q, const T *k, const T *v, int64_t tokens, int64_t heads, int64_t groups, int64_t dim, int64_t keys,
                          const int64_t *spans, T *out, int threads) {
        gemm::attention(q, k, v, tokens, heads, groups, dim, keys, spans, out, threads);
    }
    static void multiply(const T *a, int64_t m, const void *b, int64_t n, int64_t k, T *c, int threads) {
        gemm::multiply<T>(a, m, b, n, k, c, threads);
    }

    // Rows as unsigned levels, 128 for 0, filled up with 128 to `wide` bytes, and each row's step.
    static void bytes(const T *x, int64_t rows, int64_t n, int64_t wide, uint8_t *levels, float *steps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++) {
            const T *row = x + t * n;
            uint8_t *out = levels + t * wide;
            float top = 0;
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < n; i++) top = std::fabs(::wide(row[i])) > top ? std::fabs(::wide(row[i])) : top;
            steps[t] = top / 127 > 1e-30f ? top / 127 : 1e-30f;
            float inverse = 1 / steps[t];
            EACH_ALONE
            for (int64_t i = 0; i < n; i++) out[i] = uint8_t(int32_t(::wide(row[i]) * inverse + 128.5f));
            for (int64_t i = n; i < wide; i++) out[i] = 128;
        }
    }
    static void multiply_bytes(const uint8_t *levels, const float *steps, int64_t rows, int64_t wide, const void *b, const int32_t *zero,
                               const float *scale, int64_t n, int64_t k, T *c, int64_t ldc, int threads) {
        gemm::multiply_bytes<T>(levels, steps, rows, wide, (const int32_t *)b, zero, scale, n, (k + 3) / 4, c, ldc, threads);
    }

    // Gated MLPs of experts: rows lie grouped by expert, `counts` of each; `gate_up` and `down` point at packed weights.
    static void experts(const T *x, const int64_t *counts, int64_t experts, const void *const *gate_up, const void *const *down,
                        int64_t size, int64_t inner, T *room, T *out, int threads) {
        int64_t most = 0;
        for (int64_t e = 0; e < experts; e++) most = counts[e] > most ? counts[e] : most;
        T *gated = room + most * 2 * inner;
        for (int64_t e = 0; e < experts; e++) {
            int64_t rows = counts[e];
            if (!rows) continue;
            multiply(x, rows, gate_up[e], 2 * inner, size, room, threads);
            geglu(room, rows, inner, gated, threads);
            multiply(gated, rows, down[e], size, inner, out, threads);
            x += rows * size, out += rows * size;
        }
    }

    static void norm(const T *x, const T *w, float eps, int64_t rows, int64_t n, T *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++) norm_row(x + t * n, w, eps, n, out + t * n);
    }

    // After attention: out = x + norm(y) post, then what the branches read: dense = norm(out) w_dense,
    // and with experts mixed = norm(out) w_mixed, routed = norm(out) scale / sqrt(n).
    static void middle(const T *x, const T *y, const T *post, const T *w_dense, const T *w_mixed, const T *scale, float eps,
                       int64_t rows, int64_t n, T *out, T *dense, T *mixed, T *routed, int threads) {
        float root = float(1 / std::sqrt(double(n)));
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++) {
            const T *a = x + t * n, *b = y + t * n;
            T *o = out + t * n;
            float s = inverse(b, n, eps);
            EACH_ALONE
            for (int64_t i = 0; i < n; i++)
                o[i] = narrow<T>(wide(a[i]) + round_<T>(wide(b[i]) * s * wide(post[i])));
            s = inverse(o, n, eps);
            EACH_ALONE
            for (int64_t i = 0; i < n; i++) dense[t * n + i] = narrow<T>(wide(o[i]) * s * wide(w_dense[i]));
            if (!mixed) continue;
            EACH_ALONE
            for (int64_t i = 0; i < n; i++) {
                float unit = wide(o[i]) * s;
                mixed[t * n + i] = narrow<T>(unit * wide(w_mixed[i]));
                routed[t * n + i] = narrow<T>(round_<T>(round_<T>(unit) * wide(scale[i])) * root);
            }
        }
    }

    // The end of a layer: out = (x + norm(t) post) scalar with t = dense, or norm(dense) w_dense + norm(mixed) w_mixed;
    // and the next layer's input (or the model's output) normed = norm(out) next.
    static void close(const T *x, const T *dense, const T *mixed, const T *w_dense, const T *w_mixed, const T *post,
                      const T *scalar, const T *next, float eps, int64_t rows, int64_t n, T *out, T *normed, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++) {
            const T *a = x + t * n, *d = dense + t * n;
            T *o = out + t * n;
            if (mixed) {
                const T *e = mixed + t * n;
                float s = inverse(d, n, eps), r = inverse(e, n, eps);
                EACH_ALONE
                for (int64_t i = 0; i < n; i++)
                    o[i] = narrow<T>(round_<T>(wide(d[i]) * s * wide(w_dense[i])) +
                                     round_<T>(wide(e[i]) * r * wide(w_mixed[i])));
                d = o;
            }
            float s = inverse(d, n, eps), c = wide(*scalar);
            EACH_ALONE
            for (int64_t i = 0; i < n; i++)
                o[i] = narrow<T>(round_<T>(wide(a[i]) + round_<T>(wide(d[i]) * s * wide(post[i]))) * c);
            norm_row(o, next, eps, n, normed + t * n);
        }
    }

    // Norm over each head, then rotation by the row's cos and sin; halves are paired (i, i + D/2).
    static void head(const T *x, const T *w, const T *cos, const T *sin, float eps, int64_t dim, T *out) {
        float s = inverse(x, dim, eps);
        int64_t half = dim / 2;
        EACH_ALONE
        for (int64_t i = 0; i < half; i++) {
            float a = round_<T>(wide(x[i]) * s * wide(w[i]));
            float b = round_<T>(wide(x[i + half]) * s * wide(w[i + half]));
            out[i] = narrow<T>(round_<T>(a * wide(cos[i])) + round_<T>(-b * wide(sin[i])));
            out[i + half] = narrow<T>(round_<T>(b * wide(cos[i + half])) + round_<T>(a * wide(sin[i + half])));
        }
    }

    // A packed row is queries, keys and, unless the values are the raw keys, values. All outputs `[rows, heads, dim]`.
    static void heads(const T *x, const T *qw, const T *kw, const T *cos, const T *sin, float eps, int64_t rows, int64_t nq,
                      int64_t nk, int64_t dim, int has_v, T *q, T *k, T *v, int threads) {
        int64_t width = (nq + nk + (has_v ? nk : 0)) * dim;
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++) {
            const T *row = x + t * width, *c = cos + t * dim, *s = sin + t * dim;
            for (int64_t h = 0; h < nq; h++) head(row + h * dim, qw, c, s, eps, dim, q + (t * nq + h) * dim);
            for (int64_t h = 0; h < nk; h++) {
                const T *key = row + (nq + h) * dim;
                head(key, kw, c, s, eps, dim, k + (t * nk + h) * dim);
                norm_row(has_v ? key + nk * dim : key, (const T *)nullptr, eps, dim, v + (t * nk + h) * dim);
            }
        }
    }

    // gelu(gate) up of rows `[gate | up]`.
    static void geglu(const T *x, int64_t rows, int64_t n, T *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++)
            EACH_ALONE
            for (int64_t i = 0; i < n; i++)
                out[t * n + i] = narrow<T>(round_<T>(gelu_(wide(x[2 * t * n + i]))) * wide(x[(2 * t + 1) * n + i]));
    }

    // Softmax of each row, in place; -inf becomes exactly 0.
    static void softmax(T *x, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++) {
            T *row = x + t * n;
            float keep[4096];
            softmax_row(row, n, n <= 4096 ? keep : nullptr);
        }
    }

    // Softmax over experts, the k largest (ties: lowest id) renormalised and scaled, ids ascending; then rows grouped by
    // expert: `order` lists (row) in groups, `place [rows, k]` says where a row's k parts lie, `counts` the groups' sizes.
    static void route(const T *scores, const T *expert_scale, int64_t rows, int64_t experts, int64_t k, float *weights,
                      int64_t *order, int64_t *place, int64_t *counts, float *room, int64_t *ids) {
        std::memset(counts, 0, experts * sizeof(int64_t));
        for (int64_t t = 0; t < rows; t++) {
            const T *row = scores + t * experts;
            float top = highest(row, experts), sum = 0, kept = 0;
            for (int64_t e = 0; e < experts; e++) sum += room[e] = exp_(wide(row[e]) - top);
            int64_t *mine = ids + t * k;
            for (int64_t e = 0; e < experts; e++) room[e] /= sum;
            for (int64_t j = 0; j < k; j++) {
                int64_t best = -1;
                for (int64_t e = 0; e < experts; e++) {
                    bool taken = false;
                    for (int64_t i = 0; i < j; i++) taken |= mine[i] == e;
                    if (!taken && (best < 0 || room[e] > room[best])) best = e;
                }
                mine[j] = best;
                kept += room[best];
            }
            for (int64_t i = 1; i < k; i++) // ascending ids: the order of the later sum is the row's own
                for (int64_t j = i; j > 0 && mine[j] < mine[j - 1]; j--) {
                    int64_t swap = mine[j];
                    mine[j] = mine[j - 1], mine[j - 1] = swap;
                }
            for (int64_t j = 0; j < k; j++) {
                weights[t * k + j] = room[mine[j]] / kept * wide(expert_scale[mine[j]]);
                counts[mine[j]]++;
            }
        }
        int64_t *next = (int64_t *)room; // where each expert's group goes on; room has 2 experts floats
        for (int64_t e = 0, start = 0; e < experts; start += counts[e++]) next[e] = start;
        for (int64_t i = 0; i < rows * k; i++) {
            place[i] = next[ids[i]]++;
            order[place[i]] = i / k;
        }
    }

    // Each row's k parts, weighted, added in the order of `place`.
    static void combine(const T *parts, const int64_t *place, const float *weights, int64_t rows, int64_t k, int64_t n, T *out,
                        int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++) {
            T *o = out + t * n;
            for (int64_t j = 0; j < k; j++) {
                const T *part = parts + place[t * k + j] * n;
                float w = weights[t * k + j];
                if (j == 0)
                    EACH_ALONE
                    for (int64_t i = 0; i < n; i++) o[i] = narrow<T>(wide(part[i]) * w);
                else
                    EACH_ALONE
                    for (int64_t i = 0; i < n; i++) o[i] = narrow<T>(wide(o[i]) + round_<T>(wide(part[i]) * w));
            }
        }
    }

    // One chunk of the vocabulary, all rows: z = cap tanh(logit / cap) / temperature of `logits [rows, n]` become
    // exp(z - highest so far) in `probs` (may be the same memory). `room` holds n floats per thread.
    struct Row {
        double sum, moment, mass; // sum exp(z - top), sum exp(z - top)(z - top), the draw's sum exp((z - top) / own)
        float top, rescale;       // of z; factor that brings earlier chunks to the new top
        float drawn;              // z of the draw
        float pad;
        int64_t argmax, draw;
    };
    static void vocab(const T *logits, int64_t rows, int64_t n, int64_t first, float cap, const float *temperature,
                      const float *own, const double *uniforms, int64_t blocks, T *probs, Row *state, float *room, int threads) {
        const int64_t block = 1024; // the sampler's draw block
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t t = 0; t < rows; t++) {
            Row &s = state[t];
            float *z = room + omp_get_thread_num() * n;
            const T *l = logits + t * n;
            float top = cap_row(l, n, 1 / cap, cap / temperature[t], z);
            s.rescale = 1;
            if (top > s.top) {
                int64_t at = first_of(z, n, top); // ties go to the lowest id
                if (first > 0) {
                    double down = double(s.top) - top, factor = std::exp(down);
                    s.moment = (s.moment + s.sum * down) * factor;
                    s.sum *= factor;
                    s.rescale = float(factor);
                    s.mass *= own && own[t] > 0 ? std::exp(down / own[t]) : factor;
                }
                s.top = top, s.argmax = first + at;
            }
            float peak = s.top, power = own && own[t] > 0 ? 1 / own[t] : 1;
            for (int64_t b = 0; b < n; b += block) {
                int64_t end = b + block < n ? b + block : n;
                float below[block], exps[block], sum, moment;
                weigh(z + b, end - b, peak, below, exps, probs + t * n + b, sum, moment);
                float mass = sum;
                s.moment += moment;
                if (power != 1) {
                    EACH_ALONE
                    for (int64_t i = 0; i < end - b; i++) exps[i] = exp_(below[i] * power);
                    mass = total(end - b, [&](int64_t i) { return exps[i]; });
                }
                s.sum += sum, s.mass += mass;
                double share = mass / s.mass, u = uniforms[t * blocks + (first + b) / block];
                if (!(u < share) || !(mass > 0)) continue;
                double target = u / share * mass, run = 0;
                int64_t last = 0, at = -1;
                for (int64_t i = 0; i < end - b && at < 0; i++) {
                    run += exps[i];
                    if (exps[i] > 0) last = i;
                    if (run > target) at = i;
                }
                at = at < 0 ? last : at;
                s.draw = first + b + at, s.drawn = below[at] + peak;
            }
        }
    }
};

#define EACH(name, params, args)                                                                                        \
    namespace f32_ { typedef float T; extern "C" void name##_f32 params { Ops<T>::name args; } }                       \
    namespace b16_ { typedef bf16 T; extern "C" void name##_bf16 params { Ops<T>::name args; } }

EACH(attention,
     (const T *q, const T *k, const T *v, int64_t tokens, int64_t heads, int64_t groups, int64_t dim, int64_t keys,
      const int64_t *spans, T *out, int threads),
     (q, k, v, tokens, heads, groups, dim, keys, spans, out, threads))
EACH(multiply, (const T *a, int64_t m, const void *b, int64_t n, int64_t k, T *c, int threads), (a, m, b, n, k, c, threads))
EACH(experts,
     (const T *x, const int64_t *counts, int64_t experts, const void *const *gate_up, const void *const *down, int64_t size,
      int64_t inner, T *room, T *out, int threads),
     (x, counts, experts, gate_up, down, size, inner, room, out, threads))
EACH(bytes, (const T *x, int64_t rows, int64_t n, int64_t wide, uint8_t *levels, float *steps, int threads),
     (x, rows, n, wide, levels, steps, threads))
EACH(multiply_bytes,
     (const uint8_t *levels, const float *steps, int64_t rows, int64_t wide, const void *b, const int32_t *zero, const float *scale,
      int64_t n, int64_t k, T *c, int64_t ldc, int threads),
     (levels, steps, rows, wide, b, zero, scale, n, k, c, ldc, threads))
EACH(norm, (const T *x, const T *w, float eps, int64_t rows, int64_t n, T *out, int threads), (x, w, eps, rows, n, out, threads))
EACH(middle,
     (const T *x, const T *y, const T *post, const T *wd, const T *wm, const T *scale, float eps, int64_t rows, int64_t n,
      T *out, T *dense, T *mixed, T *routed, int threads),
     (x, y, post, wd, wm, scale, eps, rows, n, out, dense, mixed, routed, threads))
EACH(close,
     (const T *x, const T *dense, const T *mixed, const T *wd, const T *wm, const T *post, const T *scalar, const T *next,
      float eps, int64_t rows, int64_t n, T *out, T *normed, int threads),
     (x, dense, mixed, wd, wm, post, scalar, next, eps, rows, n, out, normed, threads))
EACH(heads,
     (const T *x, const T *qw, const T *kw, const T *cos, const T *sin, float eps, int64_t rows, int64_t nq, int64_t nk,
      int64_t dim, int has_v, T *q, T *k, T *v, int threads),
     (x, qw, kw, cos, sin, eps, rows, nq, nk, dim, has_v, q, k, v, threads))
EACH(geglu, (const T *x, int64_t rows, int64_t n, T *out, int threads), (x, rows, n, out, threads))
EACH(softmax, (T * x, int64_t rows, int64_t n, int threads), (x, rows, n, threads))
EACH(route,
     (const T *scores, const T *scale, int64_t rows, int64_t experts, int64_t k, float *weights, int64_t *order, int64_t *place,
      int64_t *counts, float *room, int64_t *ids),
     (scores, scale, rows, experts, k, weights, order, place, counts, room, ids))
EACH(combine,
     (const T *parts, const int64_t *place, const float *weights, int64_t rows, int64_t k, int64_t n, T *out, int threads),
     (parts, place, weights, rows, k, n, out, threads))
EACH(vocab,
     (const T *logits, int64_t rows, int64_t n, int64_t first, float cap, const float *temperature, const float *own,
      const double *uniforms, int64_t blocks, T *probs, void *state, float *room, int threads),
     (logits, rows, n, first, cap, temperature, own, uniforms, blocks, probs, (Ops<T>::Row *)state, room, threads))
