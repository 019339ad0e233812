// 4-bit weights, quantised inputs, and their product.
#include "bind.h"
#include "packed.h"

namespace weft {

void bind_w4ax(nb::module_& module, BackendClass& backend) {
  nb::class_<PackedW4Ax>(module, "PackedW4Ax")
      .def(nb::init<Backend&, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t,
                    bool, bool, bool>(),
           nb::arg("backend"), nb::arg("values"), nb::arg("scales"), nb::arg("zeros"), nb::arg("bias"),
           nb::arg("permutation"), nb::arg("out"), nb::arg("in_"), nb::arg("outlier_blocks"), nb::arg("wide_blocks"),
           nb::arg("hadamard"), nb::arg("exact_a4"), nb::arg("general"), unlocked())
      .def_prop_ro("address", &PackedW4Ax::address)
      .def_prop_ro("bytes", &PackedW4Ax::bytes)
      .def_prop_ro("wire_bytes", [](const PackedW4Ax& self) { return self.weights().wire_bytes(); })
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
