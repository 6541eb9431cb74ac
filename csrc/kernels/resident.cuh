// What one thread of a team kernel holds of a channel group, on chip, and its four phases: reduce
// what does not fit (stream), load what does (fetch), reduce that (accumulate), form the output of
// all of it (write).
//
// A thread's windows, in the order of its cursor: first those that do not fit (they are reduced now
// and read again at the end, last first, while the L2 cache may still hold them), then those in
// registers, then those in shared memory. No thread reads another's windows, so holding them takes
// no barrier. A thread's first edge (traversal.cuh) is held as well, others are read twice: they
// are few, and what is read lies beside what is held. All of it is reduced batch by batch, as the
// loads of the batches behind it arrive.
//
// What is fused (fused.cuh) passes by: a residual is loaded while the output is formed, bits of a
// mask filter dy as soon as it is on chip.
#pragma once

#include "../params.h"
#include "accumulate.cuh"
#include "fused.cuh"

namespace batchnorm_cuda {

template <typename Cursor, typename Operation, int kWindows, typename Epilogue>
class Resident {
 public:
  using scalar_t = typename Cursor::scalar_t;
  using index_t = typename Cursor::index_t;
  using Params = typename Operation::Params;

  // `shared`: this thread's first slot of the block's windows; its slots are kTeamThreads apart.
  __device__ __forceinline__ Resident(const Params& p, const Epilogue& epilogue, uint4* shared)
      : p_(p), epilogue_(epilogue), shared_(shared) {}

  // Reduces what will not fit, and leaves `cursor` at the first window that does.
  template <typename Acc>
  __device__ __forceinline__ void stream(const Operation& operation, Cursor& cursor, Acc& acc) {
    const index_t capacity = kRegisters + p_.team.shared_windows;
    streamed_ = cursor.left > capacity ? cursor.left - capacity : 0;
#pragma unroll 1
    for (index_t i = 0; i < streamed_; i += kBatch) {
      Batch<kBatch> batch;
      for_each_present<kBatch>(streamed_ - i, [&](int u) { batch.windows[u] = cursor.take(); });
      load(batch);
      operation.template accumulate<Batched::kPresent>(acc, batch.vec, batch.windows);
    }
  }

  // Starts all loads: registers first, then shared memory behind them.
  __device__ __forceinline__ void fetch(Cursor cursor) {
    const Places here = places_for(cursor);
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      Window<index_t> window{0, 0, 0};
      if (i < here.registers) window = cursor.take();
#pragma unroll
      for (int k = 0; k < kTensors; ++k) held_[k][i] = to_bits(load(k, window));
    }
    // Of more, the addresses would not fit beside what registers hold.
    constexpr int kAtOnce = Cursor::kLanes == Lanes::kKept ? 2 : 1;
#pragma unroll kAtOnce
    for (int i = 0; i < here.shared; ++i) fetch_shared(i, cursor);
    fetch_edge(cursor);
  }

  // Reduces what is on chip. `cursor` is where fetch() began: it yields the masks again.
  template <typename Acc>
  __device__ __forceinline__ void accumulate(const Operation& operation, const Cursor& cursor,
                                             Acc& acc) {
    if constexpr (kFiltered) filter_held(cursor);
    visit(cursor, [&](auto batched, const auto& b) {
      operation.template accumulate<decltype(batched)::value>(acc, b.vec, b.windows);
    });
    drop_conversions();
  }

  // Forms and stores the output of every window: from chip, then the streamed ones backwards.
  __device__ __forceinline__ void write(const Operation& operation, Cursor cursor) {
    Cursor back = cursor;
    write_held(operation, cursor);
#pragma unroll 1
    for (index_t i = 0; i < streamed_; i += kBatch) {
      Batch<kBatch> batch;
      for_each_present<kBatch>(streamed_ - i, [&](int u) { batch.windows[u] = back.take_back(); });
      load(batch);
      Loaded loaded[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) loaded[u] = load_operand_of(batch.windows[u]);
      for_each_present<kBatch>(streamed_ - i, [&](int u) {
        Vec<scalar_t> vec[kTensors];
#pragma unroll
        for (int k = 0; k < kTensors; ++k) vec[k] = batch.vec[k][u];
        emit<Cursor::kLanes>(operation, batch.windows[u], vec, loaded[u]);
      });
    }
  }

 private:
  static constexpr int kTensors = Operation::kTensors;
  // Of what is fused: dy is filtered, or a residual is loaded for each window.
  static constexpr bool kFiltered = std::is_same_v<Epilogue, FusedBackward<scalar_t>>;
  static constexpr bool kAdds = std::is_same_v<Epilogue, FusedForward<scalar_t>>;
  using Loaded = OperandOf<Epilogue>;

