// The limits of the machine, for benchmarks.
#include "bind.h"

namespace weft {

void bind_probe(BackendClass& backend) {
  backend.def(
      "probe_read",
      [](Backend& self, const Memory& memory) {
        self.kernels().probe_read(self.pool(), memory.data(), int64_t(memory.bytes()));
      },
      nb::arg("memory"), unlocked());
  backend.def(
      "probe_multiply",
      [](Backend& self, int type, int64_t steps) {
        return self.kernels().probe_multiply(self.pool(), Type(type), steps);
      },
      nb::arg("type"), nb::arg("steps"), unlocked());
  backend.def(
      "probe_integers",
      [](Backend& self, int64_t steps) { return self.kernels().probe_integers(self.pool(), steps); }, nb::arg("steps"),
      unlocked());
}

}  // namespace weft
