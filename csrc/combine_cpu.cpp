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
#include "halves.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own header (bug 105593)
#endif

namespace fastode {
namespace {

inline int64_t bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

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
