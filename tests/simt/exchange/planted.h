// Included ahead of the kernels in which kernels/test_exchange_faults.py has planted faults: which
// of them is switched on, and what a fault may put in the place of a right access.
#pragma once

#include "simt.h"

namespace simt_exchange {

extern int planted;  // number of the fault, or -1

// Atomic, but without an order: what is left of a release store or acquire load when it is
// weakened.
template <typename T>
void store_relaxed(T* address, T value, simt::Site site = simt::Site::current()) {
  simt::on_atomic_access(address, sizeof(T), simt::Access::kWrite, simt::Order::kRelaxed, site);
  *address = value;
}

template <typename T>
T load_relaxed(T* address, simt::Site site = simt::Site::current()) {
  simt::on_atomic_access(address, sizeof(T), simt::Access::kRead, simt::Order::kRelaxed, site);
  return *address;
}

}  // namespace simt_exchange
