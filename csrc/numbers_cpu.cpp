// The small network and the straight-line code of csrc/numbers.h.
#include <cmath>

#include "halves.h"
#include "numbers.h"

namespace fastode {
namespace {

template <class S>
void pool(const Feature& f, int64_t b, int64_t inputs, float* mean) {
    const S* x = static_cast<const S*>(f.data) + b * f.stride_b;
    for (int64_t p = 0; p < inputs; ++p) mean[p] = 0;
    if (f.stride_p == 1) {
        for (int64_t c = 0; c < f.channels; ++c)
            for (int64_t p = 0; p < inputs; ++p) mean[p] += float(number(x[c * f.stride_c + p]));
    } else {
        for (int64_t p = 0; p < inputs; ++p)
            for (int64_t c = 0; c < f.channels; ++c) mean[p] += float(number(x[c * f.stride_c + p * f.stride_p]));
    }
    for (int64_t p = 0; p < inputs; ++p) mean[p] /= float(f.channels);
}

// Eight partial sums: the compiler may not reorder a float sum by itself, and one chain of additions waits at each.
float dot(const float* a, const float* b, int64_t n) {
    float part[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; ++k) part[k] += a[i + k] * b[i + k];
    float sum = 0;
    for (int k = 0; k < 8; ++k) sum += part[k];
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

double factorial(int k) {
    double f = 1;
    for (int i = 2; i <= k; ++i) f *= i;
    return f;
}

// fastode/scalar.py, Moment.
double moment(int k, double sign, double h) {
    if (std::abs(h) < k + 1) {
        double term = std::pow(h, k + 1) / factorial(k + 1), total = term;
        for (int j = 1; j < 40; ++j) {
            term *= sign * h / (k + 1 + j);
            total += term;
        }
        return total;
    }
    double value = sign * std::expm1(sign * h);
    for (int i = 1; i <= k; ++i) value = sign * (value - std::pow(h, i) / factorial(i));
    return value;
}

double play(Op op, double a, double b) {
    switch (op) {
        case Op::neg:
            return -a;
        case Op::exp:
            return std::exp(a);
        case Op::expm1:
            return std::expm1(a);
        case Op::sqrt:
            return std::sqrt(a);
        case Op::log:
            return std::log(a);
        case Op::add:
            return a + b;
        case Op::sub:
            return a - b;
        case Op::mul:
            return a * b;
        case Op::div:
            return a / b;
        case Op::pow:
            return std::pow(a, b);
        default:
            break;
    }
    const int k = int(op) - int(Op::j0);
    return k < 4 ? moment(k, -1.0, a) : moment(k - 4, 1.0, a);
}

}  // namespace

void pooled_mlp(const Mlp& m, const Feature& f, int64_t batch, double* numbers) {
    std::vector<float> mean(size_t(m.inputs)), hidden(size_t(m.hidden)), width(size_t(m.width));
    for (int64_t b = 0; b < batch; ++b) {
        switch (f.dtype) {
            case DType::f32:
                pool<float>(f, b, m.inputs, mean.data());
                break;
            case DType::f64:
                pool<double>(f, b, m.inputs, mean.data());
                break;
            case DType::bf16:
                pool<Bf16>(f, b, m.inputs, mean.data());
                break;
            case DType::f16:
                pool<F16>(f, b, m.inputs, mean.data());
                break;
        }
        for (int64_t i = 0; i < m.hidden; ++i) {
            const float z = dot(&m.w1[size_t(i * m.inputs)], mean.data(), m.inputs) + m.b1[size_t(i)];
            hidden[size_t(i)] = z / (1 + std::exp(-z));
        }
        for (int64_t i = 0; i < m.width; ++i)
            width[size_t(i)] = dot(&m.w2[size_t(i * m.hidden)], hidden.data(), m.hidden) + m.b2[size_t(i)];
        for (int64_t k = 0; k < m.heads; ++k) {
            const float z = dot(&m.head[size_t(k * m.width)], width.data(), m.width) + m.offset[size_t(k)];
            const float low = m.low[size_t(k)], high = m.high[size_t(k)];
            numbers[k * batch + b] = double(low + (high - low) * (1 / (1 + std::exp(-z))));
        }
    }
}

void run_code(const std::vector<Instruction>& code, int64_t first, int64_t batch, double* registers) {
    for (size_t i = 0; i < code.size(); ++i) {
        const double* a = registers + code[i].a * batch;
        const double* b = registers + code[i].b * batch;
        double* out = registers + (first + int64_t(i)) * batch;
        for (int64_t s = 0; s < batch; ++s) out[s] = play(code[i].op, a[s], b[s]);
    }
}

}  // namespace fastode
