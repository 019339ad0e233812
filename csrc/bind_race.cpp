// Drawing a token: which ones may win.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bind.h"
#include "packed.h"
#include "race.h"

namespace weft {
namespace {

constexpr int64_t MOST = 256;

std::optional<std::vector<int64_t>> contenders(const std::string& level, uintptr_t logits, int64_t size, float peak,
                                               float temperature, uint32_t low, uint32_t high) {
  const Kernels* kernels = find_kernels(level);
  if (kernels == nullptr) throw std::invalid_argument("this CPU cannot run the kernels of level " + level);
  std::vector<float> bounds(size_t((size + RACE_CHUNK - 1) / RACE_CHUNK));
  std::vector<int64_t> found(MOST);
  const RaceCall call{at<const float>(logits), size, peak, 1 / temperature, low, high, bounds.data()};
  const int64_t count = kernels->contenders(call, found.data(), MOST);
  if (count > MOST) return std::nullopt;
  found.resize(size_t(count));
  return found;
}

}  // namespace

void bind_race(nb::module_& module) {
  using nb::arg;
  module.def("contenders", &contenders, arg("level"), arg("logits"), arg("size"), arg("peak"), arg("temperature"),
             arg("low"), arg("high"), unlocked());
}

}  // namespace weft
