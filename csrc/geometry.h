// Geometry of the kernels, as the plan decides it and they take it: plain data for host and device.
//
// All inputs are one geometry, [N, C, S] in memory: element (n, c, s) at (n*C + c)*S + s. Channels
// last is S == 1 with N the number of positions. Two access patterns follow from it:
//   along S (S > 1)   a channel is N runs of S neighbouring elements; a thread serves one channel;
//   along C (S == 1)  a row is C neighbouring channels; a thread serves one channel per lane.
// Memory is cut into windows: 16 bytes at a 16-byte boundary, kVec elements ("lanes").
#pragma once

#include <cstdint>

namespace batchnorm_cuda {

constexpr int kWindowBytes = 16;
constexpr int kWarpSize = 32;
// Threads of a stage-kernel block, and the blocks an SM must be able to hold: up to 128 registers,
// up to 80 of exact elementwise kernels of forward and backward. Walks with edges take more.
constexpr int kStageThreads = 256;
constexpr int kStageBlocksPerSm = 2;
constexpr int elementwise_blocks_per_sm(bool exact) { return exact ? 3 : kStageBlocksPerSm; }
// Threads of a block that merges partial results; many rows per channel are read at once.
constexpr int kMergeThreads = 512;
// Of a block that merges what the ranks have gathered. A thread serves a column, of which there are
// hundreds: small blocks reach more SMs.
constexpr int kRankMergeThreads = 64;
// Windows a thread has in flight, and the batch it reduces in registers before one merge.
constexpr int kUnroll = 4;
// Threads of a team kernel's block, and the blocks an SM holds: up to 128 registers a thread. They
// work on different channel groups where there are several, so that one loads while the other
// exchanges or stores.
constexpr int kTeamThreads = 256, kTeamBlocksPerSm = 2;
enum class Dtype : int { kHalf, kBFloat16, kFloat, kDouble };
enum class Op : int {
  kForwardTraining,
  kForwardEval,
  kBackwardTraining,
  kBackwardEval,
  kDoubleBackwardTraining,
  kDoubleBackwardEval
};
inline constexpr bool is_double_backward(Op op) {
  return op == Op::kDoubleBackwardTraining || op == Op::kDoubleBackwardEval;
}
// Along a row (team and elementwise kernels): like along C, but several columns of a row are of one
// channel: S neighbours in each of the row's row_repeat samples of C*S elements. Where such a row
// is too long for a block, the masked form takes whole channels of a sample at a time; samples that
// start at the same place in a window, every row_repeat-th, belong to the same threads.
enum class Pattern : int { kAlongS, kAlongC, kAlongRow };
// kTwoPass: stage kernels, activations read once to reduce and once more to transform.
// kTeam: a team of blocks keeps a channel group on chip between the two, in one launch.
enum class Strategy : int { kAuto, kTwoPass, kTeam };
// How the blocks of a team exchange partial results: not at all (one block), through the shared
// memory of a thread-block cluster, or through global memory under a cooperative launch.
enum class Scope : int { kAuto, kBlock, kCluster, kGrid };

inline constexpr int dtype_bytes(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}
// Statistics and sums are float32, float64 for float64 input; never the activation dtype.
inline constexpr int acc_bytes(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : 4; }

#ifdef __CUDACC__
#define BATCHNORM_CUDA_HOST_DEVICE __host__ __device__
#else
#define BATCHNORM_CUDA_HOST_DEVICE
#endif

// Windows of all its tensors together that a thread of a team kernel keeps in registers: the most
// that the compiler places without a spill for every architecture (`make sass`).
BATCHNORM_CUDA_HOST_DEVICE constexpr int team_windows(Pattern pattern, bool exact, int value_bytes,
                                                      int tensors, bool fused = false) {
  const bool forward = tensors == 1;
  const bool half = value_bytes == 2;  // with twice the lanes, and sums
  if (pattern == Pattern::kAlongRow && !exact && forward) return half ? 3 - fused : fused ? 4 : 8;
  if (pattern != Pattern::kAlongS) return forward && half ? 6 : 8;
  if (value_bytes == 8) return exact ? (forward ? 10 : 12) : 8;
  if (forward && exact && fused && !half) return 15;
  return forward && !exact ? 12 : 16;
}

// Rows of a block of columns x rows threads that column_reduce merges by warp shuffles: all rows of
// a warp where a warp is whole rows and the block whole warps, else one.
BATCHNORM_CUDA_HOST_DEVICE inline int rows_merged_by_shuffles(int columns, int rows) {
  const bool whole =
      columns <= kWarpSize && kWarpSize % columns == 0 && rows % (kWarpSize / columns) == 0;
  return whole ? kWarpSize / columns : 1;
}

// Values of shared memory that column_reduce needs for accumulators of `fields` values; `keep`: the
// rows that it leaves apart.
inline int64_t column_scratch_values(int columns, int rows, int lanes, int fields, int keep = 1) {
  const int merged = keep > 1 ? 1 : rows_merged_by_shuffles(columns, rows);
  return int64_t{columns} * (rows / merged) * lanes * fields;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whole windows that a run of s elements has, wherever in a window it begins.
inline int64_t whole_windows(int64_t s, int vec) { return s < vec - 1 ? 0 : (s - (vec - 1)) / vec; }

// Units of work that a part may have; far more than any memory holds, but counters of a walk may
// rely on it.
constexpr int64_t kMaxPerSplit = int64_t{1} << 29;

// Of the mask of a ReLU (fused.cuh): a byte for each `vec` elements. Its memory is whole 32-bit
// words, by which threads that share a byte write it.
inline int64_t mask_bytes(int64_t numel, int64_t vec) { return ceil_div(numel, vec); }
inline int64_t whole_words(int64_t bytes) { return ceil_div(bytes, 4) * 4; }

// How the blocks of one kernel walk over the tensor. The work on a channel block is dealt in units;
// a part is some neighbouring units of one channel block (parts.cuh). In a team each rank has the
// same part of every channel block. A block of a stage kernel has an even stretch of the units of
// all channel blocks, one behind the other: the end of one, whole ones, the start of the next.
struct Traversal {
  Pattern pattern = Pattern::kAlongS;
  int64_t n = 0, c = 0, s = 0, numel = 0;
  int shift = 0;      // of the tensor whose 16-byte boundaries define the windows
  bool exact = true;  // every window is full and aligned: there are no edges (traversal.cuh)
  int index_bits = 32;
  int threads_x = 1;        // along S: threads per channel; along C: windows of a row
  int threads_y = 1;        // along S: channels per block;  along C: rows at a time
  int64_t row_windows = 1;  // along S: whole windows of a run; along C: windows of a row group
  int64_t rows = 1;         // along S: N runs per channel;  along C: row groups
  int64_t row_repeat = 1;   // along C and along rows: rows of C*S elements in a row group, else 1
  bool folds = false;       // along C: a block has all row_repeat columns of a channel
  int64_t channel_blocks = 1;
  int64_t segments = 0;   // along a row: channels of a channel block
  int64_t work = 1;       // units of a channel block: windows of a channel, or row groups
  int64_t splits = 1;     // parts of a channel block: of a team its ranks, of a stage at most
  int64_t per_split = 1;  // units: of a rank's part, of a stage's stretch at least
  int64_t spare = 0;      // of a stage: units that are left, for stretches of one more
  int64_t tasks = 0;      // parts of a team in all rounds; stretches
  int64_t grid = 0;
  int64_t shared_bytes = 0;
};

// Geometry of the kernel that merges partial results, [rows, C] in memory.
struct MergeGeometry {
  int64_t rows = 0;
  int threads_x = 1, threads_y = 1;
  int64_t grid = 0;
  int64_t shared_bytes = 0;
};

// Of the kernels that merge what the ranks have gathered (merge_ranks.cuh).
struct RankMergeGeometry {
  int64_t grid = 0;
};

// A team kernel: `size` blocks share each channel block of the traversal, one split each, and
// `teams` teams take the channel blocks in turn.
struct Team {
  Pattern pattern = Pattern::kAlongS;
  Traversal traversal;
  Scope scope = Scope::kBlock;
  int size = 0;
  int64_t teams = 0, rounds = 0, grid = 0;
  int tensors = 1;            // activations kept on chip: x, or dy and x
  int register_windows = 0;   // per thread and tensor
  int shared_windows = 0;     // per thread and tensor
  int blocks_per_sm = 1;      // resident, by registers, threads and shared memory
  int64_t slot_values = 0;    // partial result of one block and round
  int64_t scratch_bytes = 0;  // shared memory of the block's own reduction, before the slots
  int64_t data_offset = 0;    // where the windows begin in shared memory
  int64_t shared_bytes = 0;
  bool two_level = false;      // ranks merge a slice of the channels each (kGrid, team.cuh)
  int64_t exchange_bytes = 0;  // global workspace: two slots a block, two totals a team (kGrid)
  int64_t sync_words = 0;      // 64-bit words: epoch, finished blocks, one flag a block (kGrid)
  int64_t streamed_bytes = 0;  // of all tensors, read twice for want of room
};

}  // namespace batchnorm_cuda
