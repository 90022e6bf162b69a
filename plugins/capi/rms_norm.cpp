#include "rms_norm.h"

#include "interface.h"

using namespace sinkexport;

SINKEXPORT_KERNEL(rms_norm, RmsNormParams, rmsNormProblem, launchRmsNorm)
