// Rows of the embedding table, as floats: value * scale, rounded once to the type of the output.
#include "embedding.h"

#include "integer.h"
#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {
namespace {

typedef uint8_t u8v __attribute__((vector_size(lanes)));

constexpr double EMBED_COST = 0.2;  // rough nanoseconds of one thread per element, for for_rows()

template <class From, class To>
void copy_row(const From* from, int64_t size, To* to) {
  for (int64_t i = 0; i < size; i += lanes) store_some(to + i, load_some(from + i, size - i), size - i);
}

template <class To>
void scale_bytes(const int8_t* from, float scale, To* to) {
  for (int64_t i = 0; i < EMBEDDING_GROUP; i += lanes)
    store_from_float(to + i, __builtin_convertvector(load<i8v>(from + i), f32v) * splat(scale));
}

template <class To>
void scale_nibbles(const uint8_t* from, float scale, To* to) {
  constexpr int64_t HALF = EMBEDDING_GROUP / 2;
  for (int64_t i = 0; i < HALF; i += lanes) {
    const i32v pair = __builtin_convertvector(load<u8v>(from + i), i32v);
    store_from_float(to + i, __builtin_convertvector((pair & 15) - 8, f32v) * splat(scale));
    store_from_float(to + HALF + i, __builtin_convertvector((pair >> 4) - 8, f32v) * splat(scale));
  }
}

template <class To>
void embed_row(const EmbeddingTable& table, int64_t token, To* to) {
  const char* row = table.data + token * table.row_bytes();
  const float* scales = table.scales + token * table.row_scales();
  if (table.stored == Stored::float32) return copy_row(reinterpret_cast<const float*>(row), table.size, to);
  if (table.stored == Stored::bfloat16) return copy_row(reinterpret_cast<const bf16*>(row), table.size, to);
  for (int64_t group = 0; group < table.row_scales(); group++, to += EMBEDDING_GROUP) {
    if (table.stored == Stored::int8)
      scale_bytes(reinterpret_cast<const int8_t*>(row) + group * EMBEDDING_GROUP, scales[group], to);
    else
      scale_nibbles(reinterpret_cast<const uint8_t*>(row) + group * EMBEDDING_GROUP / 2, scales[group], to);
  }
}

template <class To>
void embed_rows(Pool& pool, const EmbeddingTable& table, const EmbedCall& call) {
  for_rows(pool, call.count, double(table.size) * EMBED_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++)
      embed_row(table, call.tokens[row], static_cast<To*>(call.out) + row * table.size);
  });
}

}  // namespace

void embed(Pool& pool, const EmbeddingTable& table, const EmbedCall& call) {
  call.type == Type::bfloat16 ? embed_rows<bf16>(pool, table, call) : embed_rows<float>(pool, table, call);
}

}  // namespace weft::WEFT_LEVEL
