// The Python module fastode._native: raw pointers in, nothing else. fastode/backends/native.py is its only caller and
// checks everything beforehand; what is wrong here all the same raises ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "combine.h"
#include "numbers.h"
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

    // The late numbers of a run: those that come with a call are set by `set_leaf`, the others are made by `make`.
    void set_leaves(size_t count) { leaves_.assign(count * size_t(batch_), 0.0); }
    void set_leaf(size_t leaf, const std::vector<double>& values) {
        if (leaf * size_t(batch_) >= leaves_.size() || (values.size() != 1 && values.size() != size_t(batch_)))
            throw std::invalid_argument("leaf: need one number or one per sample");
        for (size_t b = 0; b < size_t(batch_); ++b)
            leaves_[leaf * size_t(batch_) + b] = values.size() == 1 ? values[0] : values[b];
    }

    // What is made before update `index`. `matrices`: w1, b1, w2, b2, head, offset, low, high. Numbers of the network
    // go to the leaves `made`; the code reads the leaves `inputs`, then `constants`. Its outputs are written to
    // `entries` (update, row, column), the rest to `levels` (address, dtype), one number per sample.
    void numbers(size_t index, const std::vector<std::vector<float>>& matrices, const std::vector<size_t>& made,
                 const std::vector<size_t>& inputs, const std::vector<double>& constants,
                 const std::vector<std::array<int, 3>>& code, const std::vector<size_t>& outputs,
                 const std::vector<std::array<size_t, 3>>& entries,
                 const std::vector<std::pair<Address, int>>& levels) {
        Made m;
        m.mlp.w1 = matrices.at(0), m.mlp.b1 = matrices.at(1), m.mlp.w2 = matrices.at(2), m.mlp.b2 = matrices.at(3);
        m.mlp.head = matrices.at(4), m.mlp.offset = matrices.at(5), m.mlp.low = matrices.at(6);
        m.mlp.high = matrices.at(7);
        m.mlp.hidden = int64_t(m.mlp.b1.size()), m.mlp.width = int64_t(m.mlp.b2.size());
        m.mlp.heads = int64_t(m.mlp.offset.size());
        m.mlp.inputs = m.mlp.hidden ? int64_t(m.mlp.w1.size()) / m.mlp.hidden : 0;
        m.made = made, m.inputs = inputs, m.outputs = outputs, m.entries = entries, m.levels = levels;
        m.registers.assign((inputs.size() + constants.size() + code.size()) * size_t(batch_), 0.0);
        for (size_t k = 0; k < constants.size(); ++k)
            for (size_t b = 0; b < size_t(batch_); ++b)
                m.registers[(inputs.size() + k) * size_t(batch_) + b] = constants[k];
        m.first = int64_t(inputs.size() + constants.size());
        for (const auto& [op, a, b] : code) {
            if (op < 0 || op >= int(Op::count)) throw std::invalid_argument("code: unknown operation");
            m.code.push_back({Op(op), a, b});
        }
        if (made_.size() <= index) made_.resize(index + 1);
        made_[index] = std::move(m);
    }

    // Makes the numbers of update `index` from a feature [batch, channels, inputs] and writes all weights that wait for
    // them.
    void make(size_t index, Address data, int dtype, int64_t channels, int64_t inputs, int64_t stride_b,
              int64_t stride_c, int64_t stride_p) {
        Made& m = made_.at(index);
        if (inputs != m.mlp.inputs) throw std::invalid_argument("feature: of another size than the network's");
        Feature f{pointer(data), dtype_of(dtype), channels, stride_b, stride_c, stride_p};
        const size_t batch = size_t(batch_);
        fresh_.resize(size_t(m.mlp.heads) * batch);
        pooled_mlp(m.mlp, f, batch_, fresh_.data());
        for (size_t k = 0; k < m.made.size(); ++k) std::copy_n(&fresh_[k * batch], batch, &leaves_[m.made[k] * batch]);
        for (size_t k = 0; k < m.inputs.size(); ++k)
            std::copy_n(&leaves_[m.inputs[k] * batch], batch, &m.registers[k * batch]);
        run_code(m.code, m.first, batch_, m.registers.data());
        for (size_t k = 0; k < m.entries.size(); ++k) {
            const auto [update, row, column] = m.entries[k];
            Bound& bound = bounds_.at(update);
            const size_t stride = size_t(bound.update.columns), rows = size_t(bound.update.n_out);
            const size_t at = row * stride + size_t(bound.columns.at(column));
            const double* from = &m.registers[m.outputs[k] * batch];
            for (size_t b = 0; b < batch; ++b) bound.numbers.set(b * rows * stride + at, from[b], state_);
        }
        for (size_t k = 0; k < m.levels.size(); ++k) {
            const double* from = &m.registers[m.outputs[m.entries.size() + k] * batch];
            const auto [address, kind] = m.levels[k];
            for (size_t b = 0; b < batch; ++b) {
                if (dtype_of(kind) == DType::f64)
                    static_cast<double*>(pointer(address))[b] = from[b];
                else
                    static_cast<float*>(pointer(address))[b] = float(from[b]);
            }
        }
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
        void set(size_t i, double value, DType dtype) {
            wide[i] = value;
            if (dtype != DType::f64) narrow[i] = float(value);
        }
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

    struct Made {
        Mlp mlp;
        std::vector<size_t> made, inputs, outputs;
        std::vector<Instruction> code;
        std::vector<double> registers;
        int64_t first = 0;
        std::vector<std::array<size_t, 3>> entries;
        std::vector<std::pair<Address, int>> levels;
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
    std::vector<Made> made_;
    std::vector<double> leaves_, fresh_;
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
        .def("set_leaves", &Executor::set_leaves)
        .def("set_leaf", &Executor::set_leaf)
        .def("numbers", &Executor::numbers)
        .def("make", &Executor::make)
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
