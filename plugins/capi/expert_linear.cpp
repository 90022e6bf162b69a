#include "expert_linear.h"

#include "interface.h"

using namespace sinkexport;

SINKEXPORT_KERNEL(expert_linear, ExpertLinearParams, expertLinearProblem, launchExpertLinear)
