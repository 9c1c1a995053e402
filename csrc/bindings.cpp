// The Python module fastode._native: raw pointers in, nothing else. fastode/backends/native.py is its only caller and
// checks everything beforehand; what is wrong here all the same raises ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "combine.h"
#include "philox.h"

namespace py = pybind11;

namespace fastode {
namespace {

using Named = std::pair<std::string, int>;  // a Source or Target of fastode/program/lower.py
using Address = uintptr_t;
// A tensor as Python describes it: address, number of its DType, strides in elements (none if it is contiguous).
using Described = std::tuple<Address, int, std::vector<int64_t>>;

// Updates of fewer elements keep the GIL: letting go and taking it back costs about 0.1 us, and under contention a
// switch to another thread, for work of some 10 us.
constexpr int64_t kReleaseGil = 32768;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

DType dtype_of(int number) {
    if (number < 0 || number > int(DType::f16)) throw std::invalid_argument("dtype: unknown number");
    return DType(number);
}

// Neighbouring dimensions that are one run of memory are merged; what is left of a contiguous tensor is one dimension.
Operand describe(const Described& d, const std::vector<int64_t>& shape) {
    Operand x;
    x.data = pointer(std::get<0>(d));
    x.dtype = dtype_of(std::get<1>(d));
    const std::vector<int64_t>& strides = std::get<2>(d);
    if (strides.empty()) return x;
    if (strides.size() != shape.size()) throw std::invalid_argument("strides: need one per dimension");
    std::vector<int64_t> size, stride;
    for (size_t i = 0; i < shape.size(); ++i) {
        if (shape[i] == 1) continue;
        if (!size.empty() && stride.back() == strides[i] * shape[i]) {
            size.back() *= shape[i];
            stride.back() = strides[i];
        } else {
            size.push_back(shape[i]);
            stride.push_back(strides[i]);
        }
    }
    if (size.size() > size_t(kMaxDims)) throw std::invalid_argument("strides: too many dimensions");
    x.dims = int32_t(size.size());
    x.dense = size.empty() || (size.size() == 1 && stride[0] == 1);
    for (size_t i = 0; i < size.size(); ++i) {
        x.sizes[i] = size[i];
        x.strides[i] = stride[i];
    }
    return x;
}

// The updates of one lowered program over one set of buffers. What is known when it is made (slots, the network's
// input, dtypes) is filled in then; a call adds the addresses that change, so it allocates nothing.
class Executor {
  public:
    Executor(std::vector<int64_t> shape, int state, Address slots, const Described& net_in)
        : shape_(std::move(shape)), state_(dtype_of(state)), slots_(slots), net_in_(describe(net_in, shape_)) {
        batch_ = shape_.at(0);
        sample_ = 1;
        for (size_t i = 1; i < shape_.size(); ++i) sample_ *= shape_[i];
    }

    void add(const std::vector<Named>& sources, const std::vector<Named>& targets) {
        Bound bound;
        Update& u = bound.update;
        u.batch = batch_;
        u.sample = sample_;
        u.state = state_;
        for (const auto& [kind, index] : sources) {
            if (kind == "one") {
                bound.one = int(bound.columns.size());
                bound.columns.push_back(-1);
                continue;
            }
            if (u.n_in == kMaxInputs) throw std::invalid_argument("sources: at most 8 tensors");
            const int k = u.n_in++;
            bound.columns.push_back(k);
            u.in[k].dtype = kind == "output" ? net_in_.dtype : state_;
            if (kind == "slot") {
                u.in[k].data = slot(index);
            } else if (kind == "input") {
                u.in[k] = net_in_;
            } else if (kind == "start") {
                bound.start = k;
            } else if (kind == "output") {
                if (index < 0 || index > 1) throw std::invalid_argument("sources: at most 2 network outputs");
                bound.output[index] = k;
                u.watch |= 1u << k;
            } else if (kind == "noise") {
                bound.noise.push_back(k);
                u.noise |= 1u << k;
                u.draw[k] = uint32_t(index) + 1;  // draw 0 is the initial state
            } else {
                throw std::invalid_argument("sources: unknown kind " + kind);
            }
        }
        if (bound.one >= 0) bound.columns[size_t(bound.one)] = u.n_in;
        u.columns = u.n_in + 1;
        for (const auto& [kind, index] : targets) {
            if (u.n_out == kMaxOutputs) throw std::invalid_argument("targets: at most 4 tensors");
            Operand& x = u.out[u.n_out++];
            x.dtype = state_;
            if (kind == "result")
                bound.result = u.n_out - 1;
            else if (kind == "input")
                x = net_in_;
            else if (kind == "slot")
                x.data = slot(index);
            else
                throw std::invalid_argument("targets: unknown kind " + kind);
        }
        bounds_.push_back(std::move(bound));
    }

