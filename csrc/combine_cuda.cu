// Launches combine.cuh. Nothing here waits for the device or allocates, so that all of it can be recorded in a graph.
#include <algorithm>

#include "combine.cuh"

FASTODE_KERNEL(fastode_f32_1_8, float, 1, 8)
FASTODE_KERNEL(fastode_f32_4_4, float, 4, 4)
FASTODE_KERNEL(fastode_f32_4_8, float, 4, 8)
FASTODE_KERNEL(fastode_f32_8_4, float, 8, 4)
FASTODE_KERNEL(fastode_f32_8_8, float, 8, 8)
FASTODE_KERNEL(fastode_f64_1_8, double, 1, 8)
FASTODE_KERNEL(fastode_f64_2_4, double, 2, 4)
FASTODE_KERNEL(fastode_f64_2_8, double, 2, 8)

namespace fastode {

int combine_cuda(const Update& u, int vector, void* stream) {
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const bool by_sample = u.noise || u.per_element || u.weights_stride;
    const int64_t samples = by_sample ? u.batch : 1, length = by_sample ? u.sample : u.batch * u.sample;
    if (samples * length == 0) return cudaSuccess;
    // Eight blocks for each processor fill it; a thread of a larger tensor makes several rounds.
    const int64_t rows = std::min<int64_t>(samples, 65535),
                  blocks = (length + vector * kThreads - 1) / (vector * kThreads);
    const int64_t most = std::max<int64_t>(1, 8 * int64_t(processors) / rows);
    const dim3 grid(unsigned(std::min(blocks, most)), unsigned(rows));
    const bool few = u.n_in <= 4;
    void (*kernel)(Update) = nullptr;
    if (u.state == DType::f64)
        kernel = vector == 2 ? (few ? fastode_f64_2_4 : fastode_f64_2_8) : vector == 1 ? fastode_f64_1_8 : nullptr;
    else if (vector == 8)
        kernel = few ? fastode_f32_8_4 : fastode_f32_8_8;
    else
        kernel = vector == 4 ? (few ? fastode_f32_4_4 : fastode_f32_4_8) : vector == 1 ? fastode_f32_1_8 : nullptr;
    if (!kernel) return cudaErrorInvalidValue;
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(u);
    return cudaGetLastError();
}

const char* cuda_message(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace fastode
