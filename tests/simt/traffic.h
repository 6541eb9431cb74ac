// Recorder of warp accesses. Each warp's accesses are kept as a list in program order; when the
// launch has ended they are replayed through the L2 cache, resident blocks in turn.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine.h"
#include "simt_traffic.h"

namespace simt::detail {

// A position in the kernel's machine code: tells apart what inlining made of one source line.
using Code = const void*;

struct SectorPart {
  uint64_t sector;
  uint32_t bytes;  // a bit for each
};

// What the lanes of a warp do at one place at one time.
struct WarpAccess {
  Site site{};
  Access access = Access::kRead;
  bool atomic = false;
  uint32_t owner = 0;  // buffer
  uint32_t next = 0;   // in program order; 0 ends the list
  std::vector<SectorPart> parts;
};

// Which accesses of the lanes belong together: the same instruction, for the same time.
struct AccessKey {
  Code code;
  Code step;      // the step's place, null outside of steps
  uint64_t turn;  // of the step, or of the instruction
  uint32_t place;
  bool operator==(const AccessKey& other) const {
    return code == other.code && step == other.step && turn == other.turn && place == other.place;
  }
};
struct AccessKeyHash {
  size_t operator()(const AccessKey& key) const;
};

// How often a lane came by each place.
class Counts {
 public:
  uint64_t next(Code code);

 private:
  std::vector<std::pair<Code, uint64_t>> counts_;
};

struct LaneTrace {
  Counts instructions, steps;
  Site step_site{};
  Code step = nullptr;
  uint64_t step_turn = 0;
  uint32_t last = 0;  // access
  Code polled = nullptr;
  const void* polled_address = nullptr;
};

struct WarpTrace {
  struct Running {  // needed only while the block runs
    LaneTrace lanes[32];
    std::unordered_map<AccessKey, uint32_t, AccessKeyHash> known;
  };
  std::vector<WarpAccess> accesses{1};  // from accesses[0].next on
  std::unique_ptr<Running> running = std::make_unique<Running>();
};

class TrafficRecorder {
 public:
  explicit TrafficRecorder(size_t l2_bytes) : l2_(l2_bytes) {}

  void begin_launch(const LaunchRequest& request);
  void end_launch(size_t resident_blocks);
  void blocks_finished();  // all that were resident
  void step(const Thread& thread, Site site, Code code);
  void access(const Thread& thread, const void* address, size_t bytes, Access access, bool atomic,
              Site site, Code code);
  TrafficReport report();

 private:
  // Declared memory, numbered; addresses in the cache are offsets in it, so that counts do not
  // depend on where the host allocates.
  struct Region {
    std::string name;
    uintptr_t begin, end;
    bool current;  // named by the running launch
    bool scratch;  // holds nothing when that begins
  };

  WarpTrace& trace_of(const Thread& thread);
  uint32_t region_of(uintptr_t address, size_t bytes);
  uint64_t sector_of(uint32_t region, uintptr_t address) const;
  void replay(const WarpAccess& access);
  bool is_written(const SectorPart& part) const;

  L2Cache l2_;
  std::vector<Region> regions_;
  uint32_t last_region_ = 0;
  size_t warps_per_block_ = 0;
  std::vector<std::unique_ptr<WarpTrace>> warps_;  // [blocks, warps_per_block_]
  std::vector<size_t> running_;
  std::vector<std::string> launches_;
  // Bytes of scratch sectors that the replay of this launch has written.
  std::unordered_map<uint64_t, uint32_t> written_;
  // By kernel, site, buffer and direction.
  std::map<std::tuple<std::string, std::string, std::string, bool>, SiteTraffic> sites_;
};

}  // namespace simt::detail
