// Stand-in for the CUDA runtime's header: the part of its surface that the kernels and launchers
// use, executed by the engine behind simt.h.
#pragma once

#include "simt.h"
#include "simt/device_functions.h"
#include "simt/runtime_api.h"
#include "simt/vector_types.h"