    // New numbers for update i: weights [batch or 1][rows][columns] in the order it was added in, and which are used.
    // `elements`: (row, column, numbers [sample]) of those that differ between elements.
    void load(size_t i, const std::vector<double>& weights, const std::vector<uint32_t>& used,
              const std::vector<std::tuple<int, int, std::vector<double>>>& elements) {
        Bound& bound = bounds_.at(i);
        Update& u = bound.update;
        const size_t rows = size_t(u.n_out), columns = bound.columns.size(), entries = rows * columns;
        const size_t samples = entries ? weights.size() / entries : 1, stride = size_t(u.columns);
        if (used.size() != rows || samples * entries != weights.size() || (samples != 1 && samples != size_t(batch_)))
            throw std::invalid_argument("weights: need [batch or 1][rows][columns] numbers");
        bound.numbers.assign(samples * rows * stride, 0.0);
        for (size_t b = 0; b < samples; ++b)
            for (size_t j = 0; j < rows; ++j)
                for (size_t k = 0; k < columns; ++k)
                    bound.numbers[(b * rows + j) * stride + size_t(bound.columns[k])] =
                        weights[(b * rows + j) * columns + k];
        for (size_t j = 0; j < rows; ++j) {
            u.used[j] = 0;
            for (size_t k = 0; k < columns; ++k)
                if (used[j] >> k & 1) u.used[j] |= 1u << bound.columns[k];
        }
        bound.elements.clear();
        u.per_element = !elements.empty();
        for (auto& row : u.element)
            for (auto& each : row) each = nullptr;
        for (const auto& [j, k, numbers] : elements) {
            if (numbers.size() != size_t(sample_)) throw std::invalid_argument("elements: need one number per element");
            bound.elements.push_back(std::make_unique<Numbers>(numbers));
            u.element[j][bound.columns.at(size_t(k))] = bound.elements.back()->as(state_);
        }
        u.weights = bound.numbers.as(state_);
        u.weights_stride = samples == 1 ? 0 : int64_t(rows * stride);
    }

    // Once per run: where the seeds lie (0: draws come as tensors), and how many threads to use.
    void begin(Address seeds, int threads) {
        seeds_ = static_cast<const int64_t*>(pointer(seeds));
        threads_ = threads;
    }

    // Update i with contiguous tensors of the expected types. True if the network outputs it read are finite.
    bool update(size_t i, Address start, Address result, Address output0, Address output1) {
        Bound& bound = bounds_.at(i);
        Update& u = bound.update;
        if (bound.start >= 0) u.in[bound.start].data = pointer(start);
        if (bound.result >= 0) u.out[bound.result].data = pointer(result);
        if (bound.output[0] >= 0) u.in[bound.output[0]].data = pointer(output0);
        if (bound.output[1] >= 0) u.in[bound.output[1]].data = pointer(output1);
        return run(u);
    }