  __device__ __forceinline__ void write_held(const Operation& operation, Cursor& cursor) {
    const Places here = places_for(cursor);
#pragma unroll
    for (int i = 0; i < kRegisters; i += kAhead) {
      emit_batch(operation, cursor, here.registers - i,
                 [&](int u, int k) { return held_[k][i + u < kRegisters ? i + u : 0]; });
    }
    int i = 0;
    const auto held = [&](int u, int k) { return load_shared(slot(i + u, k)); };
    // Whole batches apart: which windows are there is a good part of the instructions else.
#pragma unroll kPerTurn
    for (; i + kAhead <= here.shared; i += kAhead) emit_batch(operation, cursor, kAhead, held);
    if (i < here.shared) emit_batch(operation, cursor, here.shared - i, held);
    write_edges(operation, cursor);
  }
  template <typename Held>
  __device__ __forceinline__ void emit_batch(const Operation& operation, Cursor& cursor,
                                             int present, Held&& held) const {
    Window<index_t> windows[kAhead] = {};
    Loaded loaded[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (u < present) windows[u] = cursor.take();
      loaded[u] = load_operand_of(windows[u]);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (u >= present) continue;
      Vec<scalar_t> vec[kTensors];
#pragma unroll
      for (int k = 0; k < kTensors; ++k) vec[k] = to_values(held(u, k));
      emit<Cursor::kLanes>(operation, windows[u], vec, loaded[u]);
    }
  }

  __device__ __forceinline__ void write_edges(const Operation& operation, const Cursor& cursor) {
    visit_edges(cursor, [&](const Window<index_t>& window, const auto& vec) {
      emit<Lanes::kMasked>(operation, window, vec, load_operand_of<Lanes::kMasked>(window));
    });
  }

  // Windows of each tensor that a thread holds in registers.
  static constexpr int kRegisters = kWindows / kTensors;
  static constexpr int kBatch = kUnroll / kTensors;
  // Batches in a turn of a loop over shared memory, which share what the loop itself costs: of the
  // forward's runs, which need it for the issue budget. Others have no registers for it.
  static constexpr bool kRuns = Cursor::kEdges && Cursor::kChannels == 1 && kTensors == 1;
  static constexpr int kPerTurn = kRuns && sizeof(scalar_t) < sizeof(double) ? 2 : 1;

  // Windows whose residuals or bits of the mask are loaded at once. Masks and channels of the lanes
  // together leave registers for two.
  static constexpr int kFewOrMore = Cursor::kExact || Cursor::kChannels == 1 ? 4 : 2;
  static constexpr int kAhead = kAdds || kFiltered ? kFewOrMore : 1;

  // Windows of each tensor that a thread holds of a group.
  struct Places {
    int registers = 0, shared = 0;
  };
  __device__ __forceinline__ static Places places_for(const Cursor& cursor) {
    const int held = static_cast<int>(cursor.left);
    const int registers = held < kRegisters ? held : kRegisters;
    return {registers, held - registers};
  }
  __device__ __forceinline__ void fetch_shared(int i, Cursor& cursor) {
    const Window<index_t> window = cursor.take();
#pragma unroll
    for (int k = 0; k < kTensors; ++k) {
      copy_async(slot(i, k),
                 reinterpret_cast<const uint4*>(Operation::tensor(p_, k) + window.offset));
    }
  }

  __device__ __forceinline__ void fetch_edge(const Cursor& cursor) {
    if constexpr (Cursor::kEdges) {
      auto edges = cursor.edges();
      Window<index_t> window{0, 0, 0};
      if (edges.any()) window = edges.take();
#pragma unroll
      for (int k = 0; k < kTensors; ++k) edge_[k] = to_bits(load<Lanes::kMasked>(k, window));
    }
  }

  // Calls f(window, vec) for every edge, the first of which is held.
  template <typename F>
  __device__ __forceinline__ void visit_edges(const Cursor& cursor, F&& f) const {
    bool held = true;
    for_each_edge(cursor, [&](const Window<index_t>& window) {
      Vec<scalar_t> vec[kTensors];
#pragma unroll
      for (int k = 0; k < kTensors; ++k) {
        vec[k] = held ? to_values(edge_[k]) : load<Lanes::kMasked>(k, window);
      }
      if constexpr (kFiltered) {
        keep_lanes(vec[0], load_bits<scalar_t>(epilogue_.mask, window), epilogue_.below);
      }
      held = false;
      f(window, vec);
    });
  }

  template <int kCount>
  struct Batch {
    Vec<scalar_t> vec[kTensors][kCount];
    Window<index_t> windows[kCount] = {};
  };

  // Calls f(u) for u < min(kCount, left).
  template <int kCount, typename F>
  __device__ __forceinline__ static void for_each_present(index_t left, F&& f) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (u < left) f(u);
    }
  }

  template <Lanes kLanes = Cursor::kLanes>
  __device__ __forceinline__ Vec<scalar_t> load(int k, const Window<index_t>& window) const {
    return load_window<kLanes>(Operation::tensor(p_, k), window, p_.team.traversal.numel, true);
  }
  template <int kCount>
  __device__ __forceinline__ void load(Batch<kCount>& batch) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
