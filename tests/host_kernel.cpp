// csrc/combine.cuh on the host: every thread of a grid in turn. Compiled and loaded by tests/test_cuda_kernel.py.
#include <cstdint>
#include <cstring>

static float host_half(uint32_t bits) {
    const uint16_t low = uint16_t(bits);
    _Float16 x;
    std::memcpy(&x, &low, 2);
    return float(x);
}
static uint32_t host_half_bits(float x) {
    const _Float16 half = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

#include "combine.cuh"

namespace {

template <class T, int VEC, int MAX_IN>
void all(const fastode::Update& u, int64_t threads, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t x = 0; x < threads; ++x) fastode::combine_thread<T, VEC, MAX_IN>(u, x, threads, row, rows);
}

}  // namespace

extern "C" int run(const fastode::Update* u, int vector, int64_t threads, int64_t rows) {
    const bool wide = u->state == fastode::DType::f64, few = u->n_in <= 4;
    if (wide && vector == 1) return all<double, 1, 8>(*u, threads, rows), 0;
    if (wide && vector == 2) return (few ? all<double, 2, 4> : all<double, 2, 8>)(*u, threads, rows), 0;
    if (wide) return 1;
    if (vector == 1) return all<float, 1, 8>(*u, threads, rows), 0;
    if (vector == 4) return (few ? all<float, 4, 4> : all<float, 4, 8>)(*u, threads, rows), 0;
    if (vector == 8) return (few ? all<float, 8, 4> : all<float, 8, 8>)(*u, threads, rows), 0;
    return 1;
}

extern "C" void sizes(int64_t* to) {
    to[0] = sizeof(fastode::Operand);
    to[1] = sizeof(fastode::Update);
}
