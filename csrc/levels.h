// Which levels exist in this build, and which of them this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace weft {

// Names of the levels that this CPU can run, best first.
std::vector<std::string> levels();

// The kernels of a level; null when this build lacks it or this CPU cannot run it.
const Kernels* find_kernels(const std::string& level);

}  // namespace weft
