#include "plan_bytes.h"

#include <algorithm>

namespace batchnorm_cuda {
namespace {

constexpr int64_t kLineWindows = 8;  // of a line of the L2 cache

// Second reads run backwards, so that what was read last is found in the L2 cache. With a cache
// that keeps the most recently used lines, an element is still there if all that was touched since
// its first read fits beside it: `between` bytes, and behind the turn, for every window that lies
// between the element and the turn, `per_window` bytes. Returns how many bytes of each tensor
// before the turn are found.
int64_t found_in_l2(const DeviceInfo& device, int64_t between, int64_t per_window) {
  return std::max<int64_t>(device.l2_bytes - between, 0) * kWindowBytes / per_window;
}

// What goes with so many bytes of a tensor: `per_window` bytes with a window, of whole tensors and
// of a mask, whose bytes are whole.
int64_t beside(int64_t tensor, int64_t per_window) {
  return tensor * (per_window / kWindowBytes) +
         ceil_div(tensor, kWindowBytes) * (per_window % kWindowBytes);
}

// What the reduce kernel reads, and what the elementwise kernel reads and writes: bytes for each
// window of a tensor.
struct Touched {
  int64_t reduced = 0, transformed = 0, written = 0;
  int64_t mask_read = 0;
  int64_t twice() const { return std::min(reduced, transformed); }
  int64_t all() const { return std::max(reduced, transformed) + written; }
};

// The mask of a ReLU has a byte for each window.
constexpr int64_t kMaskBytes = 1;

Touched touched_by_stages(const Plan& plan, const Problem& p) {
  const bool forward = p.op == Op::kForwardTraining || p.op == Op::kForwardEval;
  int64_t reduced = forward ? 1 : 2;
  int64_t transformed = p.op == Op::kBackwardTraining ? 2 : 1;
  if (is_double_backward(p.op)) {
    // In eval the sums leave out x, and the outputs read at most this.
    transformed = 1 + (p.grad_output_shift >= 0) + (p.grad_grad_input_shift >= 0);
    reduced = transformed - (p.op == Op::kDoubleBackwardEval);
  }
  if (forward && p.residual_shift >= 0) transformed += 1;
  Touched t;
  const int64_t mask = p.mask ? kMaskBytes : 0;
  t.mask_read = forward ? 0 : mask;
  if (plan.has_reduce) t.reduced = reduced * kWindowBytes + t.mask_read;
  if (plan.has_elementwise) {
    t.transformed = transformed * kWindowBytes + t.mask_read;
    t.written = p.outputs * kWindowBytes + (forward ? mask : 0);
  }
  return t;
}

// Of the stage kernels: between the two reads of an element lie what both reduce and elementwise
// kernel touch of the rest of the tensor, all inputs and outputs. The double backward reads
// forwards both times: of what does not fit as a whole, each element is gone before its turn comes.
// Returns how many bytes of each tensor are found.
int64_t found_by_stages(const Touched& touched, int64_t tensor, Op op, const DeviceInfo& device) {
  if (touched.twice() == 0) return 0;
  if (is_double_backward(op) && beside(tensor, touched.all()) > device.l2_bytes) return 0;
  return std::min(tensor, found_in_l2(device, 0, touched.all()));
}

// Share of its cache lines that the slabs of all teams at work fill: the L2 cache keeps whole lines
// of four sectors each, and a slab that is no whole line leaves the rest of its lines empty.
double line_share(const Team& team) {
  if (team.pattern != Pattern::kAlongC) return 1.0;
  const Traversal& t = team.traversal;
  const int64_t at_once = ceil_div(t.channel_blocks, team.rounds);
  const int64_t windows = std::min(at_once * t.threads_x, t.row_windows);
  const int64_t lines = ceil_div(windows, kLineWindows) * kLineWindows;
  return static_cast<double>(windows) / static_cast<double>(lines);
}

// Of a team: what all teams hold on chip passes through the cache as well, and what they write.
int64_t found_by_teams(const Team& team, const Touched& touched, int64_t tensor,
                       DeviceInfo device) {
  device.l2_bytes = static_cast<int64_t>(static_cast<double>(device.l2_bytes) * line_share(team));
  const int64_t streamed = team.streamed_bytes / team.tensors / team.rounds;
  const int64_t held = tensor / team.rounds - streamed;
  const int64_t found = found_in_l2(device, beside(held, touched.all()), touched.all());
  return std::min(streamed, found) * team.rounds;
}

}  // namespace

void predict_bytes(Plan& plan, const Problem& p, const DeviceInfo& device) {
  const int64_t tensor = p.n * p.c * p.s * dtype_bytes(p.dtype);
  const Touched touched = touched_by_stages(plan, p);
  plan.compulsory_bytes = beside(tensor, touched.all());
  int64_t found;
  if (plan.strategy == Strategy::kTeam) {
    const Team& team = plan.team;
    plan.reread_bytes =
        team.streamed_bytes + beside(team.streamed_bytes / team.tensors, touched.mask_read);
    found = beside(found_by_teams(team, touched, tensor, device),
                   team.tensors * kWindowBytes + touched.mask_read);
  } else {
    plan.reread_bytes = beside(tensor, touched.twice());
    found = beside(found_by_stages(touched, tensor, p.op, device), touched.twice());
  }
  plan.predicted_bytes = plan.compulsory_bytes + plan.reread_bytes - found;
}

}  // namespace batchnorm_cuda
