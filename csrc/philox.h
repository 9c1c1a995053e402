// Philox4x32-10 (Salmon et al. 2011) for one block, on host and device. fastode/noise.py says how it is keyed.
#pragma once
#include "combine.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FASTODE_BOTH __host__ __device__ __forceinline__
#else
#define FASTODE_BOTH inline
#endif

namespace fastode {

struct Words {
    uint32_t w[4];
};

FASTODE_BOTH Words philox(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(counter.w[0]) * 0xD2511F53u;
        const uint64_t p1 = uint64_t(counter.w[2]) * 0xCD9E8D57u;
        counter = {{uint32_t(p1 >> 32) ^ counter.w[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ counter.w[3] ^ key1,
                    uint32_t(p0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

}  // namespace fastode
