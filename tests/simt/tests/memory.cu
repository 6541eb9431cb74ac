// Planted: accesses that break the contract of a buffer or of shared memory.
#include "harness.h"

namespace simt_test {
namespace {

// Element `special` is treated as the fault says.
enum class Plant { kNothing, kSkip, kBeyond, kBefore, kMisaligned, kReadOutput, kWriteInput };

struct CopyParams {
  const float* x;
  float* y;
  size_t size;
  Plant plant;
  size_t special;
  template <typename F>
  void visit_buffers(F&& f) const {
    f("x", x, size * sizeof(float), true, false);
    f("y", y, size * sizeof(float), false, true);
  }
};

__global__ void copy_kernel(CopyParams p) {
  const size_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.size) return;
  if (i == p.special) {
    if (p.plant == Plant::kSkip) return;
    if (p.plant == Plant::kBeyond) MARK, load_global(p.x + p.size);
    if (p.plant == Plant::kBefore) MARK, store_global(p.y - 1, 0.0f);
    if (p.plant == Plant::kMisaligned) {
      MARK, load_global(reinterpret_cast<const float4*>(p.x + 1));
    }
    if (p.plant == Plant::kReadOutput) MARK, load_global(p.y + i);
    if (p.plant == Plant::kWriteInput) MARK, store_global(const_cast<float*>(p.x + i), 0.0f);
  }
  store_global(p.y + i, load_global(p.x + i));
}

void copy(Plant plant) {
  constexpr size_t kSize = 1000;
  Memory<float> x(kSize, 1.5f);
  Memory<float> y(kSize);
  launch({4, 256}, copy_kernel, CopyParams{x.data(), y.data(), kSize, plant, 700});
  for (size_t i = 0; i < kSize; ++i) EXPECT(y[i] == 1.5f);
}

SIMT_CASE(copy_in_bounds) { copy(Plant::kNothing); }

SIMT_CASE(output_element_skipped) {
  expect_fault([] { copy(Plant::kSkip); },
               {"copy_kernel", "unwritten output", "4 bytes of 'y'", "byte offset 2800"});
}

SIMT_CASE(read_beyond_the_input) {
  expect_fault([] { copy(Plant::kBeyond); },
               {"block (2,0,0) thread (188,0,0)", "out-of-bounds global read of 4 bytes",
                "byte offset 4000", "'x'"});
}

SIMT_CASE(write_before_the_output) {
  expect_fault([] { copy(Plant::kBefore); },
               {"out-of-bounds global write", "byte offset -4", "'y'"});
}

SIMT_CASE(vector_load_misaligned) {
  expect_fault([] { copy(Plant::kMisaligned); }, {"misaligned global access of 16 bytes"});
}

SIMT_CASE(read_of_unwritten_output) {
  expect_fault([] { copy(Plant::kReadOutput); }, {"reads unwritten memory", "byte offset 2800"});
}

SIMT_CASE(write_to_an_input) {
  expect_fault([] { copy(Plant::kWriteInput); }, {"writes to the input 'x'"});
}

// Halves of each element are written by two threads, and `missing` of them is not.
__global__ void write_halves_kernel(Buffer<uint32_t> out, unsigned int missing) {
  if (threadIdx.x == missing) return;
  auto* halves = reinterpret_cast<unsigned short*>(out.data);
  if (threadIdx.x < 16) {
    store_global(reinterpret_cast<uint4*>(out.data) + 8 + threadIdx.x, uint4{});
  }
  if (threadIdx.x < 64) store_global(halves + threadIdx.x, static_cast<unsigned short>(1));
}

SIMT_CASE(output_written_in_two_widths) {
  Memory<uint32_t> out(96);
  launch({1, 64}, write_halves_kernel, out.as(Use::kOutput), 64u);
  expect_fault([&] { launch({1, 64}, write_halves_kernel, out.as(Use::kOutput), 63u); },
               {"2 bytes of 'buffer'", "byte offset 126"});
  expect_fault([&] { launch({1, 64}, write_halves_kernel, out.as(Use::kOutput), 3u); },
               {"18 bytes of 'buffer'", "byte offset 6"});
}

__global__ void read_scratch_kernel(Buffer<int> scratch, bool write) {
  if (write) store_global(scratch.data + threadIdx.x, 1);
  MARK, load_global(scratch.data + threadIdx.x);
}

SIMT_CASE(read_of_unwritten_scratch) {
  Memory<int> scratch(32);
  launch({1, 32}, read_scratch_kernel, scratch.as(Use::kScratch), true);
  expect_fault([&] { launch({1, 32}, read_scratch_kernel, scratch.as(Use::kScratch), false); },
               {"reads unwritten memory", "'buffer'"});
  launch({1, 32}, read_scratch_kernel, scratch.as(Use::kPersistent), false);
}

__global__ void add_one_kernel(Buffer<int> values, unsigned int count) {
  if (threadIdx.x >= count) return;
  store_global(values.data + threadIdx.x, load_global(values.data + threadIdx.x) + 1);
}

SIMT_CASE(update_in_place) {
  Memory<int> values(32, 4);
  launch({1, 32}, add_one_kernel, values.as(Use::kInPlace), 32u);
  for (size_t i = 0; i < 32; ++i) EXPECT(values[i] == 5);
  expect_fault([&] { launch({1, 32}, add_one_kernel, values.as(Use::kInPlace), 30u); },
               {"unwritten output: 8 bytes"});
}

__global__ void copy_two_kernel(Buffer<int> from, Buffer<int> to) {
  store_global(to.data + threadIdx.x, load_global(from.data + threadIdx.x));
}

SIMT_CASE(buffers_that_overlap) {
  Memory<int> values(64, 3);
  Buffer<int> whole{values.data(), 32, Use::kInput};
  Buffer<int> same{values.data(), 32, Use::kOutput};
  Buffer<int> part{values.data() + 8, 32, Use::kOutput};
  launch({1, 32}, copy_two_kernel, whole, same);
  EXPECT(values[31] == 3);
  expect_fault([&] { launch({1, 32}, copy_two_kernel, whole, part); }, {"overlap in part"});
}

__global__ void odd_size_kernel(Buffer<float> in) {
  MARK, load_global(reinterpret_cast<float3*>(in.data));
}

SIMT_CASE(access_of_twelve_bytes) {
  Memory<float> in(32);
  expect_fault([&] { launch({1, 1}, odd_size_kernel, in.as(Use::kInput)); },
               {"global access of 12 bytes"});
}

struct Triple {
  float values[3];
};

__global__ void static_shared_kernel(bool write, size_t beyond) {
  Triple* triples = static_shared<Triple[32]>();
  if (write) store_shared(triples + threadIdx.x, Triple{{1, 2, 3}});
  __syncthreads();
  MARK, load_shared(triples + (threadIdx.x ^ 1) + beyond);
}

SIMT_CASE(read_of_uninitialised_static_shared) {
  launch({2, 32}, static_shared_kernel, true, size_t{0});
  // The first block must not leave its values to the second.
  expect_fault([] { launch({2, 32}, static_shared_kernel, false, size_t{0}); },
               {"reads uninitialised shared memory"});
}

SIMT_CASE(read_beyond_static_shared) {
  expect_fault([] { launch({2, 32}, static_shared_kernel, true, size_t{31}); },
               {"outside the block's shared memory"});
}

__global__ void dynamic_shared_kernel(size_t stride, size_t last) {
  auto* words = reinterpret_cast<uint4*>(dynamic_shared() + stride * threadIdx.x);
  MARK, store_shared(words, uint4{1, 2, 3, 4});
  if (threadIdx.x == last) load_shared(words + 1);
}

SIMT_CASE(dynamic_shared_bounds) {
  const Shape shape{2, 16, 256};
  launch(shape, dynamic_shared_kernel, size_t{16}, size_t{99});
  expect_fault([&] { launch(shape, dynamic_shared_kernel, size_t{32}, size_t{99}); },
               {"shared access of 16 bytes", "256 dynamic bytes"});
  expect_fault([&] { launch(shape, dynamic_shared_kernel, size_t{8}, size_t{99}); },
               {"misaligned shared access of 16 bytes"});
}

__global__ void stale_shared_kernel() {
  auto* words = reinterpret_cast<int*>(dynamic_shared());
  if (blockIdx.x == 0) store_shared(words, 1);
  if (blockIdx.x == 1) MARK, load_shared(words);
}

SIMT_CASE(shared_memory_of_an_earlier_block) {
  expect_fault([] { launch({2, 1, 64}, stale_shared_kernel); },
               {"block (1,0,0)", "reads uninitialised shared memory at byte offset 0"});
}

__global__ void plain_pointer_kernel(int* global) { MARK, load_shared(global); }

SIMT_CASE(shared_access_of_a_global_pointer) {
  Memory<int> memory(1);
  expect_fault([&] { launch({1, 1}, plain_pointer_kernel, memory.data()); },
               {"shared access outside"});
}

struct Huge {
  char bytes[60 * 1024];
};
__global__ void huge_shared_kernel() { static_shared<Huge>(); }

SIMT_CASE(static_shared_too_large) {
  expect_fault([] { launch({1, 1}, huge_shared_kernel); }, {"too much shared memory"});
}

SIMT_CASE(calls_outside_a_kernel) {
  Memory<int> memory(1, 6);
  EXPECT(load_global(memory.data()) == 6);
  expect_fault([&] { load_shared(memory.data()); }, {"outside a kernel", "memory.cu"});
  expect_fault([] { dynamic_shared(); }, {"outside a kernel"});
  expect_fault([] { __syncthreads(); }, {"outside a kernel"});
  expect_fault([] { __shfl_sync(0xffffffffu, 1, 0); }, {"outside a kernel"});
}

__global__ void throwing_kernel() { throw std::out_of_range("from the kernel"); }

SIMT_CASE(exception_out_of_a_kernel) {
  expect_fault([] { launch({2, 32}, throwing_kernel); }, {"from the kernel"});
}

__global__ void launching_kernel() { launch({1, 1}, throwing_kernel); }

SIMT_CASE(launch_out_of_a_kernel) {
  expect_fault([] { launch({1, 1}, launching_kernel); }, {"within a kernel is not modelled"});
}

}  // namespace
}  // namespace simt_test
