// Numbers that a run makes itself, on the CPU: a small network on a pooled feature map, then straight-line code.
//
// What Mlp and Instruction mean is defined in fastode/program/bind.py (PooledMLP) and fastode/program/code.py (Code).
#pragma once
#include <cstdint>
#include <vector>

#include "combine.h"

namespace fastode {

// z = head (w2 silu(w1 p + b1) + b2) + offset;  number_k = low_k + (high_k - low_k) / (1 + exp(-z_k)).
// Matrices are row-major: w1 [hidden][inputs], w2 [width][hidden], head [heads][width].
struct Mlp {
    int64_t inputs = 0, hidden = 0, width = 0, heads = 0;
    std::vector<float> w1, b1, w2, b2, head, offset, low, high;
};

// A feature map [batch, channels, inputs]; strides in elements.
struct Feature {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t channels = 0, stride_b = 0, stride_c = 0, stride_p = 0;
};

// The mean over channels p, then the network: numbers[k * batch + b].
void pooled_mlp(const Mlp& mlp, const Feature& feature, int64_t batch, double* numbers);

// The order is that of OPS in fastode/program/code.py.
enum class Op : int32_t { neg, exp, expm1, sqrt, log, add, sub, mul, div, pow, j0, j1, j2, j3, k0, k1, k2, k3, count };

struct Instruction {
    Op op;
    int32_t a, b;
};

// registers [n][batch]: inputs and constants are there; instruction i writes register first + i.
void run_code(const std::vector<Instruction>& code, int64_t first, int64_t batch, double* registers);

}  // namespace fastode
