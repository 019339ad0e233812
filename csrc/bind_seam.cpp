// The ranks of one host at a seam, and quantised rows on their way.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "distant.h"
#include "links.h"
#include "packed.h"
#include "seam.h"
#include "seam_thread.h"

namespace weft {

void bind_seam(nb::module_& module, BackendClass& backend) {
  using nb::arg;
  nb::class_<Seams>(module, "Seams")
      .def_prop_ro("rank", &Seams::rank)
      .def_prop_ro("ranks", &Seams::ranks)
      .def(
          "start",
          [](Seams& self, Backend& backend, uint64_t plan, int type, int part_type, uintptr_t partial,
             std::vector<int64_t> bounds, uintptr_t residual, uintptr_t weight, float eps, int64_t size, uintptr_t out,
             const PackedW4Ax* packed) {
            const bool plain = packed == nullptr;
            const int64_t rows = bounds.back();
            self.start(backend, {
                .plan = {plan, rows},
                .type = Type(type),
                .part_type = Type(part_type),
                .partial = at<const char>(partial),
                .bounds = std::move(bounds),
                .residual = at<char>(residual),
                .weight = at<const void>(weight),
                .eps = eps,
                .size = size,
                .hidden = plain ? at<char>(out) : nullptr,
                .quantised = plain ? nullptr : at<void>(out),
                .form = plain ? nullptr : &packed->weights(),
            });
          },
          arg("backend"), arg("plan"), arg("type"), arg("part_type"), arg("partial"), arg("bounds"), arg("residual"),
          arg("weight"), arg("eps"), arg("size"), arg("out"), arg("packed").none(), unlocked())
      .def("finish", &Seams::finish, arg("backend"), unlocked())
      .def(
          "gather",
          [](Seams& self, Backend& backend, uint64_t plan, int64_t rows, uintptr_t from, int64_t bytes,
             uintptr_t out) { self.gather(backend, {plan, rows}, at<const char>(from), bytes, at<char>(out)); },
          arg("backend"), arg("plan"), arg("rows"), arg("from_"), arg("bytes"), arg("out"), unlocked())
      .def("leave", &Seams::leave, unlocked());
  nb::class_<SeamGroup, Seams>(module, "SeamGroup")
      .def(nb::init<const std::string&, int, int, int64_t, double, double>(), arg("path"), arg("rank"), arg("ranks"),
           arg("slot_bytes"), arg("timeout"), arg("spin"), unlocked())
      .def_prop_rw("spin", &SeamGroup::spin, &SeamGroup::set_spin);
  nb::class_<Links, Seams>(module, "Links")
      .def(nb::init<int, std::vector<int>, double>(), arg("rank"), arg("files"), arg("timeout"));
  nb::class_<DistantSeams, Seams>(module, "DistantSeams")
      .def(nb::init<Seams&>(), arg("seams"), nb::keep_alive<1, 2>())
      .def_prop_rw("seconds", &DistantSeams::seconds, &DistantSeams::set_seconds);
  nb::class_<SeamThread, Seams>(module, "SeamThread")
      .def(nb::init<Seams&, const std::vector<int>&>(), arg("seams"), arg("cores"), nb::keep_alive<1, 2>())
      .def("set_cores", &SeamThread::set_cores, arg("cores"));

  backend.def(
      "join_rows",
      [](Backend& self, int type, int part_type, const std::vector<uintptr_t>& parts, uintptr_t residual,
         uintptr_t weight, float eps, int64_t rows, int64_t size, uintptr_t out, uintptr_t wire,
         const PackedW4Ax* packed) {
        const std::vector<const void*> pointers = [&] {
          std::vector<const void*> found;
          for (uintptr_t part : parts) found.push_back(at<const void>(part));
          return found;
        }();
        self.kernels().join_rows(self.pool(), {
            .type = Type(type),
            .part_type = Type(part_type),
            .parts = pointers.data(),
            .count = int64_t(pointers.size()),
            .residual = at<void>(residual),
            .weight = at<const void>(weight),
            .eps = eps,
            .rows = rows,
            .size = size,
            .out = at<void>(out),
            .wire = at<char>(wire),
            .form = packed == nullptr ? nullptr : &packed->weights(),
        });
      },
      arg("type"), arg("part_type"), arg("parts"), arg("residual"), arg("weight"), arg("eps"), arg("rows"),
      arg("size"), arg("out"), arg("wire"), arg("packed").none(), unlocked());
  backend.def(
      "encode_rows",
      [](Backend& self, const PackedW4Ax& packed, uintptr_t x, int64_t rows, int type, uintptr_t wire) {
        self.kernels().encode_rows(self.pool(), packed.weights(), at<const void>(x), Type(type), rows, at<char>(wire));
      },
      arg("packed"), arg("x"), arg("rows"), arg("type"), arg("wire"), unlocked());
  backend.def(
      "decode_rows",
      [](Backend& self, const PackedW4Ax& packed, uintptr_t wire, int64_t rows, uintptr_t quantised) {
        const W4AxWeights& form = packed.weights();
        self.kernels().decode_rows(self.pool(), form, at<const char>(wire), 0, rows,
                                   {at<void>(quantised), rows, form.blocks()});
      },
      arg("packed"), arg("wire"), arg("rows"), arg("quantised"), unlocked());
}

}  // namespace weft
