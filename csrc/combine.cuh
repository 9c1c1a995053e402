// The update as a CUDA kernel: one element, or `VEC` neighbouring ones, per thread; every tensor read once and written
// once, 128 bits at a time. nvcc compiles it ahead of time (combine_cuda.cu), the run-time compiler when there is none
// (fastode/backends/nvrtc.py), and a C++ compiler for the tests that run it on the host.
//
// A thread loads its elements of all inputs before it converts any, so that all loads are in flight together, and
// stores nothing before the last was read; no other thread touches these elements. The weights come from device memory,
// so that a recorded graph goes on serving when they change.
#pragma once
#include "combine.h"
#include "philox.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FASTODE_DEVICE __device__ __forceinline__
#define FASTODE_UNROLL _Pragma("unroll")
#else
#include <cmath>
#include <cstring>
#define FASTODE_DEVICE inline
#define FASTODE_UNROLL
#endif

namespace fastode {

struct alignas(16) Bits128 {
    uint32_t w[4];
};
struct alignas(8) Bits64 {
    uint32_t w[2];
};

FASTODE_DEVICE int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

FASTODE_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
FASTODE_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
FASTODE_DEVICE double as_double(uint32_t low, uint32_t high) { return __hiloint2double(int(high), int(low)); }
FASTODE_DEVICE void split(double x, uint32_t* to) {
    to[0] = uint32_t(__double2loint(x));
    to[1] = uint32_t(__double2hiint(x));
}
FASTODE_DEVICE float from_half(uint32_t bits) {
    float x;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(bits));
    return x;
}
FASTODE_DEVICE uint32_t to_half(float x) {
    uint32_t bits;
    asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(bits) : "f"(x));
    return bits;
}
template <class T>
FASTODE_DEVICE T constant(const T* at) {
    return __ldg(at);
}
// For u in (0, 1] and a in [0, 1]: ln u, and the sine and cosine of 2 pi a.
FASTODE_DEVICE float ln(float u) { return logf(u); }
FASTODE_DEVICE double ln(double u) { return log(u); }
FASTODE_DEVICE void turn(float a, float* s, float* c) { sincospif(2.0f * a, s, c); }
FASTODE_DEVICE void turn(double a, double* s, double* c) { sincospi(2.0 * a, s, c); }

#else  // the same on the host

FASTODE_DEVICE float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
FASTODE_DEVICE uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
FASTODE_DEVICE double as_double(uint32_t low, uint32_t high) {
    const uint64_t bits = uint64_t(high) << 32 | low;
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
}
FASTODE_DEVICE void split(double x, uint32_t* to) { std::memcpy(to, &x, 8); }
FASTODE_DEVICE float from_half(uint32_t bits) { return float(host_half(bits)); }
FASTODE_DEVICE uint32_t to_half(float x) { return host_half_bits(x); }
template <class T>
FASTODE_DEVICE T constant(const T* at) {
    return *at;
}
FASTODE_DEVICE float ln(float u) { return std::log(u); }
FASTODE_DEVICE double ln(double u) { return std::log(u); }
template <class T>
FASTODE_DEVICE void turn(T a, T* s, T* c) {
    *s = std::sin(T(6.283185307179586) * a);
    *c = std::cos(T(6.283185307179586) * a);
}

#endif

