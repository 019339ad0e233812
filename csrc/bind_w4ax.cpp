// 4-bit weights, quantised inputs, and their product.
#include "bind.h"
#include "w4ax.h"

namespace weft {

namespace {

// Owns the panels, the padded bias and the permutation.
class PackedW4Ax {
 public:
  PackedW4Ax(Backend& backend, uintptr_t values, uintptr_t scales, uintptr_t bias, uintptr_t permutation, int64_t out,
             int64_t in, int64_t outlier_blocks, int64_t wide_blocks, bool hadamard, bool exact_a4)
      : weights_{in, out, outlier_blocks, wide_blocks, hadamard, exact_a4, nullptr, nullptr, nullptr} {
    Pool& pool = backend.pool();
    panels_ = Memory(size_t(weights_.panel_count() * weights_.panel_bytes()));
    backend.kernels().pack_w4ax(pool, weights_, at<const int8_t>(values), at<const bf16>(scales), panels_.data());
    weights_.panels = panels_.data();
    if (bias != 0) weights_.bias = copy(bias_, at<const float>(bias), out, weights_.panel_count() * PANEL);
    if (permutation != 0) weights_.permutation = copy(permutation_, at<const int32_t>(permutation), in, in);
  }

  const W4AxWeights& weights() const {
    if (weights_.panels == nullptr) throw std::runtime_error("the packed weights are released");
    return weights_;
  }
  size_t bytes() const { return panels_.bytes() + bias_.bytes() + permutation_.bytes(); }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(panels_.data()); }
  void release() {
    panels_.release();
    bias_.release();
    permutation_.release();
    weights_.panels = nullptr;
  }

 private:
  template <class T>
  static const T* copy(Memory& to, const T* from, int64_t count, int64_t room) {
    to = Memory(size_t(room) * sizeof(T));
    for (int64_t i = 0; i < count; i++) to.as<T>()[i] = from[i];
    return to.as<T>();
  }

  Memory panels_, bias_, permutation_;
  W4AxWeights weights_;
};

}  // namespace

void bind_w4ax(nb::module_& module, BackendClass& backend) {
  nb::class_<PackedW4Ax>(module, "PackedW4Ax")
      .def(nb::init<Backend&, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, bool,
                    bool>(),
           nb::arg("backend"), nb::arg("values"), nb::arg("scales"), nb::arg("bias"), nb::arg("permutation"),
           nb::arg("out"), nb::arg("in_"), nb::arg("outlier_blocks"), nb::arg("wide_blocks"), nb::arg("hadamard"),
           nb::arg("exact_a4"), unlocked())
      .def_prop_ro("address", &PackedW4Ax::address)
      .def_prop_ro("bytes", &PackedW4Ax::bytes)
      .def("release", &PackedW4Ax::release);

  backend.def(
      "quantise_w4ax",
      [](Backend& self, const PackedW4Ax& packed, uintptr_t x, int64_t rows, int type, uintptr_t quantised) {
        const W4AxWeights& weights = packed.weights();
        const QuantisedRows to(at<void>(quantised), rows, weights.blocks());
        self.kernels().quantise_w4ax(self.pool(), weights, at<const void>(x), Type(type), to);
      },
      nb::arg("packed"), nb::arg("x"), nb::arg("rows"), nb::arg("type"), nb::arg("quantised"), unlocked());
  backend.def(
      "multiply_w4ax",
      [](Backend& self, const PackedW4Ax& packed, uintptr_t quantised, int64_t rows, uintptr_t y, int type) {
        const W4AxWeights& weights = packed.weights();
        const QuantisedRows x(at<void>(quantised), rows, weights.blocks());
        self.kernels().multiply_w4ax(self.pool(), weights, x, at<void>(y), Type(type));
      },
      nb::arg("packed"), nb::arg("quantised"), nb::arg("rows"), nb::arg("y"), nb::arg("type"), unlocked());
}

}  // namespace weft