#pragma unroll
      for (int k = 0; k < kTensors; ++k) batch.vec[k][u] = load(k, batch.windows[u]);
    }
    if constexpr (kFiltered) filter(epilogue_, batch.vec[0], batch.windows);
  }

  __device__ __forceinline__ uint4* slot(int i, int k) const {
    return shared_ + (i * kTensors + k) * kTeamThreads;
  }
  __device__ __forceinline__ static uint4 to_bits(const Vec<scalar_t>& vec) {
    uint4 bits;
    memcpy(&bits, &vec, sizeof(bits));
    return bits;
  }
  __device__ __forceinline__ static Vec<scalar_t> to_values(const uint4& bits) {
    Vec<scalar_t> vec;
    memcpy(&vec, &bits, sizeof(bits));
    return vec;
  }

  // Calls f(Batched, batch) for all that is on chip. Absent windows are zeros.
  template <typename F>
  __device__ __forceinline__ void visit(Cursor cursor, F&& f) const {
    constexpr std::integral_constant<Batched, Batched::kPresent> whole;
    constexpr bool kApart = Cursor::kLanes == Lanes::kKept;  // foreign lanes have sums of their own
    constexpr std::integral_constant<Batched, kApart ? Batched::kPresent : Batched::kMasked>
        of_edges;
    const Places here = places_for(cursor);
#pragma unroll
    for (int i = 0; i < kRegisters; i += kBatch) {
      Batch<kBatch> batch;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const bool last = i + u >= kRegisters;  // of a batch that is not whole
        if (!last && i + u < here.registers) batch.windows[u] = cursor.take();
#pragma unroll
        for (int k = 0; k < kTensors; ++k) {
          batch.vec[k][u] = last ? Vec<scalar_t>{} : to_values(held_[k][last ? 0 : i + u]);
        }
      }
      f(whole, batch);
    }
    visit_edges(cursor, [&](const Window<index_t>& window, const auto& vec) {
      Batch<1> batch{{}, {window}};
#pragma unroll
      for (int k = 0; k < kTensors; ++k) batch.vec[k][0] = vec[k];
      f(of_edges, batch);
    });
    if (here.shared == 0) return;
    wait_for_copies();
#pragma unroll kPerTurn
    for (int i = 0; i < here.shared; i += kBatch) {
      Batch<kBatch> batch;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const bool present = i + u < here.shared;
        if (present) batch.windows[u] = cursor.take();
#pragma unroll
        for (int k = 0; k < kTensors; ++k) {
          batch.vec[k][u] = to_values(present ? load_shared(slot(i + u, k)) : uint4{0, 0, 0, 0});
        }
      }
      f(whole, batch);
    }
  }

  // Between two uses of what is held: converted values of the first, twice the size of the data in
  // half precision, would not fit beside it until the second.
  __device__ __forceinline__ void drop_conversions() {
#pragma unroll
    for (int i = 0; i < kRegisters * kTensors; ++i) {
      forget_derived(held_[i % kTensors][i / kTensors]);
    }
  }

  template <Lanes kLanes>
  __device__ __forceinline__ void emit(const Operation& operation, const Window<index_t>& window,
                                       const Vec<scalar_t> (&vec)[kTensors],
                                       const Loaded& loaded) const {
    const auto form = [&](int l) { return operation.form(vec, l); };
    if constexpr (kFiltered) {
      store_output<Cursor::kExact, kLanes>(epilogue_, vec[0], Operation::output(p_), window, form);
    } else {
      store_output<Cursor::kExact, kLanes>(epilogue_, loaded, Operation::output(p_), window, form);
    }
  }

  template <Lanes kLanes = Cursor::kLanes>
  __device__ __forceinline__ Loaded load_operand_of(const Window<index_t>& window) const {
    if constexpr (kAdds) {
      return load_operand<true, kLanes>(epilogue_, window, p_.team.traversal.numel);
    } else {
      return {};
    }
  }

  // Filters dy where it lies, once for all that is done with it. The bits of several windows are on
  // their way at once.
  __device__ __forceinline__ void filter_held(Cursor cursor) {
    const Places here = places_for(cursor);
    uint32_t bits[kRegisters];
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      Window<index_t> window{0, 0, 0};
      if (i < here.registers) window = cursor.take();
      bits[i] = load_bits<scalar_t>(epilogue_.mask, window);
    }
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) held_[0][i] = kept(held_[0][i], bits[i]);
#pragma unroll 1
    for (int i = 0; i < here.shared; i += kAhead) {
      uint32_t more[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        Window<index_t> window{0, 0, 0};
        if (i + u < here.shared) window = cursor.take();
        more[u] = load_bits<scalar_t>(epilogue_.mask, window);
      }
      wait_for_copies();
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (i + u >= here.shared) continue;
        store_shared(slot(i + u, 0), kept(load_shared(slot(i + u, 0)), more[u]));
      }
    }
  }
  __device__ __forceinline__ uint4 kept(const uint4& dy, uint32_t bits) const {
    Vec<scalar_t> vec = to_values(dy);
    keep_lanes(vec, bits, epilogue_.below);
    return to_bits(vec);
  }

  const Params& p_;
  const Epilogue& epilogue_;
  uint4* const shared_;
  // As bits: values of 16 bits would each be kept in a register of their own.
  uint4 held_[kTensors][kRegisters];
  uint4 edge_[kTensors];
  index_t streamed_ = 0;
};

}  // namespace batchnorm_cuda
