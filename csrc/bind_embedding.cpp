// The embedding table, and looking tokens up in it.
#include "bind.h"
#include "packed.h"

namespace weft {

void bind_embedding(nb::module_& module, BackendClass& backend) {
  using nb::arg;
  nb::class_<PackedEmbedding>(module, "PackedEmbedding")
      .def(nb::init<Backend&, uintptr_t, uintptr_t, int64_t, int64_t, int>(), arg("backend"), arg("data"), arg("scales"),
           arg("rows"), arg("size"), arg("stored"), unlocked())
      .def_prop_ro("address", &PackedEmbedding::address)
      .def_prop_ro("bytes", &PackedEmbedding::bytes)
      .def("release", &PackedEmbedding::release);

  backend.def(
      "embed",
      [](Backend& self, const PackedEmbedding& table, uintptr_t tokens, int64_t count, uintptr_t out, int type) {
        const EmbedCall call{Type(type), at<const int64_t>(tokens), count, at<void>(out)};
        table.check(call.tokens, count);
        self.kernels().embed(self.pool(), table.table(), call);
      },
      arg("table"), arg("tokens"), arg("count"), arg("out"), arg("type"), unlocked());
}

}  // namespace weft
