// The table of this level's kernels. Each file of this folder defines the functions that are named here.
#include "kernels.h"

namespace weft::WEFT_LEVEL {

void pack_linear(Pool& pool, const LinearWeights& shape, const void* weight, int64_t row_stride, void* panels);
void linear(Pool& pool, const LinearWeights& weights, const void* x, int64_t rows, void* y);

extern const Kernels kernels;
const Kernels kernels = {
    .pack_linear = pack_linear,
    .linear = linear,
};

}  // namespace weft::WEFT_LEVEL
