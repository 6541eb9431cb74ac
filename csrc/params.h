// Kernel arguments: plain data, raw pointers and the traversal the plan decided. No torch.
//
// visit_buffers states the contract of each pointer: f(name, pointer, bytes, readable, must_write).
//   readable, not must_write   input: never written
//   must_write, not readable   output: every byte is written, none is read before
//   both                       updated in place
//   neither                    scratch: read only where it was written before
// A sixth argument `true`: in parts read and written at will, what is not written stays.
// The host build checks it; a null pointer stands for an argument that is not there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "geometry.h"

namespace batchnorm_cuda {

// float for half, bfloat16 and float; double for double.
template <typename scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename scalar_t>
using acc_type = typename Accumulate<scalar_t>::type;

// A per-channel vector whose dtype is a run-time tag. A thread reads one or a few of its elements
// per kernel, so a template parameter would double the compiled kernels and save nothing.
struct ParamPointer {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  size_t bytes(int64_t c) const { return static_cast<size_t>(c) * dtype_bytes(dtype); }
};

// Partial results: plane f holds field f of every accumulator, each plane [rows, C].
template <typename acc_t>
struct Partials {
  acc_t* data = nullptr;
  int64_t rows = 0, c = 0;
  size_t bytes(int fields) const { return sizeof(acc_t) * fields * rows * c; }
};

template <typename scalar_t>
struct StatisticsParams {
  Traversal traversal;
  const scalar_t* input;                  // [N, C, S]
  Partials<acc_type<scalar_t>> partials;  // 4 planes
  template <typename F>
  void visit_buffers(F&& f) const {
    f("input", input, sizeof(scalar_t) * traversal.numel, true, false);
    f("partials", partials.data, partials.bytes(4), false, true);
  }
};

// The bit of num_batches_tracked above which the channels that have read it are counted while a
// kernel runs (statistics.cuh): the highest that leaves room for all of them.
inline int arrival_shift_for(int64_t channels) {
  int shift = 62;
  while (channels > 0) {
    channels >>= 1;
    --shift;
  }
  return shift;
}

// Where the statistics of a batch go, and by what rule.
template <typename acc_t>
struct StatisticsOutput {
  int64_t c, count;  // channels; values per channel
  double eps, momentum;
  int64_t* num_batches_tracked;            // [1] or null: counts this batch
  int arrival_shift;                       // not 0: momentum is 1/number of this batch, see below
  acc_t *save_mean, *save_invstd;          // [C]
  ParamPointer running_mean, running_var;  // [C] or absent
  template <typename F>
  void visit_buffers(F&& f) const {
    f("num_batches_tracked", num_batches_tracked, sizeof(int64_t), true, true);
    f("save_mean", save_mean, sizeof(acc_t) * c, false, true);
    f("save_invstd", save_invstd, sizeof(acc_t) * c, false, true);
    f("running_mean", running_mean.data, running_mean.bytes(c), true, true);
    f("running_var", running_var.data, running_var.bytes(c), true, true);
  }
};

template <typename acc_t>
struct MergeStatisticsParams {
  Partials<acc_t> partials;  // 4 planes
  int shift;                 // of the traversal that wrote the partials, 0 along S
  StatisticsOutput<acc_t> statistics;
  template <typename F>
  void visit_buffers(F&& f) const {
    f("partials", partials.data, partials.bytes(4), true, false);
    statistics.visit_buffers(f);
  }
};

template <typename scalar_t>
struct NormalizeParams {
  using acc_t = acc_type<scalar_t>;
  Traversal traversal;
  bool input_aligned;  // the input shares the output's 16-byte boundaries
  bool use_running;    // statistics: running_* and eps instead of mean, invstd
  double eps;
  const scalar_t* input;                   // [N, C, S]
  scalar_t* output;                        // [N, C, S]
  ParamPointer weight, bias;               // [C] or absent
  ParamPointer running_mean, running_var;  // [C], use_running
  acc_t *mean, *invstd;  // [C]: read, or with use_running written for the backward
  template <typename F>
  void visit_buffers(F&& f) const {
    const size_t c = sizeof(acc_t) * traversal.c;
    f("input", input, sizeof(scalar_t) * traversal.numel, true, false);
    f("output", output, sizeof(scalar_t) * traversal.numel, false, true);
    f("weight", weight.data, weight.bytes(traversal.c), true, false);
    f("bias", bias.data, bias.bytes(traversal.c), true, false);
    f("running_mean", running_mean.data, running_mean.bytes(traversal.c), true, false);
    f("running_var", running_var.data, running_var.bytes(traversal.c), true, false);
    f("mean", mean, c, !use_running, use_running);
    f("invstd", invstd, c, !use_running, use_running);
  }
};

// What is fused behind the normalisation, in one rounding with it (fused.cuh).
template <typename scalar_t>
struct FusedForward {
  using acc_t = acc_type<scalar_t>;
  int64_t numel;
  bool exact;                // the tiling of the kernel that writes the mask
  bool residual_aligned;     // the residual shares the output's 16-byte boundaries
  const scalar_t* residual;  // [N, C, S] or null
  Activation<acc_t> activation;
  uint8_t* mask;  // [mask_bytes] or null; zeroed before where the tiling is not exact
  template <typename F>
  void visit_buffers(F&& f) const {
    const int64_t lanes = kWindowBytes / sizeof(scalar_t);
    f("residual", residual, sizeof(scalar_t) * numel, true, false);
    // Not exact: only the words in which a bit is set.
    const int64_t bytes = exact ? numel / lanes : whole_words(mask_bytes(numel, lanes));
    f("mask", mask, static_cast<size_t>(bytes), !exact, exact, !exact);
  }
};

// What is fused before the backward pass: dy is that of an activation.
template <typename scalar_t>
struct FusedBackward {
  using acc_t = acc_type<scalar_t>;
  int64_t numel;
  const uint8_t* mask;      // as FusedForward left it
  scalar_t* grad_residual;  // [N, C, S] or null; shares grad_input's 16-byte boundaries
  Slope<acc_t> below;       // of the activation, where a bit is not set
  template <typename F>
  void visit_buffers(F&& f) const {
    const int64_t lanes = kWindowBytes / sizeof(scalar_t);
    f("mask", mask, static_cast<size_t>(ceil_div(numel, lanes)), true, false);
    f("grad_residual", grad_residual, sizeof(scalar_t) * numel, false, true);
  }
};

template <typename scalar_t>
struct BackwardReduceParams {
  using acc_t = acc_type<scalar_t>;
  Traversal traversal;
  bool grad_output_aligned;             // grad_output shares the input's 16-byte boundaries
  const scalar_t *grad_output, *input;  // [N, C, S]
  const acc_t *mean, *invstd;           // [C]
  Partials<acc_t> partials;             // 2 planes
  template <typename F>
  void visit_buffers(F&& f) const {
    f("grad_output", grad_output, sizeof(scalar_t) * traversal.numel, true, false);
    f("input", input, sizeof(scalar_t) * traversal.numel, true, false);
    f("mean", mean, sizeof(acc_t) * traversal.c, true, false);
    f("invstd", invstd, sizeof(acc_t) * traversal.c, true, false);
    f("partials", partials.data, partials.bytes(2), false, true);
  }
};

template <typename acc_t>
struct MergeGradientsParams {
  Partials<acc_t> partials;             // 2 planes
  int shift;                            // as in MergeStatisticsParams
  acc_t *sum_dy, *sum_dy_xhat;          // [C] or null
  ParamPointer grad_weight, grad_bias;  // [C] or absent
  template <typename F>
  void visit_buffers(F&& f) const {
    f("partials", partials.data, partials.bytes(2), true, false);
    f("sum_dy", sum_dy, sizeof(acc_t) * partials.c, false, true);
    f("sum_dy_xhat", sum_dy_xhat, sizeof(acc_t) * partials.c, false, true);
    f("grad_weight", grad_weight.data, grad_weight.bytes(partials.c), false, true);
    f("grad_bias", grad_bias.data, grad_bias.bytes(partials.c), false, true);
  }
};

template <typename scalar_t>
struct BackwardElementwiseParams {
  using acc_t = acc_type<scalar_t>;
  Traversal traversal;
  bool grad_output_aligned, input_aligned;  // share grad_input's 16-byte boundaries
  int64_t count;                            // values per channel
  const int64_t* total_count;               // [1] or null: stands for count, over several ranks
  const scalar_t *grad_output, *input;      // [N, C, S]; input null in eval: it takes no part
  scalar_t* grad_input;                     // [N, C, S]
  ParamPointer weight;                      // [C] or absent
  const acc_t *mean, *invstd;               // [C]
  const acc_t *sum_dy, *sum_dy_xhat;        // [C], null in eval
  template <typename F>
  void visit_buffers(F&& f) const {
    const size_t c = sizeof(acc_t) * traversal.c;
    f("total_count", total_count, sizeof(int64_t), true, false);
    f("grad_output", grad_output, sizeof(scalar_t) * traversal.numel, true, false);
    f("input", input, sizeof(scalar_t) * traversal.numel, true, false);
    f("grad_input", grad_input, sizeof(scalar_t) * traversal.numel, false, true);
    f("weight", weight.data, weight.bytes(traversal.c), true, false);
    f("mean", mean, c, true, false);
    f("invstd", invstd, c, true, false);
    f("sum_dy", sum_dy, c, true, false);
    f("sum_dy_xhat", sum_dy_xhat, c, true, false);
  }
};

template <typename scalar_t>
struct DoubleBackwardReduceParams {
  using acc_t = acc_type<scalar_t>;
  Traversal traversal;
  bool grad_output_aligned, grad_grad_input_aligned;  // share the input's 16-byte boundaries
  // [N, C, S]; null: it takes no part, and sums with it are not used
  const scalar_t *grad_output, *grad_grad_input, *input;
  const acc_t *mean, *invstd;  // [C]
  Partials<acc_t> partials;    // 5 planes
  template <typename F>
  void visit_buffers(F&& f) const {
    f("grad_output", grad_output, sizeof(scalar_t) * traversal.numel, true, false);
    f("grad_grad_input", grad_grad_input, sizeof(scalar_t) * traversal.numel, true, false);
    f("input", input, sizeof(scalar_t) * traversal.numel, true, false);
    f("mean", mean, sizeof(acc_t) * traversal.c, true, false);
    f("invstd", invstd, sizeof(acc_t) * traversal.c, true, false);
    f("partials", partials.data, partials.bytes(5), false, true);
  }
};

template <typename acc_t>
struct MergeDoubleGradientsParams {
  Partials<acc_t> partials;  // 5 planes
  int shift;                 // as in MergeStatisticsParams
  bool training;             // the statistics depend on the input
  int64_t count;             // values per channel
  const acc_t* invstd;       // [C]
  Partials<acc_t> sums;      // 5 planes of one row: the sums of each channel, or null
  ParamPointer grad_weight;  // [C] or absent
  template <typename F>
  void visit_buffers(F&& f) const {
    f("partials", partials.data, partials.bytes(5), true, false);
    f("invstd", invstd, sizeof(acc_t) * partials.c, true, false);
    f("sums", sums.data, sums.bytes(5), false, true);
    f("grad_weight", grad_weight.data, grad_weight.bytes(partials.c), false, true);
  }
};

template <typename scalar_t>
struct DoubleBackwardElementwiseParams {
  using acc_t = acc_type<scalar_t>;
  Traversal traversal;
  // Share the outputs' 16-byte boundaries.
  bool grad_output_aligned, grad_grad_input_aligned, input_aligned;
  bool training;                                          // the statistics depend on the input
  int64_t count;                                          // values per channel
  const scalar_t *grad_output, *grad_grad_input, *input;  // [N, C, S]; null: it takes no part
  scalar_t *grad_grad_output, *grad_input;                // [N, C, S] or null
  ParamPointer weight, grad_grad_weight, grad_grad_bias;  // [C] or absent
  const acc_t *mean, *invstd;                             // [C]
  Partials<acc_t> sums;  // 5 planes of one row; null in eval, and where all sums are zero
  template <typename F>
  void visit_buffers(F&& f) const {
    const size_t tensor = sizeof(scalar_t) * traversal.numel, c = sizeof(acc_t) * traversal.c;
    f("grad_output", grad_output, tensor, true, false);
    f("grad_grad_input", grad_grad_input, tensor, true, false);
    f("input", input, tensor, true, false);
    f("grad_grad_output", grad_grad_output, tensor, false, true);
    f("grad_input", grad_input, tensor, false, true);
    f("weight", weight.data, weight.bytes(traversal.c), true, false);
    f("grad_grad_weight", grad_grad_weight.data, grad_grad_weight.bytes(traversal.c), true, false);
    f("grad_grad_bias", grad_grad_bias.data, grad_grad_bias.bytes(traversal.c), true, false);
    f("mean", mean, c, true, false);
    f("invstd", invstd, c, true, false);
    f("sums", sums.data, sums.bytes(5), true, false);
  }
};

// Workspace of a team kernel whose blocks exchange through global memory; null otherwise.
template <typename acc_t, typename F>
void visit_team_workspace(const Team& team, acc_t* slots, uint64_t* sync, F&& f) {
  f("slots", slots, static_cast<size_t>(team.exchange_bytes), false, false);
  f("sync", sync, sizeof(uint64_t) * team.sync_words, true, true);
}

template <typename scalar_type>
struct TeamForwardParams {
  using scalar_t = scalar_type;
  using acc_t = acc_type<scalar_t>;
  Team team;
  const scalar_t* input;      // [N, C, S]
  scalar_t* output;           // [N, C, S]
  ParamPointer weight, bias;  // [C] or absent
  StatisticsOutput<acc_t> statistics;
  acc_t* slots;
  uint64_t* sync;
  template <typename F>
  void visit_buffers(F&& f) const {
    const Traversal& t = team.traversal;
    f("input", input, sizeof(scalar_t) * t.numel, true, false);
    f("output", output, sizeof(scalar_t) * t.numel, false, true);
    f("weight", weight.data, weight.bytes(t.c), true, false);
    f("bias", bias.data, bias.bytes(t.c), true, false);
    statistics.visit_buffers(f);
    visit_team_workspace(team, slots, sync, f);
  }
};

template <typename scalar_type>
struct TeamBackwardParams {
  using scalar_t = scalar_type;
  using acc_t = acc_type<scalar_t>;
  Team team;
  bool training;                        // the statistics depend on the input
  int64_t count;                        // values per channel
  const scalar_t *grad_output, *input;  // [N, C, S]
  scalar_t* grad_input;                 // [N, C, S]
  ParamPointer weight;                  // [C] or absent
  const acc_t *mean, *invstd;           // [C]
  ParamPointer grad_weight, grad_bias;  // [C] or absent
  acc_t* slots;
  uint64_t* sync;
  template <typename F>
  void visit_buffers(F&& f) const {
    const Traversal& t = team.traversal;
    f("grad_output", grad_output, sizeof(scalar_t) * t.numel, true, false);
    f("input", input, sizeof(scalar_t) * t.numel, true, false);
    f("grad_input", grad_input, sizeof(scalar_t) * t.numel, false, true);
    f("weight", weight.data, weight.bytes(t.c), true, false);
    f("mean", mean, sizeof(acc_t) * t.c, true, false);
    f("invstd", invstd, sizeof(acc_t) * t.c, true, false);
    f("grad_weight", grad_weight.data, grad_weight.bytes(t.c), false, true);
    f("grad_bias", grad_bias.data, grad_bias.bytes(t.c), false, true);
    visit_team_workspace(team, slots, sync, f);
  }
};

}  // namespace batchnorm_cuda