    // Update i with tensors of any type and order; `noise`: its draws as tensors, or none if they come from the seeds.
    bool update_any(size_t i, const Described& start, const Described& result, const std::vector<Described>& outputs,
                    const std::vector<Described>& noise) {
        const Bound& bound = bounds_.at(i);
        Update u = bound.update;
        if (bound.start >= 0) u.in[bound.start] = describe(start, shape_);
        if (bound.result >= 0) u.out[bound.result] = describe(result, shape_);
        for (int g = 0; g < 2; ++g)
            if (bound.output[g] >= 0) u.in[bound.output[g]] = describe(outputs.at(size_t(g)), shape_);
        if (!noise.empty()) {
            u.noise = 0;
            for (size_t n = 0; n < bound.noise.size(); ++n) u.in[bound.noise[n]] = describe(noise.at(n), shape_);
        }
        return run(u);
    }

  private:
    // Float64 as loaded, or narrowed once for a float32 state.
    struct Numbers {
        std::vector<double> wide;
        std::vector<float> narrow;
        Numbers() = default;
        explicit Numbers(std::vector<double> from) : wide(std::move(from)) {}
        void assign(size_t n, double value) { wide.assign(n, value); }
        double& operator[](size_t i) { return wide[i]; }
        const void* as(DType dtype) {
            if (dtype == DType::f64) return wide.data();
            narrow.assign(wide.begin(), wide.end());
            return narrow.data();
        }
    };

    struct Bound {
        Update update;
        int start = -1, result = -1, one = -1, output[2] = {-1, -1};
        std::vector<int> columns, noise;  // of the sources: their column, and the inputs that are draws
        Numbers numbers;
        std::vector<std::unique_ptr<Numbers>> elements;
    };

    void* slot(int index) const {
        return pointer(slots_ + Address(index) * Address(batch_ * sample_) * (state_ == DType::f64 ? 8 : 4));
    }

    bool run(Update& u) {
        u.seeds = seeds_;
        if (u.noise && !seeds_) throw std::invalid_argument("seeds: this update draws noise");
        if (batch_ * sample_ < kReleaseGil) return combine_cpu(u, 1);
        py::gil_scoped_release release;
        return combine_cpu(u, threads_);
    }

    std::vector<int64_t> shape_;
    DType state_;
    Address slots_;
    Operand net_in_;
    int64_t batch_ = 1, sample_ = 1;
    const int64_t* seeds_ = nullptr;
    int threads_ = 1;
    std::vector<Bound> bounds_;
};

void normal(Address seeds, int64_t batch, uint32_t draw, int64_t count, int dtype, Address out, int threads) {
    py::gil_scoped_release release;
    normal_cpu(static_cast<const int64_t*>(pointer(seeds)), batch, draw, count, dtype_of(dtype), pointer(out), threads);
}

#ifdef FASTODE_CUDA
void launch(Address update, int vector, Address stream) {
    const int error = combine_cuda(*static_cast<const Update*>(pointer(update)), vector, pointer(stream));
    if (error) throw std::runtime_error(std::string("CUDA: ") + cuda_message(error));
}
#endif

}  // namespace
}  // namespace fastode

PYBIND11_MODULE(_native, m) {
    using namespace fastode;
    m.doc() = "The update between two network calls, compiled: see csrc/combine.h.";
    m.attr("MAX_INPUTS") = kMaxInputs;
    m.attr("MAX_OUTPUTS") = kMaxOutputs;
    m.attr("MAX_DIMS") = kMaxDims;
    m.attr("SIZES") = std::make_pair(sizeof(Operand), sizeof(Update));
#ifdef FASTODE_CUDA
    m.attr("CUDA") = true;
    m.def("launch", &launch);
#else
    m.attr("CUDA") = false;
#endif
    py::class_<Executor>(m, "Executor")
        .def(py::init<std::vector<int64_t>, int, uintptr_t, const Described&>())
        .def("add", &Executor::add)
        .def("load", &Executor::load)
        .def("begin", &Executor::begin)
        .def("update", &Executor::update)
        .def("update_any", &Executor::update_any);
    m.def("normal", &normal);
    m.def("cpu_isa", &cpu_isa);
    m.def("set_cpu_isa", &set_cpu_isa);
    m.def("philox", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        const Words r = philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return std::array<uint32_t, 4>{{r.w[0], r.w[1], r.w[2], r.w[3]}};
    });
}
