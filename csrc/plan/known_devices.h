// The devices of a process as the planner sees them: as they answered when asked, less what they
// refused since.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <mutex>

#include "plan.h"

namespace batchnorm_cuda {

// For any thread at any time. References stay valid: other threads may be planning by one.
class KnownDevices {
 public:
  // The properties that query(&info) fills in, when `device` is asked for the first time.
  template <typename Query>
  const DeviceInfo& get(int64_t device, Query&& query) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::list<DeviceInfo>& states = states_[device];
    if (states.empty()) {
      DeviceInfo info;
      query(&info);
      states.push_back(info);
    }
    return states.back();
  }

  // From now on the device is one that has no launches for teams of this scope.
  void refuse(int64_t device, Scope scope) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::list<DeviceInfo>& states = states_[device];
    if (states.empty()) return;  // not asked yet
    DeviceInfo info = states.back();
    if (scope == Scope::kGrid) info.cooperative = false;
    if (scope == Scope::kCluster) info.max_cluster = 0;
    states.push_back(info);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::list<DeviceInfo>> states_;
};

}  // namespace batchnorm_cuda
