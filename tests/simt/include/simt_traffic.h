// Counts the memory traffic of launches: 32-byte sectors of each warp access against the fewest
// possible, and DRAM bytes behind a model of the L2 cache. Off until start_traffic(); README.md
// says what is modelled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

constexpr uint32_t kSectorBytes = 32;
constexpr uint32_t kLineBytes = 128;

// A sectored write-back cache: lines of four sectors, the least recently used line of a set leaves.
// A sector comes from memory when bytes of it are read that are not there; a write brings nothing.
// A sector that leaves with bytes missing between written ones is first completed from memory.
class L2Cache {
 public:
  // Bytes moved between the cache and memory.
  struct Dram {
    uint64_t read = 0, written = 0;
  };

  explicit L2Cache(size_t bytes, size_t ways = 16);

  // `bytes`: one bit for each byte of the sector. `owner` is charged for what the sector costs.
  void read(uint64_t sector, uint32_t bytes, uint32_t owner);
  void write(uint64_t sector, uint32_t bytes, uint32_t owner);
  void flush();  // writes all back and empties the cache

  Dram dram(uint32_t owner) const { return owner < dram_.size() ? dram_[owner] : Dram(); }

 private:
  struct Sector {
    uint32_t present = 0, dirty = 0;  // bytes
  };
  struct Line {
    uint64_t number = 0;
    uint64_t used = 0;  // time of the last access; 0: the line is empty
    uint32_t owner = 0;
    Sector sectors[kLineBytes / kSectorBytes];
  };
  Sector& find(uint64_t sector, uint32_t owner);
  void evict(Line* line);

  size_t ways_, sets_;
  uint64_t time_ = 0;
  std::vector<Line> lines_;  // [sets, ways]
  std::vector<Dram> dram_;
};

// A range of global memory that launches declared, and what it cost.
struct BufferTraffic {
  std::string name;  // in the first launch that declared it
  uint64_t bytes;
  uint64_t dram_read, dram_written;
};

// The warp accesses of one source line to buffers of one name.
struct SiteTraffic {
  std::string kernel, site, buffer;
  bool write;
  uint64_t accesses;
  uint64_t sectors;  // touched
  uint64_t fewest;   // that the same bytes could lie in
};

struct TrafficReport {
  std::vector<std::string> launches;  // the kernels' names
  std::vector<BufferTraffic> buffers;
  std::vector<SiteTraffic> sites;
};

// Records all launches from now on, behind a cold L2 cache of the described device. To be called
// while no launch runs, like stop_traffic().
void start_traffic();
// Writes the cache back and reports; throws std::logic_error where nothing was started.
TrafficReport stop_traffic();

}  // namespace simt
