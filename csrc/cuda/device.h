// What the kernels ask of a GPU: copies to shared memory, fragments, INT4 products. For nvcc; emulate.h has the same
// functions for a host compiler.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define WEFT_DEVICE __device__ __forceinline__
#define WEFT_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define WEFT_UNROLL _Pragma("unroll")
#define WEFT_LOOP _Pragma("unroll 1")

namespace weft::cuda {

struct Grid {
  int x, y, z;
};

WEFT_DEVICE int thread_index() { return int(threadIdx.x); }
WEFT_DEVICE Grid group() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
WEFT_DEVICE void barrier() { __syncthreads(); }

WEFT_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t memory[];
  return memory;
}

WEFT_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Zeros where not `valid`; `from` is then not read.
WEFT_DEVICE void copy16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
WEFT_DEVICE void copy4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
WEFT_DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All copies but those of the last PENDING groups of this thread have arrived.
template <int PENDING>
WEFT_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8, and gets 4 bytes of row
// l / 4 of each.
WEFT_DEVICE void load_matrices(uint32_t (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(from))
               : "memory");
}

WEFT_DEVICE void load16(uint32_t (&to)[4], const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
}

// c += a * b of 16 x 64 and 64 x 8 nibbles, with a sign or without.
#define WEFT_MULTIPLY(A, B)                                                                                     \
  asm volatile("mma.sync.aligned.m16n8k64.row.col.s32." A "." B                                                 \
               ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <bool A_UNSIGNED, bool B_UNSIGNED>
WEFT_DEVICE void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (A_UNSIGNED && B_UNSIGNED) WEFT_MULTIPLY("u4", "u4");
  else if constexpr (A_UNSIGNED) WEFT_MULTIPLY("u4", "s4");
  else if constexpr (B_UNSIGNED) WEFT_MULTIPLY("s4", "u4");
  else WEFT_MULTIPLY("s4", "s4");
}
#undef WEFT_MULTIPLY

// Rounded each by itself: never fused.
WEFT_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
WEFT_DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
// The value, of which the compiler knows nothing: what is computed from it is not computed ahead of a loop.
WEFT_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
WEFT_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }

template <class Kernel, class Call>
int launch(Kernel kernel, Grid grid, int threads, int shared_bytes, void* stream, const Call& call) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return int(error);
  }
  const dim3 size(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
  kernel<<<size, unsigned(threads), size_t(shared_bytes), static_cast<cudaStream_t>(stream)>>>(call);
  return int(cudaGetLastError());
}

}  // namespace weft::cuda