FASTODE_DEVICE uint32_t to_bf16(float x) {  // to the nearest, ties to even
    const uint32_t bits = as_bits(x);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

// Where element e of the flattened [B, *sample] lies, in elements.
FASTODE_DEVICE int64_t place(const Operand& x, int64_t e) {
    if (x.dense) return e;
    int64_t offset = 0;
    for (int d = int(x.dims) - 1; d >= 0; --d) {
        offset += e % x.sizes[d] * x.strides[d];
        e /= x.sizes[d];
    }
    return offset;
}

// VEC elements as they are, into 32-bit words; 16-bit elements in pairs.
template <int VEC, int WORDS>
FASTODE_DEVICE void load(const Operand& x, int64_t e, uint32_t (&words)[WORDS]) {
    const char* at = static_cast<const char*>(x.data) + place(x, e) * size_of(x.dtype);
    if constexpr (VEC == 1) {
        if (x.dtype == DType::f64) {
            const Bits64 b = *reinterpret_cast<const Bits64*>(at);
            words[0] = b.w[0];
            words[1] = b.w[1];
        } else if (x.dtype == DType::f32) {
            words[0] = *reinterpret_cast<const uint32_t*>(at);
        } else {
            words[0] = *reinterpret_cast<const unsigned short*>(at);
        }
    } else {
        const int quads = VEC * size_of(x.dtype) / 16;
        FASTODE_UNROLL
        for (int q = 0; q < (WORDS + 3) / 4; ++q)
            if (q < quads) {
                const Bits128 b = reinterpret_cast<const Bits128*>(at)[q];
                FASTODE_UNROLL
                for (int i = 0; i < 4; ++i)
                    if (4 * q + i < WORDS) words[4 * q + i] = b.w[i];
            }
        if (quads == 0) {
            const Bits64 b = *reinterpret_cast<const Bits64*>(at);
            words[0] = b.w[0];
            words[1] = b.w[1];
        }
    }
}

template <class T, int VEC, int WORDS>
FASTODE_DEVICE void widen(DType dtype, const uint32_t (&words)[WORDS], T (&x)[VEC]) {
    if (dtype == DType::f32) {
        FASTODE_UNROLL
        for (int i = 0; i < VEC; ++i) x[i] = T(as_float(words[i]));
    } else if (dtype == DType::bf16) {
        FASTODE_UNROLL
        for (int i = 0; i < VEC; ++i) x[i] = T(as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16));
    } else if (dtype == DType::f16) {
        FASTODE_UNROLL
        for (int i = 0; i < VEC; ++i) x[i] = T(from_half(words[i / 2] >> (i % 2 * 16) & 0xFFFFu));
    } else {
        FASTODE_UNROLL
        for (int i = 0; i < VEC; ++i)
            if (2 * i + 1 < WORDS) x[i] = T(as_double(words[2 * i], words[2 * i + 1]));
    }
}

template <class T, int VEC>
FASTODE_DEVICE void store(const Operand& to, int64_t e, const T (&x)[VEC]) {
    constexpr int WORDS = VEC * int(sizeof(T)) / 4 > 2 ? VEC * int(sizeof(T)) / 4 : 2;
    uint32_t words[WORDS] = {};
    if (to.dtype == DType::f32) {
        FASTODE_UNROLL
        for (int i = 0; i < VEC; ++i) words[i] = as_bits(float(x[i]));
    } else if (to.dtype == DType::f64) {
        FASTODE_UNROLL
        for (int i = 0; i < VEC; ++i)
            if (2 * i + 1 < WORDS) split(double(x[i]), words + 2 * i);
    } else {
        const bool brain = to.dtype == DType::bf16;
        FASTODE_UNROLL
        for (int i = 0; i < VEC; ++i)
            words[i / 2] |= (brain ? to_bf16(float(x[i])) : to_half(float(x[i]))) << (i % 2 * 16);
    }
    char* at = static_cast<char*>(to.data) + place(to, e) * size_of(to.dtype);
    if constexpr (VEC == 1) {
        if (to.dtype == DType::f64)
            *reinterpret_cast<Bits64*>(at) = {{words[0], words[1]}};
        else if (to.dtype == DType::f32)
            *reinterpret_cast<uint32_t*>(at) = words[0];
        else
            *reinterpret_cast<unsigned short*>(at) = (unsigned short)(words[0]);
    } else {
        const int quads = VEC * size_of(to.dtype) / 16;
        FASTODE_UNROLL
        for (int q = 0; q < WORDS / 4; ++q)
            if (q < quads)
                reinterpret_cast<Bits128*>(at)[q] = {
                    {words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3]}};
        if (quads == 0) *reinterpret_cast<Bits64*>(at) = {{words[0], words[1]}};
    }
}

// Normal numbers j .. j + VEC - 1 of a sample's draw (fastode/noise.py). VEC below 4 divides j.
template <class T, int VEC>
FASTODE_DEVICE void normals(uint64_t seed, uint32_t draw, int64_t j, T (&z)[VEC]) {
    FASTODE_UNROLL
    for (int i = 0; i < VEC; i += 4) {
        const uint64_t block = uint64_t(j + i) >> 2;
        const Words r =
            philox({{uint32_t(block), uint32_t(block >> 32), draw, 0}}, uint32_t(seed), uint32_t(seed >> 32));
        FASTODE_UNROLL
        for (int pair = 0; pair < (VEC < 4 ? 1 : 2); ++pair) {
            const bool second = VEC < 4 ? (j & 2) != 0 : pair == 1;
            const T u = T((float(second ? r.w[2] : r.w[0]) + 1.0f) * 2.3283064365386963e-10f);
            const T a = T(float(second ? r.w[3] : r.w[1]) * 2.3283064365386963e-10f);
            T s, c;
            turn(a, &s, &c);
            const T radius = sqrt(T(-2) * ln(u));
            if constexpr (VEC == 1) {
                z[0] = radius * (j & 1 ? s : c);
            } else {
                z[i + 2 * pair] = radius * c;
                z[i + 2 * pair + 1] = radius * s;
            }
        }
    }
}

