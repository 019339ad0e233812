#include "kernels.h"
namespace weft::WEFT_LEVEL {
void pack_linear(Pool&, const LinearWeights&, const void*, int64_t, void*) {}
void linear(Pool&, const LinearWeights&, const void*, int64_t, void*) {}
}  // namespace weft::WEFT_LEVEL
