// A GPU on the host, for tests: the functions of device.h, so that a host compiler builds the kernels as they are and
// one can see what they compute where there is no GPU. Never part of weft.
//
// The threads of a thread block are fibers that run one at a time; they change over where the hardware makes threads
// wait for each other, in an order drawn from a seed. It is hard on mistakes:
// * fragments are spread over lanes as the PTX manual has it for m16n8k64 and ldmatrix;
// * a copy to shared memory arrives as late as it may, when its thread awaits it; from its start on the destination is
//   filled with garbage (a missing wait, barrier or stage shows as a wrong number);
// * misaligned addresses, rows of a matrix that collide in a bank, and threads that wait for ever are errors.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#define WEFT_DEVICE inline
#define WEFT_KERNEL(threads) void
#define WEFT_UNROLL
#define WEFT_LOOP

namespace weft::cuda {

struct Grid {
  int x, y, z;
};

namespace emulated {

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int size;
};

struct Meeting {
  int present = 0;
  int64_t times = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  const Meeting* meeting = nullptr;  // that it waits for
  int64_t times = 0;
  bool done = false;
};

struct Warp {
  Meeting meeting;
  const uint8_t* addresses[32];
  int a[16][64], b[8][64];  // of a product; b by columns
};

// One thread block at a time.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting everybody;
  std::vector<uint8_t> memory;
  Grid group{};
  ucontext_t scheduler;
  int current = 0;
  uint32_t seed = 1;
  const char* problem = nullptr;
  std::vector<std::pair<const char*, const char*>> inputs;  // what copies may read; anything where it is empty
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Machine machine;

inline void require(bool fine, const char* otherwise) {
  if (!fine && machine.problem == nullptr) machine.problem = otherwise;
}

inline void meet(Meeting& meeting, int expected) {
  if (++meeting.present == expected) {
    meeting.present = 0;
    meeting.times++;
    return;
  }
  Fiber& self = machine.fibers[size_t(machine.current)];
  self.meeting = &meeting;
  self.times = meeting.times;
  swapcontext(&self.context, &machine.scheduler);
}

inline void start() {
  machine.body(machine.argument);
  Fiber& self = machine.fibers[size_t(machine.current)];
  require(self.open.empty(), "a thread ended with copies that belong to no group");
  self.done = true;
  swapcontext(&self.context, &machine.scheduler);
}

inline uint32_t drawn() {
  machine.seed = machine.seed * 1664525u + 1013904223u;
  return machine.seed >> 8;
}

inline void run_group(int threads, int shared_bytes) {
  constexpr size_t STACK = 256 * 1024;
  machine.memory.assign(size_t(shared_bytes) + 128, 0xcc);
  machine.everybody = {};
  machine.warps.assign(size_t(threads / 32), {});
  machine.fibers.clear();
  machine.fibers.resize(size_t(threads));
  for (Fiber& fiber : machine.fibers) {
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  for (int left = threads; left > 0 && machine.problem == nullptr;) {
    bool moved = false;
    const int offset = int(drawn() % uint32_t(threads)), stride = int(drawn() % uint32_t(threads)) | 1;
    for (int i = 0; i < threads; i++) {  // an odd stride visits all, for there are a power of two of them
      machine.current = (offset + i * stride) % threads;
      Fiber& fiber = machine.fibers[size_t(machine.current)];
      if (fiber.done || (fiber.meeting != nullptr && fiber.meeting->times == fiber.times)) continue;
      fiber.meeting = nullptr;
      swapcontext(&machine.scheduler, &fiber.context);
      moved = true;
      left -= fiber.done;
    }
    require(moved, "threads wait for others that never come");
  }
}

inline Fiber& self() { return machine.fibers[size_t(machine.current)]; }
inline Warp& warp() { return machine.warps[size_t(machine.current / 32)]; }

inline void copy(void* to, const void* from, int size, bool valid) {
  require(uintptr_t(to) % size_t(size) == 0, "a copy to a misaligned place of shared memory");
  require(uintptr_t(from) % size_t(size) == 0, "a copy from a misaligned address");
  bool known = !valid || machine.inputs.empty();
  for (const auto& [first, end] : machine.inputs)
    known |= from >= first && static_cast<const char*>(from) + size <= end;
  require(known, "a copy from outside of the inputs");
  memset(to, 0xcc, size_t(size));
  self().open.push_back({to, valid ? from : nullptr, size});
}

inline int nibble(uint32_t word, int i, bool plain) {
  const int value = int(word >> (4 * i)) & 15;
  return plain || value < 8 ? value : value - 16;
}

}  // namespace emulated

inline int thread_index() { return emulated::machine.current; }
inline Grid group() { return emulated::machine.group; }
inline void barrier() { emulated::meet(emulated::machine.everybody, int(emulated::machine.fibers.size())); }
inline uint8_t* shared_memory() {
  uint8_t* memory = emulated::machine.memory.data();
  return memory + (128 - uintptr_t(memory) % 128) % 128;
}

inline void copy16(void* to, const void* from, bool valid) { emulated::copy(to, from, 16, valid); }
inline void copy4(void* to, const void* from, bool valid) { emulated::copy(to, from, 4, valid); }
inline void end_copies() {
  emulated::self().groups.push_back(std::move(emulated::self().open));
  emulated::self().open.clear();
}

template <int PENDING>
void await_copies() {
  auto& groups = emulated::self().groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const emulated::Copy& copy : groups.front()) {
      if (copy.from == nullptr) memset(copy.to, 0, size_t(copy.size));
      else memcpy(copy.to, copy.from, size_t(copy.size));
    }
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* from) {
  using namespace emulated;
  const int lane = machine.current % 32;
  Warp& mine = warp();
  mine.addresses[lane] = static_cast<const uint8_t*>(from);
  require(uintptr_t(from) % 16 == 0, "a row of a matrix is misaligned");
  meet(mine.meeting, 32);
  for (int i = 0; i < 4; i++) {
    memcpy(&to[i], mine.addresses[8 * i + lane / 4] + 4 * (lane % 4), 4);
    for (int row = 0; row < 8; row++) {
      const auto bank = [&](int of) { return uintptr_t(mine.addresses[8 * i + of]) / 16 % 8; };
      require(row == lane % 8 || bank(row) != bank(lane % 8), "rows of a matrix collide in a bank");
    }
  }
  meet(mine.meeting, 32);
}

