// The kernel that reads every activation once: a team of blocks loads a channel group into
// registers and shared memory (resident.cuh), reduces it, exchanges partial results (team.cuh) and
// forms its output from what it holds. One template over access pattern, type and operation
// (forward, backward); the scope of the team is an argument.
//
// An Operation says what is reduced and how the output is formed:
//   kTensors, Acc, tensor(p, k)                   what is loaded
//   Operation(p, cursor)                          loads what accumulate() needs per channel
//   accumulate<kBatched>(acc, vec, windows)       a batch of windows into the accumulators
//   load_parameters(p, channel)                   loads what finish() needs, ahead of the exchange
//   finish(p, parameters, total, channel, owner)  the channel's Formula, from the team's total; the
//                                                 owner, one thread of the team, saves results
//   formula[c]                                    that of channel c of the thread
//   output(p), form(vec, l)                       lanes l and l + 1 of the output
#pragma once

#include "launch.cuh"
#include "resident.cuh"
#include "team.cuh"

namespace batchnorm_cuda {

// Exchanges and finishes where all lanes of a thread are of one channel.
template <typename Cursor, typename Operation, typename Exchange, typename Params>
__device__ __forceinline__ void finish_channel(const Params& p, const Cursor& cursor,
                                               Exchange& exchange, Operation& operation,
                                               typename Operation::Acc& acc) {
  const bool valid = cursor.channel_valid(0);
  typename Operation::Parameters parameters;
  if (valid) parameters = Operation::load_parameters(p, cursor.channel(0));
  exchange.all_reduce(acc);
  if (!valid) return;
  const bool owner = cursor.owns_channel(0);
  operation.formula[0] = Operation::finish(p, parameters, acc, cursor.channel(0), owner);
}

// The same with a channel a lane: a thread finishes another of the block's channels, and leaves its
// formula in shared memory for all that have lanes of it.
template <typename Cursor, typename Operation, typename Exchange, typename Params>
__device__ __forceinline__ void finish_channels(const Params& p, const Cursor& cursor,
                                                Exchange& exchange, Operation& operation,
                                                typename Operation::Acc (&acc)[Cursor::kChannels]) {
  using Formula = typename Operation::Formula;
  using index_t = typename Cursor::index_t;
  const Traversal& t = p.team.traversal;
  const int channels = Cursor::channels(t);
  const int threads = blockDim.x * blockDim.y;
  int mine = threadIdx.y * blockDim.x + threadIdx.x;
  forget_derived(mine);
  const int64_t first = Cursor::first_channel(t, exchange.template group<index_t>());
  typename Operation::Parameters parameters;
  if (mine < channels && first + mine < t.c) {
    parameters = Operation::load_parameters(p, first + mine);
  }
  auto* const results = exchange.all_reduce(cursor, acc);
  const bool owner = exchange.rank() == 0;
#pragma unroll 1
  for (int k = mine; k < channels; k += threads) {
    const int64_t channel = first + k;
    Formula formula = {};
    if (channel < t.c) {
      if (k != mine) parameters = Operation::load_parameters(p, channel);
      typename Operation::Acc total;
#pragma unroll
      for (int f = 0; f < Operation::Acc::kFields; ++f) {
        total.field(f) = load_shared(results + f * channels + k);
      }
      formula = Operation::finish(p, parameters, total, channel, owner);
    }
#pragma unroll
    for (int f = 0; f < Formula::kFields; ++f) {
      store_shared(results + f * channels + k, formula.field(f));
    }
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < Cursor::kChannels; ++c) {
    const int k = cursor.channel_of_block(c);
#pragma unroll
    for (int f = 0; f < Formula::kFields; ++f) {
      operation.formula[c].field(f) = load_shared(results + f * channels + k);
    }
  }
  __syncthreads();
}

// kWindows: team_windows() of the plan, in the kernel's name for who reads its machine code.
// Epilogue: what is fused (fused.cuh).
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
  using index_t = typename Cursor::index_t;
  const auto groups = static_cast<index_t>(t.channel_blocks);
  Resident<Cursor, Operation, kWindows, Epilogue> resident(
      p, epilogue, data + threadIdx.y * blockDim.x + threadIdx.x);
  for (; exchange.template group<index_t>() < groups; exchange.end_round()) {
    Cursor cursor(t, part_of_rank(t, exchange.rank(), exchange.template group<index_t>()));
    Operation operation(p, cursor);
    Acc acc[Cursor::kChannels];
    resident.stream(operation, cursor, acc);
    resident.fetch(cursor);
    resident.accumulate(operation, cursor, acc);
    if constexpr (Cursor::kLanes == Lanes::kKept) {
#pragma unroll
      for (int c = 0; c < Cursor::kChannels; ++c) {
        if (!cursor.channel_valid(c)) acc[c] = Acc();
      }
    }
    cursor.forget();
    if constexpr (Cursor::kChannels == 1) {
      finish_channel(p, cursor, exchange, operation, acc[0]);
    } else {
      finish_channels(p, cursor, exchange, operation, acc);
    }
    resident.write(operation, cursor);
  }
  exchange.finish();
}

template <typename Cursor, template <typename> class OperationOf, typename Params,
          typename Epilogue>
LaunchStatus launch_team_variant(const Params& params, const Epilogue& epilogue,
                                 cudaStream_t stream) {
  constexpr bool kFused = !std::is_same_v<Epilogue, Identity<typename Params::acc_t>>;
  constexpr int kWindows =
      team_windows(Cursor::kPattern, Cursor::kExact, sizeof(typename Cursor::scalar_t),
                   OperationOf<Cursor>::kTensors, kFused);
  return launch_team(team_kernel<Cursor, OperationOf, kWindows, Epilogue>, params.team, stream,
                     params, epilogue);
}

template <template <typename> class OperationOf, typename Params, typename Epilogue>
LaunchStatus launch_team_pattern(const Params& params, const Epilogue& epilogue,
                                 cudaStream_t stream) {
  using scalar_t = typename Params::scalar_t;
  switch (params.team.pattern) {
    case Pattern::kAlongC:
      return launch_team_variant<AlongC<scalar_t, int32_t, true>, OperationOf>(params, epilogue,
                                                                               stream);
    case Pattern::kAlongRow:
      if (!params.team.traversal.exact) {
        return launch_team_variant<AlongSamples<scalar_t, int32_t>, OperationOf>(params, epilogue,
                                                                                 stream);
      }
      return launch_team_variant<AlongRow<scalar_t, int32_t>, OperationOf>(params, epilogue,
                                                                           stream);
    default:
      if (params.team.traversal.exact) {
        return launch_team_variant<AlongS<scalar_t, int32_t>, OperationOf>(params, epilogue,
                                                                           stream);
      }
      return launch_team_variant<AlongRuns<scalar_t, int32_t, false>, OperationOf>(params, epilogue,
                                                                                   stream);
  }
}

}  // namespace batchnorm_cuda
