#include "levels.h"

namespace weft {

namespace portable {
extern const Kernels kernels;
}
#ifdef WEFT_X86
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef WEFT_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

#ifdef WEFT_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#ifdef WEFT_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#endif

constexpr Level LEVELS[] = {
#ifdef WEFT_AVX512
    {"avx512", &avx512::kernels, has_avx512},
#endif
#ifdef WEFT_X86
    {"avx2", &avx2::kernels, has_avx2},
#endif
    {"portable", &portable::kernels, [] { return true; }},
};

}  // namespace

std::vector<std::string> levels() {
  std::vector<std::string> found;
  for (const Level& level : LEVELS)
    if (level.supported()) found.emplace_back(level.name);
  return found;
}

const Kernels* find_kernels(const std::string& name) {
  for (const Level& level : LEVELS)
    if (name == level.name && level.supported()) return level.kernels;
  return nullptr;
}

}  // namespace weft
