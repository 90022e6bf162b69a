// Matmuls of many tokens by a matrix on GPUs of compute capability 9.0 (linear_wide.cu); linear.cu says when.
#pragma once

#include "device.h"
#include "linear.h"

namespace sinkexport {
namespace linear {

// Whether they take these parameters, which must be valid and without a norm, where the code for them is there.
bool takesWide(const LinearParams& p);
// Workspace where they are taken; by shapes alone.
size_t wideWorkspaceBytes(const LinearParams& p);
// launched: whether the device and what was compiled have them; if not, nothing was done.
cudaError_t launchWide(const LinearParams& p, void* workspace, const Device& device, cudaStream_t stream,
                       bool& launched);

}  // namespace linear
}  // namespace sinkexport
