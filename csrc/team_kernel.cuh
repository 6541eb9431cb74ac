// The kernel that reads every activation once: a team of blocks loads a channel group into
// registers and shared memory, reduces it, exchanges partial results (team.cuh) and forms its
// output from what it holds. One template over access pattern, type and operation (forward,
// backward); the scope of the team is an argument.
//
// A thread's windows, in the order of its cursor: first those that do not fit (streamed: they are
// reduced now and read again at the end, last first, while the L2 cache may still hold them), then
// those in registers, then those in shared memory. No thread reads another's windows, so holding
// them takes no barrier.
//
// An Operation says what is reduced and how the output is formed:
//   kTensors, Acc, tensor(p, k), aligned(p, k)   what is loaded
//   Operation(p, cursor)                          loads what accumulate() needs per channel
//   accumulate<kFull>(acc, vec, windows)          a batch of windows into the accumulators
//   prefetch(p, cursor)                           loads what finish() needs, ahead of the exchange
//   finish(p, cursor, acc)                        per-channel results, from the team's totals
//   output(p), form(vec, c, l)                    one lane of the output
#pragma once

#include "launch.cuh"
#include "team.cuh"

namespace batchnorm_cuda {

// What is done with each output value; the identity until something is fused here.
template <typename acc_t>
struct Identity {
  __device__ __forceinline__ acc_t operator()(acc_t value) const { return value; }
};

// One thread's windows of one channel group, on chip.
template <typename Cursor, typename Operation, int kWindows>
struct Resident {
  using scalar_t = typename Cursor::scalar_t;
  using index_t = typename Cursor::index_t;
  using Params = typename Operation::Params;
  static constexpr int kTensors = Operation::kTensors;
  static constexpr int kRegisters = kWindows / kTensors;  // windows of each tensor
  static constexpr int kBatch = kUnroll / kTensors;

  const Params& p;
  uint4* const shared;  // this thread's first slot; slots are kTeamThreads apart
  Vec<scalar_t> held[kTensors][kRegisters];
  index_t streamed = 0;
  int in_registers = 0, in_shared = 0;

  __device__ __forceinline__ Vec<scalar_t> load(int k, const Window<index_t>& window) const {
    return load_window<Cursor::kExact>(Operation::tensor(p, k), window, p.team.traversal.numel,
                                       Operation::aligned(p, k));
  }
  __device__ __forceinline__ uint4* slot(int i, int k) const {
    return shared + (i * kTensors + k) * kTeamThreads;
  }

  // Reduces what will not fit, and leaves `cursor` at the first window that does.
  template <typename Acc>
  __device__ __forceinline__ void stream(Operation& operation, Cursor& cursor, Acc& acc) {
    const index_t capacity = kRegisters + p.team.shared_windows;
    streamed = cursor.left > capacity ? cursor.left - capacity : 0;
    in_registers = static_cast<int>(cursor.left < kRegisters ? cursor.left : kRegisters);
    in_shared = static_cast<int>(cursor.left - streamed) - in_registers;
    for (index_t i = 0; i < streamed; i += kBatch) {
      Vec<scalar_t> vec[kTensors][kBatch];
      Window<index_t> windows[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        windows[u] = {0, 0, 0};
        if (i + u < streamed) windows[u] = cursor.take();
#pragma unroll
        for (int k = 0; k < kTensors; ++k) vec[k][u] = load(k, windows[u]);
      }
      operation.template accumulate<false>(acc, vec, windows);
    }
  }

