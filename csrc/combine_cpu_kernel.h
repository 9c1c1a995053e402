// The CPU update, included once per instruction set by combine_cpu.cpp with
//   FASTODE_ISA     the namespace
//   FASTODE_BYTES   the width of a vector register: 16, 32 or 64
// between target pragmas, so that every function here is compiled for that instruction set and no other.

namespace fastode {
namespace FASTODE_ISA {

#define FASTODE_INLINE inline __attribute__((always_inline))

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(FASTODE_BYTES)));
    typedef T unaligned __attribute__((vector_size(FASTODE_BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int lanes = FASTODE_BYTES / sizeof(T);
};

constexpr int kBlock = 512;  // elements staged at a time: 12 scratch rows of float are 24 KiB and stay in L1
constexpr int kPad = 64;     // at least one step of rows()

// Elements handled per iteration of rows(); its accumulators and one column must fit in 16 registers.
template <class T>
constexpr int step(int n_out) {
    return (n_out <= 2 ? 4 : 2) * Vector<T>::lanes;
}

// The sums themselves: n elements, a multiple of step(N_OUT). Rows and columns are few and the weights stay in L1, so
// memory is what the loop waits for; the branches on `used` go the same way in every iteration. Every index of `x` and
// `sum` must be a constant once the inner loops are unrolled, and nothing may take their address (memcpy does), or they
// live on the stack: that was 33 instead of 60 GB/s (AVX-512, one thread, 8 MiB each). Stores that go past the cache
// gained nothing at any size.
template <class T, int N_OUT>
bool rows(const T* const* in, T* const* out, const Update& u, const T* weights, int64_t n) {
    using V = typename Vector<T>::type;
    using Unaligned = typename Vector<T>::unaligned;
    constexpr int lanes = Vector<T>::lanes, unroll = step<T>(N_OUT) / lanes;
    const int n_in = u.n_in, columns = u.columns;
    const uint32_t watch = u.watch;
    uint32_t used[N_OUT];
    for (int j = 0; j < N_OUT; ++j) used[j] = u.used[j];
    V bad[unroll / 2] = {};
    for (int64_t e = 0; e < n; e += unroll * lanes) {
        V sum[N_OUT][unroll];
        for (int j = 0; j < N_OUT; ++j)
            for (int i = 0; i < unroll; ++i)
                sum[j][i] = V{} + (used[j] >> n_in & 1 ? weights[j * columns + n_in] : T(0));
        for (int k = 0; k < n_in; ++k) {
            const Unaligned* from = reinterpret_cast<const Unaligned*>(in[k] + e);
            V x[unroll];
            for (int i = 0; i < unroll; ++i) x[i] = from[i];
            if (watch >> k & 1)  // NaN and infinity times 0 are NaN, everything else is 0
                for (int i = 0; i < unroll; i += 2) bad[i / 2] += x[i] * T(0) + x[i + 1] * T(0);
            for (int j = 0; j < N_OUT; ++j)
                if (used[j] >> k & 1) {
                    const T w = weights[j * columns + k];
                    for (int i = 0; i < unroll; ++i) sum[j][i] += x[i] * w;
                }
        }
        for (int j = 0; j < N_OUT; ++j)
            for (int i = 0; i < unroll; ++i) reinterpret_cast<Unaligned*>(out[j] + e)[i] = sum[j][i];
    }
    bool finite = true;
    for (int i = 0; i < lanes; ++i) finite &= bad[0][i] == T(0) && bad[unroll / 2 - 1][i] == T(0);
    return finite;
}

template <class T>
bool rows(const T* const* in, T* const* out, const Update& u, const T* weights, int64_t n) {
    switch (u.n_out) {
        case 1:
            return rows<T, 1>(in, out, u, weights, n);
        case 2:
            return rows<T, 2>(in, out, u, weights, n);
        case 3:
            return rows<T, 3>(in, out, u, weights, n);
        default:
            return rows<T, 4>(in, out, u, weights, n);
    }
}

// The same for weights that differ between elements, on staged blocks; `first` is the block's place in its sample.
template <class T>
bool rows_per_element(const T* const* in, T* const* out, const Update& u, const T* weights, int64_t b, int64_t first,
                      int n) {
    T sums[kMaxOutputs][kBlock], bad = 0;
    for (int k = 0; k < u.n_in; ++k)
        if (u.watch >> k & 1)
            for (int i = 0; i < n; ++i) bad += in[k][i] * T(0);
    for (int j = 0; j < u.n_out; ++j) {
        for (int i = 0; i < n; ++i) sums[j][i] = 0;
        for (int k = 0; k <= u.n_in; ++k) {
            if (!(u.used[j] >> k & 1)) continue;
            const T* each = static_cast<const T*>(u.element[j][k]);
            if (each) each += b * u.element_stride;
            const T w = weights[j * u.columns + k];
            for (int i = 0; i < n; ++i) sums[j][i] += (each ? each[first + i] : w) * (k == u.n_in ? T(1) : in[k][i]);
        }
    }
    for (int j = 0; j < u.n_out; ++j) std::memcpy(out[j], sums[j], n * sizeof(T));
    return bad == T(0);
}

// -- noise
// ---------------------------------------------------------------------------------------------------------------

// The low halves of 64-bit lanes times a 32-bit constant.
template <class W>
FASTODE_INLINE W times(W x, uint32_t m) {
#if FASTODE_BYTES == 64
    return (W)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
#elif FASTODE_BYTES == 32
    return (W)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
    return (W)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(m));
#else
    return (x & 0xFFFFFFFFu) * uint64_t(m);
#endif
}

// Sixteen Philox blocks, so 64 numbers, from block `block` on. In double whatever T is: the numbers then equal those of
// fastode/noise.py to the last bit or two, and stochastic updates are few.
template <class T>
void normals(uint64_t seed, uint32_t draw, uint64_t block, T* out) {
    typedef uint64_t W __attribute__((vector_size(FASTODE_BYTES)));  // 32-bit words in the low halves of the lanes
    constexpr int L = 16, lanes = FASTODE_BYTES / 8, groups = L / lanes;
    uint32_t a[L], b[L], c[L], d[L];
    W words[4][groups];
    for (int g = 0; g < groups; ++g)
        for (int l = 0; l < lanes; ++l) {
            const uint64_t at = block + uint64_t(g * lanes + l);
            words[0][g][l] = at & 0xFFFFFFFFu;
            words[1][g][l] = at >> 32;
            words[2][g][l] = draw;
            words[3][g][l] = 0;
        }
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int g = 0; g < groups; ++g) {
            const W p0 = times(words[0][g], 0xD2511F53u), p1 = times(words[2][g], 0xCD9E8D57u);
            words[0][g] = (p1 >> 32) ^ words[1][g] ^ uint64_t(key0);
            words[1][g] = p1;
            words[2][g] = (p0 >> 32) ^ words[3][g] ^ uint64_t(key1);
            words[3][g] = p0;
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    for (int l = 0; l < L; ++l) {
        a[l] = uint32_t(words[0][l / lanes][l % lanes]);
        b[l] = uint32_t(words[1][l / lanes][l % lanes]);
        c[l] = uint32_t(words[2][l / lanes][l % lanes]);
        d[l] = uint32_t(words[3][l / lanes][l % lanes]);
    }
    for (int pair = 0; pair < 2; ++pair) {
        const uint32_t *first = pair ? c : a, *second = pair ? d : b;
        double cosine[L], sine[L];
        for (int l = 0; l < L; ++l) {
            // ln u1 for u1 = f 2^-32: f = m 2^k with m in (0.7, 1.42), then ln m by fdlibm's polynomial.
            const float f = float(first[l]) + 1.0f;
            int32_t bits;
            std::memcpy(&bits, &f, 4);
            const int32_t k = (bits - 0x3F350000) >> 23;
            const int32_t reduced = bits - k * (1 << 23);
            float mantissa;
            std::memcpy(&mantissa, &reduced, 4);
            const double g = double(mantissa) - 1.0, s = g / (2.0 + g), z = s * s, half = 0.5 * g * g;
            const double r =
                z * (6.666666666666735130e-01 +
                     z * (3.999999999940941908e-01 +
                          z * (2.857142874366239149e-01 +
                               z * (2.222219843214978396e-01 +
                                    z * (1.818357216161805012e-01 +
                                         z * (1.531383769920937332e-01 + z * 1.479819860511658591e-01))))));
            const double e = double(k - 32);
            const double ln =
                e * 6.93147180369123816490e-01 - ((half - (s * (half + r) + e * 1.90821492927058770002e-10)) - g);
            const double radius = std::sqrt(-2.0 * ln);
            // The angle 2 pi u2 = (q + t) pi/2 with |t| <= 1/2, both exact; sine and cosine of t pi/2, then the
            // quadrant.
            const float turns = float(second[l]) * 0x1p-30f;
            const int32_t q = int32_t(turns + 0.5f);
            const double x = (double(turns) - double(q)) * 1.57079632679489661923, x2 = x * x;
            const double sin_x =
                x + x * x2 *
                        (-1.66666666666666324348e-01 +
                         x2 * (8.33333333332248946124e-03 +
                               x2 * (-1.98412698298579493134e-04 +
                                     x2 * (2.75573137070700676789e-06 +
                                           x2 * (-2.50507602534068634195e-08 + x2 * 1.58969099521155010221e-10)))));
            const double cos_x =
                1.0 - 0.5 * x2 +
                x2 * x2 *
                    (4.16666666666666019037e-02 +
                     x2 * (-1.38888888888741095749e-03 +
                           x2 * (2.48015872894767294178e-05 +
                                 x2 * (-2.75573143513906633035e-07 +
                                       x2 * (2.08757232129817482790e-09 + x2 * -1.13596475577881948265e-11)))));
            const double odd = double(q & 1), even = 1.0 - odd;  // arithmetic, since the loop must have no branch
            const double cos_sign = 1.0 - 2.0 * double(((q + 1) >> 1) & 1), sin_sign = 1.0 - 2.0 * double((q >> 1) & 1);
            cosine[l] = radius * cos_sign * (even * cos_x + odd * sin_x);
            sine[l] = radius * sin_sign * (even * sin_x + odd * cos_x);
        }
        for (int l = 0; l < L; ++l) {
            out[4 * l + 2 * pair] = T(cosine[l]);
            out[4 * l + 2 * pair + 1] = T(sine[l]);
        }
    }
}

// Elements first .. first + n - 1 of one sample's draw; returns where in `buffer` they begin.
template <class T>
const T* draw(const Update& u, int k, int64_t b, int64_t first, int64_t n, T* buffer) {
    const int64_t shift = first & 3;
    for (int64_t i = 0; i < n + shift; i += 64)
        normals<T>(uint64_t(u.seeds[b]), u.draw[k], uint64_t(first >> 2) + uint64_t(i >> 2), buffer + i);
    return buffer + shift;
}

// -- element types and orders
// ----------------------------------------------------------------------------------------------

template <class T, class S>
void widen(const void* from, int64_t stride, int64_t n, T* to) {
    const S* x = static_cast<const S*>(from);
    if (stride == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = T(number(x[i]));
    else
        for (int64_t i = 0; i < n; ++i) to[i] = T(number(x[i * stride]));
}

template <class T, class S>
void narrow(const T* from, int64_t stride, int64_t n, void* to) {
    S* x = static_cast<S*>(to);
    if (stride == 1)
        for (int64_t i = 0; i < n; ++i) x[i] = make<S>(from[i]);
    else
        for (int64_t i = 0; i < n; ++i) x[i * stride] = make<S>(from[i]);
}

template <class T>
void read_run(const char* from, DType dtype, int64_t stride, int64_t n, T* to) {
    switch (dtype) {
        case DType::f32:
            return widen<T, float>(from, stride, n, to);
        case DType::f64:
            return widen<T, double>(from, stride, n, to);
        case DType::bf16:
            return widen<T, Bf16>(from, stride, n, to);
        case DType::f16:
#if FASTODE_BYTES >= 32  // both instruction sets come with the conversions of F16C
            if (stride == 1)
                for (const F16* x = reinterpret_cast<const F16*>(from); n >= 8; n -= 8, x += 8, to += 8, from += 16) {
                    typedef float F8 __attribute__((vector_size(32)));
                    const F8 v = (F8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
                    for (int i = 0; i < 8; ++i) to[i] = T(v[i]);
                }
#endif
            return widen<T, F16>(from, stride, n, to);
    }
}

template <class T>
void write_run(const T* from, DType dtype, int64_t stride, int64_t n, char* to) {
    switch (dtype) {
        case DType::f32:
            return narrow<T, float>(from, stride, n, to);
        case DType::f64:
            return narrow<T, double>(from, stride, n, to);
        case DType::bf16:
            return narrow<T, Bf16>(from, stride, n, to);
        case DType::f16:
#if FASTODE_BYTES >= 32
            if (stride == 1)
                for (; n >= 8; n -= 8, from += 8, to += 16) {
                    typedef float F8 __attribute__((vector_size(32)));
                    F8 v;
                    for (int i = 0; i < 8; ++i) v[i] = float(from[i]);
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, 0));
                }
#endif
            return narrow<T, F16>(from, stride, n, to);
    }
}

// Calls run(address, stride, count) for the pieces of elements first .. first + n - 1 (in contiguous order) of `x`.
template <class Run>
FASTODE_INLINE void pieces(const Operand& x, int64_t first, int64_t n, Run run) {
    char* data = static_cast<char*>(x.data);
    const int64_t size = bytes(x.dtype);
    if (x.dense) return run(data + first * size, int64_t(1), n);
    int64_t at[kMaxDims], rest = first, offset = 0;
    for (int d = x.dims - 1; d >= 0; --d) {
        at[d] = rest % x.sizes[d];
        rest /= x.sizes[d];
        offset += at[d] * x.strides[d];
    }
    const int last = x.dims - 1;
    while (n > 0) {
        const int64_t count = std::min(n, x.sizes[last] - at[last]);
        run(data + offset * size, x.strides[last], count);
        n -= count;
        at[last] += count;
        offset += count * x.strides[last];
        for (int d = last; d > 0 && at[d] == x.sizes[d]; --d) {
            offset += x.strides[d - 1] - at[d] * x.strides[d];
            at[d] = 0;
            ++at[d - 1];
        }
    }
}

// -- one thread's share
// ------------------------------------------------------------------------------------------------------

// Elements begin .. end - 1 of the flattened batch. Tensors of the state's type in contiguous order are used where they
// lie; everything else, and the few elements that do not fill a step, goes through a block of scratch in L1.
template <class T>
bool run(const Update& u, int64_t begin, int64_t end) {
    alignas(64) T scratch_in[kMaxInputs][kBlock + 2 * kPad];
    alignas(64) T scratch_out[kMaxOutputs][kBlock];
    bool in_place[kMaxInputs], out_place[kMaxOutputs], whole = !u.noise && !u.per_element;
    const bool by_sample = u.noise || u.per_element || u.weights_stride;
    for (int k = 0; k < u.n_in; ++k) {
        in_place[k] = !(u.noise >> k & 1) && u.in[k].dense && u.in[k].dtype == u.state;
        whole &= in_place[k];
    }
    for (int j = 0; j < u.n_out; ++j) {
        out_place[j] = u.out[j].dense && u.out[j].dtype == u.state;
        whole &= out_place[j];
    }
    const int64_t one_step = step<T>(u.n_out);
    bool finite = true;
    for (int64_t e = begin; e < end;) {
        const int64_t b = by_sample ? e / u.sample : 0, first = e - b * u.sample;
        int64_t n = end - e;
        if (by_sample) n = std::min(n, u.sample - first);
        if (!whole) n = std::min(n, int64_t(kBlock));
        if (n > one_step) n -= n % one_step;
        const bool full = n % one_step == 0;
        const T* in[kMaxInputs];
        T* out[kMaxOutputs];
        for (int k = 0; k < u.n_in; ++k) {
            T* row = scratch_in[k];
            if (in_place[k] && full) {
                in[k] = static_cast<const T*>(u.in[k].data) + e;
            } else if (u.noise >> k & 1) {
                in[k] = draw<T>(u, k, b, first, n, row);
            } else {
                in[k] = row;
                T* to = row;
                pieces(u.in[k], e, n, [&](const char* from, int64_t stride, int64_t count) {
                    read_run<T>(from, u.in[k].dtype, stride, count, to);
                    to += count;
                });
                if (!full) std::memset(to, 0, (one_step - n) * sizeof(T));  // what is watched must be finite
            }
        }
        for (int j = 0; j < u.n_out; ++j)
            out[j] = out_place[j] && full ? static_cast<T*>(u.out[j].data) + e : scratch_out[j];
        const T* weights = reinterpret_cast<const T*>(u.weights) + b * u.weights_stride;
        finite &= u.per_element ? rows_per_element<T>(in, out, u, weights, b, first, int(n))
                                : rows<T>(in, out, u, weights, full ? n : one_step);
        for (int j = 0; j < u.n_out; ++j) {
            if (out[j] != scratch_out[j]) continue;
            const T* from = scratch_out[j];
            pieces(u.out[j], e, n, [&](char* to, int64_t stride, int64_t count) {
                write_run<T>(from, u.out[j].dtype, stride, count, to);
                from += count;
            });
        }
        e += n;
    }
    return finite;
}

bool run_any(const Update& u, int64_t begin, int64_t end) {
    return u.state == DType::f64 ? run<double>(u, begin, end) : run<float>(u, begin, end);
}

void fill_any(const Update& u, int64_t begin, int64_t end) {
    alignas(64) double block[kBlock + 2 * kPad];
    for (int64_t e = begin; e < end;) {
        const int64_t b = e / u.sample, first = e - b * u.sample;
        const int64_t n = std::min({end - e, u.sample - first, int64_t(kBlock)});
        const double* from = draw<double>(u, 0, b, first, n, block);
        if (u.state == DType::f64)
            std::memcpy(static_cast<double*>(u.out[0].data) + e, from, n * sizeof(double));
        else
            for (int64_t i = 0; i < n; ++i) static_cast<float*>(u.out[0].data)[e + i] = float(from[i]);
        e += n;
    }
}

#undef FASTODE_INLINE

}  // namespace FASTODE_ISA
}  // namespace fastode
