// The update between two network calls: up to four tensors become weighted sums of up to eight, in place.
//
// One interface for CPU and CUDA. It knows raw pointers and element types; no torch, no solver.
//
//     for every element e of every sample b:
//         read in[0][b, e] .. in[n_in - 1][b, e]                                  (each once)
//         out[j][b, e] = sum_k weights[b][j][k] * in[k][b, e] + weights[b][j][kOne]   for every j
//
// All inputs of an element are read before any output of it is written, so an output may be the same memory as an
// input, provided both keep that element at the same address. Sums are made in the state's type, whatever the tensors
// hold.
#pragma once
#include <cstdint>

namespace fastode {

constexpr int kMaxInputs = 8;
constexpr int kMaxOutputs = 4;
constexpr int kOne = kMaxInputs;          // the column of the constant 1
constexpr int kColumns = kMaxInputs + 1;  // weights are stored [rows][kColumns], the unused ones as 0
constexpr int kMaxDims = 6;               // [B, *sample], after neighbouring dimensions are merged

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// One tensor of the state's shape. `dense`: its elements lie in the order of a contiguous [B, *sample]; otherwise
// `sizes` and `strides` (in elements) say where they are, so a channels_last tensor and a contiguous one may meet in
// one update.
struct Operand {
    void* data = nullptr;
    DType dtype = DType::f32;
    int32_t dense = 1;
    int32_t dims = 0;
    int64_t sizes[kMaxDims] = {};
    int64_t strides[kMaxDims] = {};
};

struct Update {
    int64_t batch = 0, sample = 0;  // samples, and elements in one
    DType state = DType::f32;       // f32 or f64: the type of the sums and of the weights
    int32_t n_in = 0, n_out = 0;
    Operand in[kMaxInputs], out[kMaxOutputs];

    // Input k with a bit in `noise` is no tensor but draw `draw[k]`, made here from seeds[b] (see fastode/noise.py).
    uint32_t noise = 0;
    uint32_t draw[kMaxInputs] = {};
    const int64_t* seeds = nullptr;

    // Bit k of used[j]: row j reads column k. A column that it does not read must not reach it, not even times zero.
    uint32_t used[kMaxOutputs] = {};
    const void* weights = nullptr;  // [batch or 1][n_out][kColumns]
    int64_t weights_stride = 0;     // from one sample's weights to the next: 0 where they are shared

    // Weights that differ between elements: element[j][k] points to [sample] numbers of the state's type, and the
    // weight above is ignored. `per_element` tells whether there are any.
    int32_t per_element = 0;
    const void* element[kMaxOutputs][kColumns] = {};

    uint32_t watch = 0;  // bit k: report NaN or infinity in input k
};

// Runs `update` on the host with up to `threads` threads; true if every watched input was finite.
bool combine_cpu(const Update& update, int threads);

// count numbers of draw `draw` for every seed: [batch, count], float or double.
void normal_cpu(const int64_t* seeds, int64_t batch, uint32_t draw, int64_t count, DType dtype, void* out, int threads);

// The instruction set in use: "avx512", "avx2" or "baseline". Naming one forces it, for tests; false if it is not
// there.
const char* cpu_isa();
bool set_cpu_isa(const char* name);

// Enqueues `update` on a CUDA stream; all pointers in it are device pointers. `bad`, if given, is a device word that
// becomes 1 where a watched input is not finite. Returns a cudaError_t.
int combine_cuda(const Update& update, void* stream, uint32_t* bad);

}  // namespace fastode
