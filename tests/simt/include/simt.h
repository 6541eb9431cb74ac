// The host model of CUDA's execution: what csrc/kernels/platform.cuh and the stand-in CUDA headers
// call.
//
// Every CUDA thread is a fiber of the launching OS thread. A kernel reports each access to global
// and shared memory here; the engine checks it against the buffers that the launch declared, the
// block's shared memory and the other threads' accesses, and throws a Fault out of the launch at
// the first thing a GPU would leave undefined. README.md says what is and what is not modelled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace simt {

// Source position of an access or a barrier, filled in by a default argument at the call.
struct Site {
  const char* file;
  int line;
  static Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What went wrong in a kernel: kernel, block, thread, source line and the rule that was broken.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// kUpdate is an atomic read-modify-write; plain accesses are kRead or kWrite.
enum class Access { kRead, kWrite, kUpdate };

// Ordering of an atomic access, as in the CUDA memory model. CUDA's atomicAdd and a volatile or
// relaxed access are kRelaxed: they order nothing without a __threadfence().
enum class Order { kRelaxed, kAcquire, kRelease, kAcquireRelease };

// To be called before an access by a kernel. `bytes` is a power of two up to 16, and the address a
// multiple of it. Outside a launch, global accesses are ignored and shared ones are a Fault.
void on_global_access(const void* address, size_t bytes, Access access, Site site);
void on_shared_access(const void* address, size_t bytes, Access access, Site site);

// The same for an access to global memory that is atomic: it races with plain accesses only. Lets
// other threads run first, so that a loop which polls through it needs no yield().
void on_atomic_access(const void* address, size_t bytes, Access access, Order order, Site site);

// Says that the lanes of a warp come here together, each the same number of times, although not all
// may then access memory: accesses with this site belong to the step until the next. Needed by the
// counting of traffic alone (simt_traffic.h).
void on_step(Site site);

// The running block's shared object named by `key`, made poisoned at the block's first call.
void* static_shared(const void* key, size_t bytes, size_t align);
// The running block's dynamic shared memory (16-byte aligned); its end if the launch gave it none.
void* dynamic_shared();

// Lets every other thread that can run do so. A loop that waits for another thread must call this
// or poll through on_atomic_access; waiting for ever is then found and reported as a deadlock.
void yield(Site site = Site::current());

// The GPU that the engine pretends to be. The default is small, so that tests meet its limits.
struct DeviceDescription {
  const char* name = "simt host model";
  int compute_major = 9;
  int compute_minor = 0;
  int sm_count = 4;
  int max_threads_per_block = 1024;
  int max_threads_per_sm = 2048;
  int max_blocks_per_sm = 32;
  int registers_per_sm = 65536;
  int registers_per_thread = 32;  // what every kernel is taken to need
  int shared_per_block = 48 * 1024;
  int shared_per_block_optin = 100 * 1024;
  int shared_per_sm = 128 * 1024;
  int shared_reserved_per_block = 1024;
  int l2_bytes = 4 * 1024 * 1024;
  int max_cluster_size = 16;  // above 8 only for kernels that allow a non-portable size
  // Clusters resident at once with one block on an SM; 0: as many as there are SMs for.
  int clusters_of_2 = 0, clusters_of_4 = 0, clusters_of_8 = 0;
  int ptx_version = 0;  // that kernels were compiled for, such as 80; 0: this device's
  bool cooperative_launch = true;
  bool cluster_launch = true;
};

void set_device(const DeviceDescription& device);
const DeviceDescription& device();
// Another one after each set_device, never 0.
int64_t description_number();

// Seed of the order in which blocks and threads run. The environment variable
// BATCHNORM_CUDA_EMULATE_SEED, read at each launch, overrides it.
void set_seed(uint64_t seed);

// From now on cooperative and cluster launches that the device has room for fail with these errors
// (0: none), as on a device that others share. Returns how many have since the last call.
int refuse_launches(int cooperative_error, int cluster_error);

// From now on launches are checked but not run, and leave their outputs as they are: what a call
// takes is then the host code's time alone, as where kernels run asynchronously.
void skip_launches(bool skip);

}  // namespace simt
