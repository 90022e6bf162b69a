#include "gated_activation.h"

#include "interface.h"

using namespace sinkexport;

SINKEXPORT_KERNEL(gated_activation, GatedActivationParams, gatedActivationProblem, launchGatedActivation)
