#include "stream_angles.h"

#include "interface.h"

using namespace sinkexport;

SINKEXPORT_KERNEL(stream_angles, StreamAnglesParams, streamAnglesProblem, launchStreamAngles)
