#include "sink_attention.h"

#include "interface.h"

using namespace sinkexport;

SINKEXPORT_KERNEL_WITH_WORKSPACE(sink_attention, SinkAttentionParams, sinkAttentionProblem, sinkAttentionWorkspaceBytes,
                                 launchSinkAttention)
