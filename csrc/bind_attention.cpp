// Attention, rotation, norms and gates.
#include <nanobind/stl/vector.h>

#include "attention_plan.h"
#include "bind.h"
#include "elementwise.h"
#include "packed.h"

namespace weft {

namespace {

void attention(Backend& self, const LayerKv& kv, const BatchView& batch, uintptr_t q, int64_t heads, float scale,
               int64_t window, uintptr_t out) {
  AttentionCall call{};
  call.type = kv.type();
  call.q = at<const void>(q);
  call.out = at<void>(out);
  call.kv = kv.view();
  call.batch = batch;
  call.heads = heads;
  call.scale = scale;
  call.window = window;
  attend(self, call);
}

void rotary_write(Backend& self, const LayerKv& kv, const BatchView& batch, uintptr_t qkv, uintptr_t cos, uintptr_t sin,
                  int64_t max_positions, int64_t heads, uintptr_t q_norm, uintptr_t k_norm, float eps, uintptr_t q) {
  check_rows(batch, kv.view(), max_positions);
  self.kernels().rotary_write(
      self.pool(), {kv.type(), at<const void>(qkv), at<const float>(cos), at<const float>(sin), kv.view(), batch, heads,
                    at<const void>(q_norm), at<const void>(k_norm), eps, at<void>(q)});
}

void norm(Backend& self, int type, uintptr_t x, uintptr_t residual, uintptr_t weight, float eps, int64_t rows,
          int64_t size, uintptr_t out) {
  self.kernels().norm(self.pool(), {Type(type), at<const void>(x), at<void>(residual), at<const void>(weight), eps,
                                    rows, size, at<void>(out)});
}

void silu_mul(Backend& self, int type, uintptr_t gate_up, int64_t rows, int64_t size, uintptr_t out) {
  self.kernels().silu_mul(self.pool(), {Type(type), at<const void>(gate_up), rows, size, at<void>(out)});
}

}  // namespace

void bind_attention(nb::module_& module, BackendClass& backend) {
  using nb::arg;
  nb::class_<LayerKv>(module, "LayerKv")
      .def(nb::init<Backend&, int64_t, int64_t, int64_t, int64_t, int, int>(), arg("backend"), arg("blocks"),
           arg("block_size"), arg("kv_heads"), arg("head_dim"), arg("type"), arg("bits"), unlocked())
      .def_prop_ro("address", &LayerKv::address)
      .def_prop_ro("bytes", &LayerKv::bytes)
      .def("copy", &LayerKv::copy, arg("source"), arg("target"), unlocked())
      .def("release", &LayerKv::release);

  nb::class_<BatchView>(module, "BatchView")
      .def(
          "__init__",
          [](BatchView* self, int64_t rows, int64_t slices, int64_t table_width, uintptr_t positions, uintptr_t slots,
             uintptr_t starts, uintptr_t contexts, uintptr_t tables) {
            new (self) BatchView{rows,
                                 slices,
                                 table_width,
                                 at<const int32_t>(positions),
                                 at<const int64_t>(slots),
                                 at<const int32_t>(starts),
                                 at<const int32_t>(contexts),
                                 at<const int32_t>(tables)};
          },
          arg("rows"), arg("slices"), arg("table_width"), arg("positions"), arg("slots"), arg("starts"),
          arg("contexts"), arg("tables"));

  backend
      .def("attention", &attention, arg("kv"), arg("batch"), arg("q"), arg("heads"), arg("scale"), arg("window"),
           arg("out"), unlocked())
      .def("rotary_write", &rotary_write, arg("kv"), arg("batch"), arg("qkv"), arg("cos"), arg("sin"),
           arg("max_positions"), arg("heads"), arg("q_norm"), arg("k_norm"), arg("eps"), arg("q"), unlocked())
      .def("norm", &norm, arg("type"), arg("x"), arg("residual"), arg("weight"), arg("eps"), arg("rows"), arg("size"),
           arg("out"), unlocked())
      .def("silu_mul", &silu_mul, arg("type"), arg("gate_up"), arg("rows"), arg("size"), arg("out"), unlocked());
}

}  // namespace weft
