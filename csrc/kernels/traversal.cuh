// How a thread walks over its windows of the tensor, for the access patterns of geometry.h. A
// cursor is made per task, or per split and channel block; `left` windows remain, take() hands out
// the next one. No division per window.
//
// The windows of a walk are whole. Where runs or tensors begin or end inside of a window (kExact is
// false), those parts are the walk's edges: windows of which only some lanes are the caller's,
// apart from the others, so that nothing is masked in the loops that move nearly all bytes.
#pragma once

#include "walk_runs.cuh"
#include "walk_strided.cuh"

namespace batchnorm_cuda {

// Calls f(window) for every edge of the thread's walk.
template <typename Cursor, typename F>
__device__ __forceinline__ void for_each_edge(const Cursor& cursor, F&& f) {
  if constexpr (Cursor::kEdges) {
#pragma unroll 1
    for (auto edges = cursor.edges(); edges.any();) f(edges.take());
  }
}

// Does a reduce stage load the next batch while it merges one? Beside the instructions of wide
// indices, or of what is fused, there are no issue slots for the copies that this takes.
template <typename Cursor>
inline constexpr bool kLoadsAhead = sizeof(typename Cursor::index_t) == sizeof(int32_t);

}  // namespace batchnorm_cuda
