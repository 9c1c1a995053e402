// The update between two network calls: up to four tensors become weighted sums of up to eight, in place.
//
// One interface for CPU and CUDA. It knows raw pointers and element types; no torch, no solver.
//
//     for every element e of every sample b:
//         read in[0][b, e] .. in[n_in - 1][b, e]                                  (each once)
//         out[j][b, e] = sum_k weights[b][j][k] * in[k][b, e] + weights[b][j][n_in]        for every j
//
// All inputs of an element are read before any output of it is written, so an output may be the same memory as an
// input, provided both keep that element at the same address. Sums are made in the state's type, whatever the tensors
// hold. fastode/backends/cuda.py fills in the same structures from Python: keep the two in step.
#pragma once
#ifdef __CUDACC_RTC__  // the run-time compiler comes without the standard library's headers
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

namespace fastode {

constexpr int kMaxInputs = 8;
constexpr int kMaxOutputs = 4;
constexpr int kMaxColumns = kMaxInputs + 1;  // column n_in is that of the constant 1
constexpr int kMaxDims = 6;                  // [B, *sample], after neighbouring dimensions are merged

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// One tensor of the state's shape. `dense`: its elements lie in the order of a contiguous [B, *sample]; otherwise
// `sizes` and `strides` (in elements) say where they are, so a channels_last tensor and a contiguous one may meet in
// one update.
struct Operand {
    void* data = nullptr;
    DType dtype = DType::f32;
    int32_t dense = 1;
    int64_t dims = 0;
    int64_t sizes[kMaxDims] = {};
    int64_t strides[kMaxDims] = {};
};

struct Update {
    int64_t batch = 0, sample = 0;  // samples, and elements in one
    DType state = DType::f32;       // f32 or f64: the type of the sums and of the weights
    int32_t n_in = 0, n_out = 0;
    int32_t columns = 0;              // from one row of the weights to the next
    const void* weights = nullptr;    // [batch or 1][n_out][columns]
    int64_t weights_stride = 0;       // from one sample's weights to the next: 0 where they are shared
    const int64_t* seeds = nullptr;   // [batch], if there is noise
    uint32_t used[kMaxOutputs] = {};  // bit k: row j reads column k; no other may reach it, not even times zero
    uint32_t draw[kMaxInputs] = {};   // input k with a bit in `noise` is no tensor but this draw, made here
    uint32_t noise = 0;
    uint32_t watch = 0;                                  // bit k: report NaN or infinity in input k (on the CPU)
    int64_t per_element = 0;                             // whether there are weights that differ between elements:
    int64_t element_stride = 0;                          // from one sample's to the next, 0 where they are shared
    const void* element[kMaxOutputs][kMaxColumns] = {};  // [sample] numbers that replace a weight, or null
    Operand in[kMaxInputs], out[kMaxOutputs];
};

#ifndef __CUDACC_RTC__

// Runs `update` on the host with up to `threads` threads; true if every watched input was finite.
bool combine_cpu(const Update& update, int threads);

// count numbers of draw `draw` for every seed: [batch, count], float or double.
void normal_cpu(const int64_t* seeds, int64_t batch, uint32_t draw, int64_t count, DType dtype, void* out, int threads);

// The instruction set in use: "avx512", "avx2" or "baseline". Naming one forces it, for tests; false if it is absent.
const char* cpu_isa();
bool set_cpu_isa(const char* name);

// Enqueues `update`, whose pointers are device pointers, on a CUDA stream. `vector`: elements per thread, see
// combine.cuh. Returns a cudaError_t.
int combine_cuda(const Update& update, int vector, void* stream);
const char* cuda_message(int error);

#endif

}  // namespace fastode
