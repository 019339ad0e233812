// Packed weights and the product with them.
#include "bind.h"

namespace weft {

namespace {

// Owns the panels and the padded bias.
class PackedLinear {
 public:
  PackedLinear(Backend& backend, uintptr_t weight, int64_t row_stride, uintptr_t bias, int64_t out, int64_t in, int type)
      : weights_{Type(type), in, out, nullptr, nullptr} {
    Pool& pool = backend.pool();
    panels_ = Memory(size_t(weights_.panel_count() * weights_.panel_bytes()));
    backend.kernels().pack_linear(pool, weights_, at<void>(weight), row_stride, panels_.data());
    weights_.panels = panels_.data();
    if (bias == 0) return;
    bias_ = Memory(size_t(weights_.panel_count() * PANEL) * sizeof(float));
    const float* given = at<const float>(bias);
    for (int64_t i = 0; i < out; i++) bias_.as<float>()[i] = given[i];
    weights_.bias = bias_.as<float>();
  }

  const LinearWeights& weights() const {
    if (weights_.panels == nullptr) throw std::runtime_error("the packed weights are released");
    return weights_;
  }
  size_t bytes() const { return panels_.bytes() + bias_.bytes(); }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(panels_.data()); }
  void release() {
    panels_.release();
    bias_.release();
    weights_.panels = weights_.bias = nullptr;
  }

 private:
  Memory panels_, bias_;
  LinearWeights weights_;
};

}  // namespace

void bind_linear(nb::module_& module, BackendClass& backend) {
  nb::class_<PackedLinear>(module, "PackedLinear")
      .def(nb::init<Backend&, uintptr_t, int64_t, uintptr_t, int64_t, int64_t, int>(), nb::arg("backend"),
           nb::arg("weight"), nb::arg("row_stride"), nb::arg("bias"), nb::arg("out"), nb::arg("in_"), nb::arg("type"),
           unlocked())
      .def_prop_ro("address", &PackedLinear::address)
      .def_prop_ro("bytes", &PackedLinear::bytes)
      .def("release", &PackedLinear::release);

  backend.def(
      "linear",
      [](Backend& self, const PackedLinear& packed, uintptr_t x, int64_t rows, uintptr_t y, int type) {
        self.kernels().linear(self.pool(), packed.weights(), at<const void>(x), rows, at<void>(y), Type(type));
      },
      nb::arg("packed"), nb::arg("x"), nb::arg("rows"), nb::arg("y"), nb::arg("type"), unlocked());
}

}  // namespace weft
