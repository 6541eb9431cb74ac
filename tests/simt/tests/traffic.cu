// The count of memory traffic: sectors and DRAM bytes of accesses whose answer is known by hand.
#include <functional>
#include <stdexcept>

#include "harness.h"
#include "simt_traffic.h"

namespace simt_test {
namespace {

using batchnorm_cuda::mark_step;

// Describes a device for one case, and puts the default one back.
struct Device {
  explicit Device(int l2_bytes) {
    simt::DeviceDescription device;
    device.l2_bytes = l2_bytes;
    simt::set_device(device);
  }
  ~Device() { simt::set_device(simt::DeviceDescription()); }
};

simt::TrafficReport traffic_of(const std::function<void()>& work) {
  simt::start_traffic();
  work();
  return simt::stop_traffic();
}

// All accesses of a kernel in one direction.
simt::SiteTraffic total(const simt::TrafficReport& report, bool write) {
  simt::SiteTraffic sum{};
  for (const simt::SiteTraffic& site : report.sites) {
    if (site.write != write) continue;
    sum.accesses += site.accesses;
    sum.sectors += site.sectors;
    sum.fewest += site.fewest;
  }
  return sum;
}

bool counts(const simt::SiteTraffic& site, uint64_t accesses, uint64_t sectors, uint64_t fewest) {
  return site.accesses == accesses && site.sectors == sectors && site.fewest == fewest;
}

// Lane i reads element offset + i * stride.
template <typename T>
__global__ void read_kernel(Buffer<T> in, int offset, int stride) {
  load_global(in.data + offset + static_cast<int>(thread_rank()) * stride);
}

template <typename T>
simt::TrafficReport read_once(int threads, int offset, int stride) {
  Memory<T> in(4096);
  const unsigned int block = static_cast<unsigned int>(threads);
  return traffic_of(
      [&] { launch({1, block}, read_kernel<T>, in.as(Use::kInput), offset, stride); });
}

SIMT_CASE(traffic_aligned_neighbours) {
  const simt::TrafficReport report = read_once<float>(32, 0, 1);
  EXPECT(counts(total(report, false), 1, 4, 4));
  EXPECT(report.launches.size() == 1 && report.buffers.size() == 1);
  EXPECT(report.buffers[0].dram_read == 128 && report.buffers[0].dram_written == 0);
}

SIMT_CASE(traffic_wide_and_misaligned) {
  EXPECT(counts(total(read_once<uint4>(32, 0, 1), false), 1, 16, 16));
  EXPECT(counts(total(read_once<uint4>(32, 1, 1), false), 1, 17, 16));
}

SIMT_CASE(traffic_stride_two) { EXPECT(counts(total(read_once<float>(32, 0, 2), false), 1, 8, 4)); }

SIMT_CASE(traffic_bytes) {
  EXPECT(counts(total(read_once<unsigned char>(32, 0, 1), false), 1, 1, 1));
  EXPECT(counts(total(read_once<unsigned char>(32, 8, 1), false), 1, 2, 1));
  EXPECT(read_once<unsigned char>(32, 8, 1).buffers[0].dram_read == 64);
}

SIMT_CASE(traffic_one_word_for_all_lanes) {
  EXPECT(counts(total(read_once<float>(32, 5, 0), false), 1, 1, 1));
}

SIMT_CASE(traffic_warps_are_apart) {
  EXPECT(counts(total(read_once<float>(40, 0, 1), false), 2, 5, 5));
}

// The same instruction again is another warp access, although lanes run one after another.
__global__ void read_rows_kernel(Buffer<float> in, int rows) {
  for (int row = 0; row < rows; ++row) load_global(in.data + row * 32 + threadIdx.x);
}

SIMT_CASE(traffic_turns_are_apart) {
  Memory<float> in(96);
  const auto report = traffic_of([&] { launch({1, 32}, read_rows_kernel, in.as(Use::kInput), 3); });
  EXPECT(counts(total(report, false), 3, 12, 12));
}

// A step is 16 bytes for each lane, of which it reads four. Odd lanes skip the last of three steps,
// even lanes the first.
__global__ void read_steps_kernel(Buffer<float> in) {
  const simt::Site site = simt::Site::current();
  for (unsigned int step = 0; step < 3; ++step) {
    mark_step(site);
    if (step == (threadIdx.x % 2 == 0 ? 0u : 2u)) continue;
    load_global(in.data + 4 * (step * 32 + threadIdx.x), site);
  }
}

SIMT_CASE(traffic_steps_hold_lanes_together) {
  Memory<float> in(384);
  const auto report = traffic_of([&] { launch({1, 32}, read_steps_kernel, in.as(Use::kInput)); });
  EXPECT(counts(total(report, false), 3, 48, 8));  // 16 + 16 + 16 sectors, not 32 + 32
}

// Each lane writes `count` halves of 16 bytes of its own sector.
__global__ void write_halves_kernel(Buffer<uint4> out, int count) {
  for (int half = 0; half < count; ++half) {
    store_global(out.data + 2 * threadIdx.x + half, make_uint4(1, 2, 3, 4));
  }
}

SIMT_CASE(traffic_of_partial_writes) {
  Memory<uint4> out(64);
  const auto half =
      traffic_of([&] { launch({1, 32}, write_halves_kernel, out.as(Use::kPersistent), 1); });
  EXPECT(counts(total(half, true), 1, 32, 16));
  EXPECT(half.buffers[0].dram_written == 1024);
  EXPECT(half.buffers[0].dram_read == 1024);  // the other halves, to complete the sectors
  const auto whole =
      traffic_of([&] { launch({1, 32}, write_halves_kernel, out.as(Use::kPersistent), 2); });
  EXPECT(counts(total(whole, true), 2, 64, 32));
  EXPECT(whole.buffers[0].dram_written == 1024 && whole.buffers[0].dram_read == 0);
}

SIMT_CASE(traffic_of_a_second_launch) {
  Memory<float> in(2048);
  const auto twice = [&] {
    for (int i = 0; i < 2; ++i) launch({1, 32}, read_rows_kernel, in.as(Use::kInput), 64);
  };
  EXPECT(traffic_of(twice).buffers[0].dram_read == 8192);
  const Device small(4096);  // each row has left before it is read again
  EXPECT(traffic_of(twice).buffers[0].dram_read == 16384);
}

SIMT_CASE(traffic_of_blocks_that_run_together) {
  Memory<float> in(2048);
  const auto both = [&] { launch({2, 32}, read_rows_kernel, in.as(Use::kInput), 64); };
  simt::DeviceDescription device;
  device.l2_bytes = 4096;
  const Device restore(4096);
  EXPECT(traffic_of(both).buffers[0].dram_read == 8192);
  device.sm_count = device.max_blocks_per_sm = 1;
  simt::set_device(device);
  EXPECT(traffic_of(both).buffers[0].dram_read == 16384);
}

// Block 1 reads rows before it fills the slot; block 0 has nothing to do but wait for it.
__global__ void hand_over_kernel(Buffer<float> in, Buffer<float> slot, Buffer<uint64_t> flag) {
  if (blockIdx.x == 1) {
    for (int row = 0; row < 64; ++row) load_global(in.data + row * 32 + threadIdx.x);
    store_global(slot.data + threadIdx.x, 1.0f);
    __syncthreads();
    if (threadIdx.x == 0) batchnorm_cuda::store_release(flag.data, uint64_t{1});
    return;
  }
  if (threadIdx.x == 0) {
    while (batchnorm_cuda::load_acquire(flag.data) == 0) {
    }
  }
  __syncthreads();
  load_global(slot.data + threadIdx.x);
}

SIMT_CASE(traffic_of_scratch_that_is_waited_for) {
  Memory<float> in(2048), slot(32);
  Memory<uint64_t> flag(1);
  const auto report = traffic_of([&] {
    Shape shape{2, 32};
    shape.cooperative = true;
    launch(shape, hand_over_kernel, in.as(Use::kInput), slot.as(Use::kScratch),
           flag.as(Use::kPersistent));
  });
  EXPECT(report.buffers.size() == 3);
  EXPECT(report.buffers[0].dram_read == 8192);
  EXPECT(report.buffers[1].dram_read == 0 && report.buffers[1].dram_written == 128);
}

// Scratch that is read back after many other reads.
__global__ void read_back_kernel(Buffer<float> in, Buffer<float> slot) {
  store_global(slot.data + threadIdx.x, 1.0f);
  for (int row = 0; row < 64; ++row) load_global(in.data + row * 32 + threadIdx.x);
  load_global(slot.data + threadIdx.x);
}

SIMT_CASE(traffic_of_scratch_that_has_left) {
  Memory<float> in(2048), slot(32);
  const Device small(2048);
  const auto report = traffic_of(
      [&] { launch({1, 32}, read_back_kernel, in.as(Use::kInput), slot.as(Use::kScratch)); });
  EXPECT(report.buffers[1].dram_read == 128 && report.buffers[1].dram_written == 128);
}

SIMT_CASE(traffic_is_counted_on_demand) {
  bool thrown = false;
  try {
    simt::stop_traffic();
  } catch (const std::logic_error&) {
    thrown = true;
  }
  EXPECT(thrown);
}

constexpr uint32_t kWhole = ~0u;
constexpr uint64_t kSectors = 4;  // of a line

SIMT_CASE(l2_least_recently_used_leaves) {
  simt::L2Cache cache(16 * 128);  // one set
  for (uint64_t line = 0; line < 16; ++line) cache.read(kSectors * line, kWhole, 0);
  EXPECT(cache.dram(0).read == 16 * 32);
  cache.read(0, kWhole, 0);
  EXPECT(cache.dram(0).read == 16 * 32);
  cache.read(kSectors * 16, kWhole, 0);  // line 1 leaves, not line 0
  cache.read(0, kWhole, 0);
  EXPECT(cache.dram(0).read == 17 * 32);
  cache.read(kSectors * 1, kWhole, 0);
  EXPECT(cache.dram(0).read == 18 * 32);
  cache.read(kSectors * 3, kWhole, 0);  // line 2 left for line 1
  EXPECT(cache.dram(0).read == 18 * 32);
}

SIMT_CASE(l2_sectors_come_one_by_one) {
  simt::L2Cache cache(16 * 128);
  cache.read(0, 1, 0);
  cache.read(0, kWhole, 0);
  EXPECT(cache.dram(0).read == 32);
  cache.read(1, 1, 0);
  EXPECT(cache.dram(0).read == 64);
}

SIMT_CASE(l2_writes_back) {
  simt::L2Cache cache(16 * 128);
  cache.write(0, 0xffff, 1);
  cache.write(0, 0xffff0000, 1);
  cache.write(1, 0xffff, 1);
  EXPECT(cache.dram(1).written == 0);
  for (uint64_t line = 1; line <= 16; ++line) cache.read(kSectors * line, kWhole, 0);
  EXPECT(cache.dram(1).written == 64 && cache.dram(1).read == 32);
  EXPECT(cache.dram(0).read == 16 * 32 && cache.dram(0).written == 0);
}

SIMT_CASE(l2_reads_what_was_written) {
  simt::L2Cache cache(16 * 128);
  cache.write(0, 0xff, 0);
  cache.read(0, 0x0f, 0);
  EXPECT(cache.dram(0).read == 0);
  cache.read(0, 0xf00, 0);
  EXPECT(cache.dram(0).read == 32);
  cache.flush();
  EXPECT(cache.dram(0).read == 32 && cache.dram(0).written == 32);
}

}  // namespace
}  // namespace simt_test
