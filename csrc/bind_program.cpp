// The program of a model's step: recorded from Python, call by call, and then run as one.
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "program.h"

namespace weft {

namespace {

// The items of a tuple of integers, appended.
template <class T>
void append(nb::handle integers, std::vector<T>& to) {
  const nb::tuple items = nb::cast<nb::tuple>(integers);
  for (nb::handle item : items) to.push_back(nb::cast<T>(item));
}

// Places in a weft.core.plan.Slice, a named tuple: to look a field up by its name takes several times as long.
enum SliceField : Py_ssize_t { START = 1, TOKENS = 2, BLOCKS = 3 };

nb::handle field(nb::handle slice, SliceField place) { return PyTuple_GET_ITEM(slice.ptr(), place); }

// The block tables of the last step. A sequence that goes on brings the same tuple with every step until it grows, and
// the kernels have driven its integers out of all caches by then: to read each out of its object would take longer than
// all else here.
class Tables {
 public:
  // The blocks of the slice of this number in its step; valid until the next call.
  const std::vector<int32_t>& of(size_t slice, nb::handle table) {
    if (slice >= seen_.size()) seen_.resize(slice + 1);
    Seen& seen = seen_[slice];
    if (!seen.table.is(table)) {
      seen.table = nb::object();  // should an integer be out of range
      seen.blocks.clear();
      append(table, seen.blocks);
      seen.table = nb::borrow(table);
    }
    return seen.blocks;
  }