// VEC elements from element j of sample b on (or of the whole batch, where samples share everything).
template <class T, int VEC, int MAX_IN>
FASTODE_DEVICE void combine_at(const Update& u, int64_t b, int64_t j, int64_t length) {
    constexpr int WORDS = VEC * int(sizeof(T)) / 4 > 2 ? VEC * int(sizeof(T)) / 4 : 2;
    const int64_t e = b * length + j;
    uint32_t words[MAX_IN][WORDS] = {};
    FASTODE_UNROLL
    for (int k = 0; k < MAX_IN; ++k)
        if (k < u.n_in && !(u.noise >> k & 1u)) load<VEC>(u.in[k], e, words[k]);
    T x[MAX_IN][VEC];
    FASTODE_UNROLL
    for (int k = 0; k < MAX_IN; ++k) {
        if (u.noise >> k & 1u)
            normals<T, VEC>(uint64_t(u.seeds[b]), u.draw[k], j, x[k]);
        else
            widen<T, VEC>(u.in[k].dtype, words[k], x[k]);
    }
    const T* weights = static_cast<const T*>(u.weights) + b * u.weights_stride;
    FASTODE_UNROLL
    for (int r = 0; r < kMaxOutputs; ++r) {
        if (r >= u.n_out) break;
        T sum[VEC];
        const T bias = u.used[r] >> u.n_in & 1u ? constant(weights + r * u.columns + u.n_in) : T(0);
        FASTODE_UNROLL
        for (int i = 0; i < VEC; ++i) sum[i] = bias;
        FASTODE_UNROLL
        for (int k = 0; k < MAX_IN; ++k)
            if (u.used[r] >> k & 1u && k < u.n_in) {
                const T* each = static_cast<const T*>(u.element[r][k]);
                if (u.per_element && each) {
                    each += b * u.element_stride + j;
                    FASTODE_UNROLL
                    for (int i = 0; i < VEC; ++i) sum[i] += constant(each + i) * x[k][i];
                } else {
                    const T w = constant(weights + r * u.columns + k);
                    FASTODE_UNROLL
                    for (int i = 0; i < VEC; ++i) sum[i] += w * x[k][i];
                }
            }
        if (u.per_element && u.element[r][u.n_in]) {
            const T* each = static_cast<const T*>(u.element[r][u.n_in]) + b * u.element_stride + j;
            FASTODE_UNROLL
            for (int i = 0; i < VEC; ++i) sum[i] += constant(each + i) - bias;
        }
        store<T, VEC>(u.out[r], e, sum);
    }
}

// What thread (x, row) of a grid of `threads` by `rows` threads does. VEC > 1 asks for dense tensors on 16-byte
// boundaries, and for samples of a multiple of VEC elements where they do not share their weights.
template <class T, int VEC, int MAX_IN>
FASTODE_DEVICE void combine_thread(const Update& u, int64_t x, int64_t threads, int64_t row, int64_t rows) {
    const bool by_sample = u.noise || u.per_element || u.weights_stride;
    const int64_t samples = by_sample ? u.batch : 1, length = by_sample ? u.sample : u.batch * u.sample;
    const int64_t whole = length / VEC * VEC;
    for (int64_t b = row; b < samples; b += rows) {
        for (int64_t j = x * VEC; j < whole; j += threads * VEC) combine_at<T, VEC, MAX_IN>(u, b, j, length);
        if constexpr (VEC > 1)
            for (int64_t j = whole + x; j < length; j += threads) combine_at<T, 1, MAX_IN>(u, b, j, length);
    }
}

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

constexpr int kThreads = 256;

// A kernel by name: the state's type, elements per thread, most inputs. Two blocks per processor keep it from saving
// registers by spilling them.
#define FASTODE_KERNEL(name, T, VEC, MAX_IN)                                                             \
    extern "C" __global__ void __launch_bounds__(fastode::kThreads, 2)                                   \
        name(const __grid_constant__ fastode::Update u) {                                                \
        fastode::combine_thread<T, VEC, MAX_IN>(u, int64_t(blockIdx.x) * blockDim.x + threadIdx.x,       \
                                                int64_t(gridDim.x) * blockDim.x, blockIdx.y, gridDim.y); \
    }

#endif

}  // namespace fastode