  // Starts all loads: registers first, then shared memory behind them.
  __device__ __forceinline__ void fetch(Cursor cursor) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      Window<index_t> window{0, 0, 0};
      if (i < in_registers) window = cursor.take();
#pragma unroll
      for (int k = 0; k < kTensors; ++k) held[k][i] = load(k, window);
    }
    for (int i = 0; i < in_shared; ++i) {
      const Window<index_t> window = cursor.take();
#pragma unroll
      for (int k = 0; k < kTensors; ++k) {
        if (Cursor::kExact) {
          copy_async(slot(i, k),
                     reinterpret_cast<const uint4*>(Operation::tensor(p, k) + window.offset));
        } else {
          const Vec<scalar_t> vec = load(k, window);
          uint4 bits;
          memcpy(&bits, &vec, sizeof(bits));
          store_shared(slot(i, k), bits);
        }
      }
    }
  }

  __device__ __forceinline__ Vec<scalar_t> read_shared(int i, int k) const {
    const uint4 bits = load_shared(slot(i, k));
    Vec<scalar_t> vec;
    memcpy(&vec, &bits, sizeof(bits));
    return vec;
  }

  // Reduces what is on chip. `cursor` is where fetch() began: it yields the masks again.
  template <typename Acc>
  __device__ __forceinline__ void accumulate(Operation& operation, Cursor cursor, Acc& acc) {
    Window<index_t> held_windows[kRegisters];
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      held_windows[i] = {0, 0, 0};
      if (i < in_registers) held_windows[i] = cursor.take();
    }
    operation.template accumulate<false>(acc, held, held_windows);
    if (in_shared == 0) return;
    wait_for_copies();
    for (int i = 0; i < in_shared; i += kBatch) {
      Vec<scalar_t> vec[kTensors][kBatch];
      Window<index_t> windows[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        windows[u] = {0, 0, 0};
        if (i + u < in_shared) windows[u] = cursor.take();
#pragma unroll
        for (int k = 0; k < kTensors; ++k) {
          vec[k][u] = i + u < in_shared ? read_shared(i + u, k) : Vec<scalar_t>{};
        }
      }
      operation.template accumulate<false>(acc, vec, windows);
    }
  }

  // To be called between accumulate() and write(): the converted values of the first, twice the
  // size of the data in half precision, would not fit beside it until the second.
  __device__ __forceinline__ void drop_conversions() {
#pragma unroll
    for (int i = 0; i < kRegisters * kTensors; ++i) {
      Vec<scalar_t>& vec = held[i % kTensors][i / kTensors];
      uint4 bits;
      memcpy(&bits, &vec, sizeof(bits));
      forget_derived(bits);
      memcpy(&vec, &bits, sizeof(bits));
    }
  }

  // Forms and stores the output of every window: from chip, then the streamed ones backwards.
  template <typename Epilogue>
  __device__ __forceinline__ void write(const Operation& operation, Cursor cursor,
                                        const Epilogue& epilogue) const {
    Cursor back = cursor;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      if (i >= in_registers) continue;
      Vec<scalar_t> vec[kTensors];
#pragma unroll
      for (int k = 0; k < kTensors; ++k) vec[k] = held[k][i];
      emit(operation, cursor.take(), vec, epilogue);
    }
    for (int i = 0; i < in_shared; ++i) {
      Vec<scalar_t> vec[kTensors];
#pragma unroll
      for (int k = 0; k < kTensors; ++k) vec[k] = read_shared(i, k);
      emit(operation, cursor.take(), vec, epilogue);
    }
    for (index_t i = 0; i < streamed; ++i) {
      const Window<index_t> window = back.take_back();
      Vec<scalar_t> vec[kTensors];
#pragma unroll
      for (int k = 0; k < kTensors; ++k) vec[k] = load(k, window);
      emit(operation, window, vec, epilogue);
    }
  }

 private:
  template <typename Epilogue>
  __device__ __forceinline__ void emit(const Operation& operation, const Window<index_t>& window,
                                       const Vec<scalar_t> (&vec)[kTensors],
                                       const Epilogue& epilogue) const {
    acc_type<scalar_t> value[Cursor::kVecSize];
#pragma unroll
    for (int l = 0; l < Cursor::kVecSize; ++l) value[l] = epilogue(operation.form(vec, l));
    store_window<Cursor::kExact>(Operation::output(p), window, round_to<scalar_t>(value));
  }
};

template <typename Cursor, template <typename> class OperationOf, int kWindows, typename Epilogue>
__global__ void __launch_bounds__(kTeamThreads, kTeamBlocksPerSm)
    team_kernel(const typename OperationOf<Cursor>::Params p, const Epilogue epilogue) {
  using Operation = OperationOf<Cursor>;
  using Acc = typename Operation::Acc;
  using acc_t = acc_type<typename Cursor::scalar_t>;
  unsigned char* const shared = dynamic_shared();
  acc_t* const scratch = reinterpret_cast<acc_t*>(shared);
  acc_t* const slots = reinterpret_cast<acc_t*>(shared + p.team.scratch_bytes);
  uint4* const data = reinterpret_cast<uint4*>(shared + p.team.data_offset);
  const Traversal& t = p.team.traversal;
  TeamExchange<Cursor, Acc, acc_t> exchange(p.team, scratch, slots, p.slots, p.sync);
  for (int64_t group = exchange.team(); group < t.channel_blocks; group += p.team.teams) {
    Cursor cursor(t, exchange.rank() * t.channel_blocks + group);
    Operation operation(p, cursor);
    Resident<Cursor, Operation, kWindows> resident{p,
                                                   data + threadIdx.y * blockDim.x + threadIdx.x};
    Acc acc[Cursor::kChannels];
    resident.stream(operation, cursor, acc);
    resident.fetch(cursor);
    resident.accumulate(operation, cursor, acc);
    resident.drop_conversions();
    cursor.forget();
    operation.prefetch(p, cursor);
    exchange.all_reduce(cursor, acc);
    operation.finish(p, cursor, acc);
    resident.write(operation, cursor, epilogue);
  }
  exchange.finish();
}

// Launches the variant of the kernel that the plan asks for.
template <typename Cursor, template <typename> class OperationOf, typename Params>
LaunchStatus launch_team_variant(const Params& params, cudaStream_t stream) {
  using Epilogue = Identity<typename Params::acc_t>;
  constexpr int kLarge = team_windows_large(Cursor::kPattern, Cursor::kExact);
  if constexpr (team_has_small(Cursor::kPattern)) {
    if (params.team.register_windows * OperationOf<Cursor>::kTensors == kTeamWindowsSmall) {
      return launch_team(team_kernel<Cursor, OperationOf, kTeamWindowsSmall, Epilogue>, params.team,
                         stream, params, Epilogue{});
    }
  }
  return launch_team(team_kernel<Cursor, OperationOf, kLarge, Epilogue>, params.team, stream,
                     params, Epilogue{});
}

template <template <typename> class OperationOf, typename Params>
LaunchStatus launch_team_pattern(const Params& params, cudaStream_t stream) {
  using scalar_t = typename Params::scalar_t;
  switch (params.team.pattern) {
    case Pattern::kAlongC:
      return launch_team_variant<AlongC<scalar_t, int32_t, true>, OperationOf>(params, stream);
    case Pattern::kAlongRow:
      return launch_team_variant<AlongRow<scalar_t, int32_t>, OperationOf>(params, stream);
    default:
      if (params.team.traversal.exact) {
        return launch_team_variant<AlongS<scalar_t, int32_t, true>, OperationOf>(params, stream);
      }
      return launch_team_variant<AlongS<scalar_t, int64_t, false>, OperationOf>(params, stream);
  }
}

}  // namespace batchnorm_cuda