 private:
  struct Seen {
    nb::object table;  // kept alive, so that no other tuple has its address
    std::vector<int32_t> blocks;
  };
  std::vector<Seen> seen_;
};

// slices: a sequence of weft.core.plan.Slice. Returns (number, value) of the greatest logit of each sampled row.
template <auto RUN>
nb::list run(Program& self, Backend& backend, nb::sequence slices, Tables& tables, int64_t block_size,
             const std::vector<int64_t>& sampled, size_t first, size_t last) {
  StepBatch& batch = self.batch();
  batch.clear();
  size_t number = 0;
  for (nb::handle slice : slices) {
    if (!PyTuple_Check(slice.ptr()) || PyTuple_GET_SIZE(slice.ptr()) <= BLOCKS)
      throw nb::type_error("slices must be of weft.core.plan.Slice");
    append(field(slice, TOKENS), batch.tokens);
    const std::vector<int32_t>& blocks = tables.of(number++, field(slice, BLOCKS));
    batch.blocks().insert(batch.blocks().end(), blocks.begin(), blocks.end());
    batch.add_slice(nb::cast<int64_t>(field(slice, START)), block_size);
  }
  {
    nb::gil_scoped_release unlocked;
    (self.*RUN)(backend, batch.view(), batch.tokens.data(), sampled, first, last);
  }
  nb::list best;
  for (const Best& one : self.best()) best.append(nb::make_tuple(one.number, one.value));
  return best;
}

NormForm norm_form(int type, uintptr_t weight, float eps, int64_t size) {
  return {Type(type), at<const void>(weight), eps, size};
}

void bind_recording(nb::class_<Program>& program) {
  using nb::arg;
  program
      .def(
          "embed",
          [](Program& self, const PackedEmbedding& table, int type, int64_t out) {
            self.embed(table, Type(type), out);
          },
          arg("table"), arg("type"), arg("out"))
      .def(
          "norm",
          [](Program& self, int type, uintptr_t weight, float eps, int64_t size, int domain, int64_t x, int64_t residual,
             int64_t out) { self.norm(norm_form(type, weight, eps, size), Domain(domain), x, residual, out); },
          arg("type"), arg("weight"), arg("eps"), arg("size"), arg("domain"), arg("x"), arg("residual"), arg("out"))
      .def(
          "linear",
          [](Program& self, const PackedLinear& packed, int domain, int64_t x, int64_t y, int type) {
            self.linear(packed, Domain(domain), x, y, Type(type));
          },
          arg("packed"), arg("domain"), arg("x"), arg("y"), arg("type"))
      .def(
          "quantise",
          [](Program& self, const PackedW4Ax& packed, int domain, int64_t x, int type, int64_t out) {
            self.quantise(packed, Domain(domain), x, Type(type), out);
          },
          arg("packed"), arg("domain"), arg("x"), arg("type"), arg("out"))
      .def(
          "norm_quantise",
          [](Program& self, int type, uintptr_t weight, float eps, int64_t size, int domain, int64_t x, int64_t residual,
             int64_t between, const PackedW4Ax& packed, int64_t out) {
            self.norm_quantise(norm_form(type, weight, eps, size), Domain(domain), x, residual, between, packed, out);
          },
          arg("type"), arg("weight"), arg("eps"), arg("size"), arg("domain"), arg("x"), arg("residual"), arg("between"),
          arg("packed"), arg("out"))
      .def(
          "silu_mul_quantise",
          [](Program& self, int type, int domain, int64_t gate_up, int64_t size, int64_t between,
             const PackedW4Ax& packed, int64_t out) {
            self.silu_mul_quantise(Type(type), Domain(domain), gate_up, size, between, packed, out);
          },
          arg("type"), arg("domain"), arg("gate_up"), arg("size"), arg("between"), arg("packed"), arg("out"))
      .def(
          "multiply",
          [](Program& self, const PackedW4Ax& packed, int domain, int64_t x, int64_t y, int type) {
            self.multiply(packed, Domain(domain), x, y, Type(type));
          },
          arg("packed"), arg("domain"), arg("x"), arg("y"), arg("type"))
      .def(
          "rotary_write",
          [](Program& self, const LayerKv& kv, uintptr_t cos, uintptr_t sin, int64_t max_positions, int64_t heads,
             uintptr_t q_norm, uintptr_t k_norm, float eps, int64_t qkv, int64_t q) {
            self.rotary_write(kv,
                              {at<const float>(cos), at<const float>(sin), max_positions, heads, at<const void>(q_norm),
                               at<const void>(k_norm), eps},
                              qkv, q);
          },
          arg("kv"), arg("cos"), arg("sin"), arg("max_positions"), arg("heads"), arg("q_norm"), arg("k_norm"),
          arg("eps"), arg("qkv"), arg("q"))
      .def(
          "attention",
          [](Program& self, const LayerKv& kv, int64_t heads, float scale, int64_t window, int64_t q, int64_t out) {
            self.attention(kv, {heads, scale, window}, q, out);
          },
          arg("kv"), arg("heads"), arg("scale"), arg("window"), arg("q"), arg("out"))
      .def(
          "silu_mul",
          [](Program& self, int type, int domain, int64_t gate_up, int64_t size, int64_t out) {
            self.silu_mul(Type(type), Domain(domain), gate_up, size, out);
          },
          arg("type"), arg("domain"), arg("gate_up"), arg("size"), arg("out"))
      .def("best", nb::overload_cast<int64_t, int64_t>(&Program::best), arg("x"), arg("size"))
      .def("take", &Program::take, arg("x"), arg("row_bytes"), arg("out"))
      .def(
          "seam",
          [](Program& self, Seams& group, int type, uintptr_t weight, float eps, int64_t size, int domain, int64_t x,
             int64_t residual, int64_t out) {
            self.seam(group, norm_form(type, weight, eps, size), Domain(domain), x, residual, out);
          },
          arg("group"), arg("type"), arg("weight"), arg("eps"), arg("size"), arg("domain"), arg("x"), arg("residual"),
          arg("out"))
      .def("own_rows", &Program::own_rows, arg("group"), arg("x"), arg("row_bytes"), arg("out"))
      .def("take_own", &Program::take_own, arg("group"), arg("residual"), arg("row_bytes"), arg("out"));
}

}  // namespace

void bind_program(nb::module_& module) {
  using nb::arg;
  nb::class_<Tables>(module, "Tables").def(nb::init<>());
  nb::class_<Program> program(module, "Program");
  program
      .def(
          "__init__",
          [](Program* self, uintptr_t arena, int64_t max_rows, uintptr_t sampled_arena, int64_t max_sampled) {
            new (self) Program(at<char>(arena), max_rows, at<char>(sampled_arena), max_sampled);
          },
          arg("arena"), arg("max_rows"), arg("sampled_arena"), arg("max_sampled"))
      .def("run", &run<&Program::run>, arg("backend"), arg("slices"), arg("tables"), arg("block_size"), arg("sampled"),
           arg("first"), arg("last"))
      .def("run_timed", &run<&Program::run_timed>, arg("backend"), arg("slices"), arg("tables"), arg("block_size"),
           arg("sampled"), arg("first"), arg("last"))
      .def_prop_ro("seconds", &Program::seconds);
  bind_recording(program);
}

}  // namespace weft
