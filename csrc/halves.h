// Sixteen-bit numbers on the host, bit by bit: no compiler support and no instruction set is needed.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastode {
namespace {

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

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
