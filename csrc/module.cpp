// The module weft._native. Its types for Python are in src/weft/_native.pyi.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"

NB_MODULE(_native, module) {
  using namespace weft;
  nb::set_leak_warnings(false);  // what is still open when the interpreter ends goes with the process

  module.def("levels", &levels);

  nb::class_<Memory>(module, "Memory")
      .def("__init__",
           [](Memory* self, size_t bytes, Backend& backend) {
             new (self) Memory(bytes);
             self->touch(backend.pool());
           },
           nb::arg("bytes"), nb::arg("backend"), unlocked())
      .def_prop_ro("address", [](const Memory& self) { return reinterpret_cast<uintptr_t>(self.data()); })
      .def_prop_ro("bytes", &Memory::bytes)
      .def("release", &Memory::release);

  BackendClass backend(module, "Backend");
  backend.def(nb::init<const std::string&, const std::vector<int>&>(), nb::arg("level"), nb::arg("cores"))
      .def_prop_ro("threads", [](const Backend& self) { return self.pool().size(); })
      .def("set_cores", [](Backend& self, const std::vector<int>& cores) { self.pool().set_cores(cores); }, unlocked())
      .def("close", &Backend::close, unlocked());
  bind_embedding(module, backend);
  bind_linear(module, backend);
  bind_w4ax(module, backend);
  bind_seam(module, backend);
  bind_probe(backend);
  bind_program(module);
  bind_race(module);
  bind_attention(module, backend);
}
