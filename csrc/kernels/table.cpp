// The table of this level's kernels. Each file of this folder defines the functions that are named here.
#include "kernels.h"

namespace weft::WEFT_LEVEL {

void pack_linear(Pool& pool, const LinearWeights& shape, const void* weight, int64_t row_stride, void* panels);
void linear(Pool& pool, const LinearWeights& weights, const void* x, int64_t rows, void* y, Type type);
void pack_w4ax(Pool& pool, const W4AxWeights& shape, const W4AxSource& from, char* panels);
void quantise_w4ax(Pool& pool, const W4AxWeights& form, const void* x, Type type, const QuantisedRows& to);
void norm_quantise(Pool& pool, const NormCall& call, const W4AxWeights& form, const QuantisedRows& to);
void silu_mul_quantise(Pool& pool, const GateCall& call, const W4AxWeights& form, const QuantisedRows& to);
void multiply_w4ax(Pool& pool, const W4AxWeights& weights, const QuantisedRows& x, void* y, Type type);
void join_rows(Pool& pool, const JoinCall& call);
void encode_rows(Pool& pool, const W4AxWeights& form, const void* x, Type type, int64_t rows, char* wire);
void decode_rows(Pool& pool, const W4AxWeights& form, const char* wire, int64_t first, int64_t count,
                 const QuantisedRows& to);
void probe_read(Pool& pool, const void* memory, int64_t bytes);
int64_t probe_multiply(Pool& pool, Type type, int64_t steps);
int64_t probe_integers(Pool& pool, int64_t steps);
void embed(Pool& pool, const EmbeddingTable& table, const EmbedCall& call);
void norm(Pool& pool, const NormCall& call);
void best_of_rows(Pool& pool, const BestCall& call);
int64_t contenders(const RaceCall& call, int64_t* out, int64_t most);
void silu_mul(Pool& pool, const GateCall& call);
void rotary_write(Pool& pool, const RotaryCall& call);
void attention(Pool& pool, const AttentionCall& call);

extern const Kernels kernels;
const Kernels kernels = {
    .pack_linear = pack_linear,
    .linear = linear,
    .pack_w4ax = pack_w4ax,
    .quantise_w4ax = quantise_w4ax,
    .norm_quantise = norm_quantise,
    .silu_mul_quantise = silu_mul_quantise,
    .multiply_w4ax = multiply_w4ax,
    .join_rows = join_rows,
    .encode_rows = encode_rows,
    .decode_rows = decode_rows,
    .probe_read = probe_read,
    .probe_multiply = probe_multiply,
    .probe_integers = probe_integers,
    .embed = embed,
    .norm = norm,
    .best_of_rows = best_of_rows,
    .contenders = contenders,
    .silu_mul = silu_mul,
    .rotary_write = rotary_write,
    .attention = attention,
};

}  // namespace weft::WEFT_LEVEL
