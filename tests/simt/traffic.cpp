// Groups the accesses of lanes into warp accesses, replays them, and reports.
//
// Lanes of a warp run one after another here, each through many instructions. That two of their
// accesses are one warp access on a GPU is told by the instruction and the number of times that the
// lane has executed it; within a step (see simt::on_step), where lanes skip accesses or take other
// paths, by the number of the step and the place in the lane's 16 bytes of it, which an unrolled
// loop over the elements turns into one instruction each.
#include "traffic.h"

#include <algorithm>
#include <stdexcept>

namespace simt {
namespace detail {
namespace {

// Larger than any buffer, and a multiple of a line: regions never share one.
constexpr unsigned kRegionLog2 = 40;

uint64_t spread(uint64_t hash, uint64_t value) {
  return (hash ^ value) * 0x9e3779b97f4a7c15ull ^ hash >> 29;
}

bool same_site(Site a, Site b) { return a.line == b.line && a.file == b.file; }

std::unique_ptr<TrafficRecorder> recorder;

}  // namespace

size_t AccessKeyHash::operator()(const AccessKey& key) const {
  uint64_t hash = spread(0, reinterpret_cast<uintptr_t>(key.code));
  hash = spread(hash, reinterpret_cast<uintptr_t>(key.step));
  return spread(spread(hash, key.turn), key.place);
}

uint64_t Counts::next(Code code) {
  for (auto& [known, count] : counts_) {
    if (known == code) return count++;
  }
  counts_.emplace_back(code, 1);
  return 0;
}

void TrafficRecorder::begin_launch(const LaunchRequest& request) {
  launches_.push_back(kernel_name());
  const dim3& grid = request.config->gridDim;
  warps_per_block_ = (state.threads_per_block + 31) / 32;
  warps_.clear();
  warps_.resize(static_cast<size_t>(grid.x) * grid.y * grid.z * warps_per_block_);
  written_.clear();
  for (Region& region : regions_) region.current = false;
  for (const BufferUse& use : request.buffers) {
    if (use.pointer == nullptr || use.bytes == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(use.pointer);
    const uintptr_t end = begin + use.bytes;
    const bool scratch = !use.readable && !use.must_write && !use.persistent;
    const auto same = std::find_if(regions_.begin(), regions_.end(), [&](const Region& region) {
      return region.begin == begin && region.end == end;
    });
    if (same == regions_.end()) {
      regions_.push_back({use.name, begin, end, true, scratch});
    } else {
      same->current = true;
      same->scratch = scratch;
    }
  }
}

void TrafficRecorder::blocks_finished() {
  for (const size_t index : running_) warps_[index]->running.reset();
  running_.clear();
}

WarpTrace& TrafficRecorder::trace_of(const Thread& thread) {
  const size_t index = thread.block->rank * warps_per_block_ + thread.local / 32;
  if (warps_[index] == nullptr) {
    warps_[index] = std::make_unique<WarpTrace>();
    running_.push_back(index);
  }
  return *warps_[index];
}

uint32_t TrafficRecorder::region_of(uintptr_t address, size_t bytes) {
  const auto holds = [&](const Region& region) {
    return region.current && address >= region.begin && address + bytes <= region.end;
  };
  if (last_region_ < regions_.size() && holds(regions_[last_region_])) return last_region_;
  const auto found = std::find_if(regions_.begin(), regions_.end(), holds);
  if (found == regions_.end()) {
    throw Fault(kernel_name() + ": traffic is counted for declared buffers only");
  }
  last_region_ = static_cast<uint32_t>(found - regions_.begin());
  return last_region_;
}

uint64_t TrafficRecorder::sector_of(uint32_t region, uintptr_t address) const {
  // A buffer keeps its place in a line, as far as the host's 64-byte allocations tell it.
  const uintptr_t start = regions_[region].begin / 64 * 64;
  return (static_cast<uint64_t>(region) << kRegionLog2 | (address - start)) / kSectorBytes;
}

void TrafficRecorder::step(const Thread& thread, Site site, Code code) {
  LaneTrace& lane = trace_of(thread).running->lanes[thread.lane];
  lane.step_site = site;
  lane.step = code;
  lane.step_turn = lane.steps.next(code);
}

void TrafficRecorder::access(const Thread& thread, const void* pointer, size_t bytes, Access access,
                             bool atomic, Site site, Code code) {
  WarpTrace& trace = trace_of(thread);
  LaneTrace& lane = trace.running->lanes[thread.lane];
  const bool polls = atomic && lane.polled == code && lane.polled_address == pointer;
  lane.polled = atomic ? code : nullptr;
  lane.polled_address = pointer;
  if (polls) return;  // how often depends on the order of threads
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  AccessKey key{code, nullptr, 0, static_cast<uint32_t>(bytes) << 16};
  if (lane.step != nullptr && same_site(lane.step_site, site)) {
    key.step = lane.step;
    key.turn = lane.step_turn;
    key.place |= address % 16;
  } else {
    key.turn = lane.instructions.next(code);
    if (atomic) key.place |= thread.lane + 1;  // each by itself
  }
  const auto [known, fresh] =
      trace.running->known.emplace(key, static_cast<uint32_t>(trace.accesses.size()));
  const uint32_t index = known->second;
  if (fresh) {
    const uint32_t region = region_of(address, bytes);
    trace.accesses.emplace_back();
    WarpAccess& entry = trace.accesses.back();
    entry.site = site;
    entry.access = access;
    entry.atomic = atomic;
    entry.owner = region;
    // After what this lane did before, and before what another lane has done since.
    entry.next = trace.accesses[lane.last].next;
    trace.accesses[lane.last].next = index;
  }
  lane.last = index;
  WarpAccess& entry = trace.accesses[index];
  const Region& region = regions_[entry.owner];
  const bool same_region = address >= region.begin && address + bytes <= region.end;
  const uint64_t sector = sector_of(same_region ? entry.owner : region_of(address, bytes), address);
  const auto mask = static_cast<uint32_t>(((uint64_t{1} << bytes) - 1) << address % kSectorBytes);
  for (auto part = entry.parts.rbegin(); part != entry.parts.rend(); ++part) {
    if (part->sector != sector) continue;
    part->bytes |= mask;
    return;
  }
  entry.parts.push_back({sector, mask});
}

bool TrafficRecorder::is_written(const SectorPart& part) const {
  const auto found = written_.find(part.sector);
  return found != written_.end() && (part.bytes & ~found->second) == 0;
}

void TrafficRecorder::replay(const WarpAccess& access) {
  uint64_t bytes = 0;
  for (const SectorPart& part : access.parts) {
    bytes += static_cast<uint64_t>(__builtin_popcount(part.bytes));
    const auto owner = static_cast<uint32_t>(part.sector >> (kRegionLog2 - 5));
    const bool scratch = regions_[owner].scratch;
    // The replay knows no barriers. Scratch is read after it was written, so where the write is yet
    // to come here, the reader has waited for it and finds it in the cache.
    const bool early = scratch && !is_written(part);
    if (access.access != Access::kWrite && !early) l2_.read(part.sector, part.bytes, owner);
    if (access.access != Access::kRead) {
      l2_.write(part.sector, part.bytes, owner);
      if (scratch) written_[part.sector] |= part.bytes;
    }
  }
  if (access.atomic) return;
  const bool write = access.access == Access::kWrite;
  const std::string& buffer = regions_[access.owner].name;
  SiteTraffic& site = sites_[{launches_.back(), place(access.site), buffer, write}];
  ++site.accesses;
  site.sectors += access.parts.size();
  site.fewest += (bytes + kSectorBytes - 1) / kSectorBytes;
}

void TrafficRecorder::end_launch(size_t resident_blocks) {
  struct Slot {
    size_t block;
    std::vector<uint32_t> next;  // of each warp
  };
  const size_t blocks = warps_.size() / warps_per_block_;
  size_t started = 0;
  std::vector<Slot> slots;
  const auto refill = [&](Slot* slot) {
    for (; started < blocks; ++started) {
      bool any = false;
      slot->next.assign(warps_per_block_, 0);
      for (size_t w = 0; w < warps_per_block_; ++w) {
        const auto& trace = warps_[started * warps_per_block_ + w];
        if (trace != nullptr) slot->next[w] = trace->accesses[0].next;
        any |= slot->next[w] != 0;
      }
      slot->block = started;
      if (any) return ++started, true;
    }
    return false;
  };
  for (Slot slot; slots.size() < resident_blocks && refill(&slot);) slots.push_back(slot);
  while (!slots.empty()) {
    for (size_t s = 0; s < slots.size();) {
      bool any = false;
      for (size_t w = 0; w < warps_per_block_; ++w) {
        uint32_t& next = slots[s].next[w];
        if (next == 0) continue;
        const auto& trace = warps_[slots[s].block * warps_per_block_ + w];
        replay(trace->accesses[next]);
        next = trace->accesses[next].next;
        any |= next != 0;
      }
      if (any || refill(&slots[s])) {
        ++s;
      } else {
        slots.erase(slots.begin() + static_cast<std::ptrdiff_t>(s));
      }
    }
  }
  warps_.clear();
}

TrafficReport TrafficRecorder::report() {
  l2_.flush();
  TrafficReport report;
  report.launches = launches_;
  for (uint32_t i = 0; i < regions_.size(); ++i) {
    const Region& region = regions_[i];
    const L2Cache::Dram dram = l2_.dram(i);
    report.buffers.push_back({region.name, region.end - region.begin, dram.read, dram.written});
  }
  for (auto& [key, site] : sites_) {
    std::tie(site.kernel, site.site, site.buffer, site.write) = key;
    report.sites.push_back(site);
  }
  return report;
}

}  // namespace detail

void start_traffic() {
  using namespace detail;
  recorder = std::make_unique<TrafficRecorder>(static_cast<size_t>(device().l2_bytes));
  state.traffic = recorder.get();
}

TrafficReport stop_traffic() {
  using namespace detail;
  if (state.traffic == nullptr) throw std::logic_error("stop_traffic without start_traffic");
  state.traffic = nullptr;
  TrafficReport report = recorder->report();
  recorder.reset();
  return report;
}

void on_step(Site site) {
  using namespace detail;
  if (state.traffic == nullptr || state.current == nullptr) return;
  state.traffic->step(*state.current, site, __builtin_return_address(0));
}

}  // namespace simt
