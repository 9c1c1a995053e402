// The update on the CPU: types, instruction sets and threads. The loops are in combine_cpu_kernel.h.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define FASTODE_X86 1
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "combine.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own header (bug 105593)
#endif

namespace fastode {
namespace {

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

inline int64_t bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

template <class To, class From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float number(float x) { return x; }
inline double number(double x) { return x; }
inline float number(Bf16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }
inline float number(F16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
    if (rest >= 0x7C00) return same_bits<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    // Moving the fields into place leaves the exponent 112 too small; a multiplication puts that right, subnormals too.
    return same_bits<float>(same_bits<uint32_t>(same_bits<float>(rest << 13) * 0x1p112f) | sign);
}

// To the nearest, ties to even, as torch rounds; doubles go through float, as torch does.
template <class S>
inline S make(double x);
template <>
inline float make<float>(double x) {
    return float(x);
}
template <>
inline double make<double>(double x) {
    return x;
}
template <>
inline Bf16 make<Bf16>(double x) {
    const uint32_t bits = same_bits<uint32_t>(float(x));
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return {uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded)};
}
template <>
inline F16 make<F16>(double x) {
    const uint32_t bits = same_bits<uint32_t>(float(x)), size = bits & 0x7FFFFFFF;
    const uint32_t sign = bits >> 16 & 0x8000;
    if (size > 0x7F800000) return {uint16_t(sign | 0x7E00)};
    if (size >= 0x477FF000) return {uint16_t(sign | 0x7C00)};  // 65520 and more round to infinity
    if (size < 0x38800000) {                                   // below 2^-14: the addition rounds to multiples of 2^-24
        const uint32_t sum = same_bits<uint32_t>(same_bits<float>(size) + 0.5f);
        return {uint16_t(sign | (sum - 0x3F000000))};
    }
    return {uint16_t(sign | (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13)};
}

}  // namespace
}  // namespace fastode

#define FASTODE_ISA baseline
#define FASTODE_BYTES 16
#include "combine_cpu_kernel.h"
#undef FASTODE_ISA
#undef FASTODE_BYTES

#ifdef FASTODE_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTODE_ISA avx2
#define FASTODE_BYTES 32
#include "combine_cpu_kernel.h"
#undef FASTODE_ISA
#undef FASTODE_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define FASTODE_ISA avx512
#define FASTODE_BYTES 64
#include "combine_cpu_kernel.h"
#undef FASTODE_ISA
#undef FASTODE_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // FASTODE_X86

namespace fastode {
namespace {

struct Isa {
    const char* name;
    bool (*run)(const Update&, int64_t, int64_t);
    void (*fill)(const Update&, int64_t, int64_t);
};

bool here(const char* name) {
#ifdef FASTODE_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // such CPUs have F16C
    if (!std::strcmp(name, "avx2")) return avx2;
    if (!std::strcmp(name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    return !std::strcmp(name, "baseline");
}

constexpr Isa kIsas[] = {
#ifdef FASTODE_X86
    {"avx512", avx512::run_any, avx512::fill_any},
    {"avx2", avx2::run_any, avx2::fill_any},
#endif
    {"baseline", baseline::run_any, baseline::fill_any},
};

const Isa* best() {
    for (const Isa& isa : kIsas)
        if (here(isa.name)) return &isa;
    return nullptr;  // never: the baseline is everywhere
}

std::atomic<const Isa*> chosen{best()};

// Below this many elements per thread a parallel region (some 5 us with cold threads) costs more than it saves.
constexpr int64_t kGrain = 16384;
// Shares are handed out in pieces, so that a thread that was interrupted does not hold up the others.
[[maybe_unused]] constexpr int64_t kPiece = 65536;

template <class Work>
void shared_out(int64_t total, int threads, const Work& work) {
    threads = int(std::min<int64_t>(threads, total / kGrain));
#ifdef _OPENMP
    if (threads > 1 && !omp_in_parallel()) {
        const int64_t piece = std::min(kPiece, (total / threads + 63) / 64 * 64);
        const int64_t pieces = (total + piece - 1) / piece;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t i = 0; i < pieces; ++i) work(i * piece, std::min(total, (i + 1) * piece));
        return;
    }
#endif
    work(int64_t(0), total);
}

}  // namespace

const char* cpu_isa() { return chosen.load()->name; }

bool set_cpu_isa(const char* name) {
    for (const Isa& isa : kIsas)
        if (!std::strcmp(name, isa.name) && here(isa.name)) {
            chosen = &isa;
            return true;
        }
    return false;
}

bool combine_cpu(const Update& u, int threads) {
    const int64_t total = u.batch * u.sample;
    std::atomic<bool> finite{true};
    const Isa* isa = chosen.load(std::memory_order_relaxed);
    shared_out(total, threads, [&](int64_t begin, int64_t end) {
        if (!isa->run(u, begin, end)) finite.store(false, std::memory_order_relaxed);
    });
    return finite;
}

void normal_cpu(const int64_t* seeds, int64_t batch, uint32_t draw, int64_t count, DType dtype, void* out,
                int threads) {
    Update u;
    u.batch = batch;
    u.sample = count;
    u.state = dtype;
    u.out[0].data = out;
    u.draw[0] = draw;
    u.seeds = seeds;
    const Isa* isa = chosen.load(std::memory_order_relaxed);
    shared_out(batch * count, threads, [&](int64_t begin, int64_t end) { isa->fill(u, begin, end); });
}

}  // namespace fastode
