// The plan: every fact of launch geometry, decided on the host by a pure function of the problem
// and of the device. No torch and no CUDA headers, so that it can be tested and described without a
// GPU.
//
// All inputs are one geometry, [N, C, S] in memory: element (n, c, s) at (n*C + c)*S + s. Channels
// last is S == 1 with N the number of positions. Two access patterns follow from it:
//   along S (S > 1)   a channel is N runs of S neighbouring elements; a thread serves one channel;
//   along C (S == 1)  a row is C neighbouring channels; a thread serves one channel per lane.
// Memory is cut into windows: 16 bytes at a 16-byte boundary, kVec elements ("lanes").
#pragma once

#include <cstdint>
#include <string>

namespace batchnorm_cuda {

constexpr int kWindowBytes = 16;
constexpr int kWarpSize = 32;
// Threads of a stage-kernel block, and the blocks an SM must be able to hold: up to 128 registers.
constexpr int kStageThreads = 256;
constexpr int kStageBlocksPerSm = 2;
// Threads of a block that merges partial results; many rows per channel are read at once.
constexpr int kMergeThreads = 512;
// Windows a thread has in flight, and the batch it reduces in registers before one merge.
constexpr int kUnroll = 4;

enum class Dtype : int { kHalf, kBFloat16, kFloat, kDouble };
enum class Op : int { kForwardTraining, kForwardEval, kBackwardTraining, kBackwardEval };
enum class Pattern : int { kAlongS, kAlongC };

inline constexpr int dtype_bytes(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}
// Statistics and sums are float32, float64 for float64 input; never the activation dtype.
inline constexpr int acc_bytes(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : 4; }

struct DeviceInfo {
  std::string name = "unknown";
  int compute_major = 8, compute_minor = 0;
  int sm_count = 1;
  int max_threads_per_sm = 2048;
  int registers_per_sm = 65536;
  int64_t shared_bytes_per_sm = 102400;
  int64_t shared_bytes_per_block = 49152;         // without opting in
  int64_t shared_bytes_per_block_optin = 101376;  // with opting in
  int64_t l2_bytes = 4 << 20;
  int64_t max_grid = 2147483647;
  bool cooperative = true;
};

struct Problem {
  Op op = Op::kForwardTraining;
  Dtype dtype = Dtype::kFloat;
  int64_t n = 0, c = 0, s = 0;
  // Elements by which each tensor lies past a 16-byte boundary; -1: the tensor takes no part.
  int input_shift = 0, grad_output_shift = -1, output_shift = 0;
  // Backward: are the two sums wanted for their own sake (grad_weight or grad_bias)?
  bool need_sums = true;
};

// What a caller may force; 0 leaves the choice to the planner.
struct PlanOptions {
  int index_bits = 0;  // 32 is honoured only where it is safe
  int64_t splits = 0;  // blocks per channel group, clamped to what there is to split
};

// How the blocks of one kernel walk over the tensor. A task is one (channel block, split) pair;
// blocks take tasks in grid-stride order, so that no size is capped by the grid limits.
struct Traversal {
  int64_t n = 0, c = 0, s = 0, numel = 0;
  int shift = 0;      // of the tensor whose 16-byte boundaries define the windows
  bool exact = true;  // every window is full: no masks, no heads, no tails
  int index_bits = 32;
  int threads_x = 1;        // along S: threads per channel; along C: windows of a row
  int threads_y = 1;        // along S: channels per block;  along C: rows at a time
  int64_t row_windows = 1;  // along S: windows of a run;    along C: windows of a row group
  int64_t rows = 1;         // along S: N runs per channel;  along C: row groups
  int64_t row_repeat = 1;   // along C: rows of C elements in a row group; along S: 1
  int64_t channel_blocks = 1;
  int64_t splits = 1;
  int64_t per_split = 1;  // along S: windows of the channel; along C: row groups
  int64_t tasks = 0, grid = 0;
  int64_t shared_bytes = 0;
};

// Geometry of the kernel that merges partial results, [rows, C] in memory.
struct MergeGeometry {
  int64_t rows = 0;
  int threads_x = 1, threads_y = 1;
  int64_t grid = 0;
  int64_t shared_bytes = 0;
};

struct Plan {
  Pattern pattern = Pattern::kAlongS;
  int vec = 1;
  bool has_reduce = false, has_elementwise = false;
  Traversal reduce, elementwise;
  MergeGeometry merge;
  int64_t workspace_bytes = 0;  // partial results, planes of [merge.rows, C]
  int launches = 0;
  int64_t compulsory_bytes = 0;  // every tensor once
  int64_t predicted_bytes = 0;   // activations as the kernels below read and write them
};

// Throws std::invalid_argument for sizes that are negative or overflow 63 bits.
Plan make_plan(const Problem& problem, const DeviceInfo& device, const PlanOptions& options = {});

}  // namespace batchnorm_cuda
