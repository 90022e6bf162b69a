#include "linear.h"

#include "interface.h"

using namespace sinkexport;

SINKEXPORT_KERNEL_WITH_WORKSPACE(linear, LinearParams, linearProblem, linearWorkspaceBytes, launchLinear)
