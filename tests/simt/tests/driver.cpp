// driver CASE: runs one case under several seeds. Prints what went wrong and returns 1 if it fails.
#include <cstdio>
#include <exception>

#include "harness.h"

namespace simt_test {

int marked_line = 0;

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

void expect(bool condition, const char* text, const char* file, int line) {
  if (condition) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": not true: " + text);
}

namespace {

__global__ void sum_block_kernel(Buffer<int> out) {
  int* total = &static_shared<int>();
  if (threadIdx.x == 0) store_shared(total, 0);
  __syncthreads();
  atomicAdd(total, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) store_global(out.data + blockIdx.x, load_shared(total));
}

void expect_engine_works() {
  Memory<int> out(3);
  launch({3, 64}, sum_block_kernel, out.as(Use::kOutput));
  for (size_t i = 0; i < 3; ++i) EXPECT(out[i] == 64 * 63 / 2);
}

}  // namespace

void expect_fault(const std::function<void()>& launch, std::initializer_list<std::string> parts) {
  marked_line = 0;
  std::string message;
  try {
    launch();
  } catch (const simt::Fault& fault) {
    message = fault.what();
  }
  if (message.empty()) throw std::runtime_error("the planted fault was not found");
  std::vector<std::string> wanted(parts);
  if (marked_line != 0) wanted.push_back(":" + std::to_string(marked_line));
  for (const std::string& part : wanted) {
    if (message.find(part) == std::string::npos) {
      throw std::runtime_error("no '" + part + "' in: " + message);
    }
  }
  expect_engine_works();
}

}  // namespace simt_test

int main(int argc, char** argv) {
  constexpr unsigned int kSeeds = 5;
  for (const simt_test::Case& each : simt_test::cases()) {
    if (argc != 2 || std::string(argv[1]) != each.name) continue;
    for (unsigned int seed = 0; seed < kSeeds; ++seed) {
      simt::set_seed(seed);
      try {
        each.run();
      } catch (const std::exception& error) {
        std::printf("%s, seed %u: %s\n", each.name, seed, error.what());
        return 1;
      }
    }
    return 0;
  }
  std::printf("usage: driver CASE; no such case\n");
  return 2;
}