inline void load16(uint32_t (&to)[4], const void* from) {
  emulated::require(uintptr_t(from) % 16 == 0, "a load of 16 bytes is misaligned");
  memcpy(to, from, 16);
}

template <bool A_UNSIGNED, bool B_UNSIGNED>
void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulated;
  const int lane = machine.current % 32;
  Warp& mine = warp();
  // By the PTX manual, "Matrix Fragments for mma.m16n8k64": element i of A, eight to a register, is in row lane / 4 for
  // i < 8 and 16 <= i < 24, else 8 below; and in column 8 (lane % 4) + i % 8, from i = 16 on 32 further. Element i of B
  // is in row 8 (lane % 4) + i % 8, from i = 8 on 32 further, of column lane / 4.
  for (int i = 0; i < 32; i++)
    mine.a[lane / 4 + i / 8 % 2 * 8][lane % 4 * 8 + i % 8 + i / 16 * 32] = nibble(a[i / 8], i % 8, A_UNSIGNED);
  for (int i = 0; i < 16; i++)
    mine.b[lane / 4][lane % 4 * 8 + i % 8 + i / 8 * 32] = nibble(i < 8 ? b0 : b1, i % 8, B_UNSIGNED);
  meet(mine.meeting, 32);
  for (int i = 0; i < 4; i++) {  // of C: row lane / 4, from i = 2 on 8 below; column 2 (lane % 4) + i % 2
    const int *row = mine.a[lane / 4 + i / 2 * 8], *column = mine.b[lane % 4 * 2 + i % 2];
    for (int k = 0; k < 64; k++) c[i] += row[k] * column[k];
  }
  meet(mine.meeting, 32);
}

inline float product(float a, float b) { return a * b; }  // built without contraction
inline float sum(float a, float b) { return a + b; }
inline int opaque(int value) { return value; }
inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

template <class Kernel, class Call>
int launch(Kernel kernel, Grid grid, int threads, int shared_bytes, void*, const Call& call) {
  using namespace emulated;
  struct Argument {
    Kernel kernel;
    const Call* call;
  } argument{kernel, &call};
  machine.argument = &argument;
  machine.body = [](void* given) {
    const auto* argument = static_cast<Argument*>(given);
    argument->kernel(*argument->call);
  };
  machine.problem = nullptr;
  for (int z = 0; z < grid.z; z++)
    for (int y = 0; y < grid.y; y++)
      for (int x = 0; x < grid.x && machine.problem == nullptr; x++) {
        machine.group = {x, y, z};
        run_group(threads, shared_bytes);
      }
  return machine.problem == nullptr ? 0 : 1;
}

}  // namespace weft::cuda

// What went wrong in the last launch, or null; the order in which threads run; and what they may read (null: forget).
extern "C" const char* weft_emulated_problem() { return weft::cuda::emulated::machine.problem; }
extern "C" void weft_emulated_seed(uint32_t seed) { weft::cuda::emulated::machine.seed = seed; }
extern "C" void weft_emulated_input(const char* first, int64_t bytes) {
  auto& inputs = weft::cuda::emulated::machine.inputs;
  if (first == nullptr) inputs.clear();
  else inputs.emplace_back(first, first + bytes);
}
