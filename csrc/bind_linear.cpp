// Packed weights and the product with them.
#include "bind.h"
#include "packed.h"

namespace weft {

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
