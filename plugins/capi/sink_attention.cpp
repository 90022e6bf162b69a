// C interface of sink attention and stream angles, to call through ctypes. The structs are the kernels' own; their
// sizes are there to check a caller's copy of them against.
#include "sink_attention.h"
#include "stream_angles.h"

#define SINKEXPORT_C_API extern "C" __attribute__((visibility("default")))

using sinkexport::SinkAttentionParams;
using sinkexport::StreamAnglesParams;

SINKEXPORT_C_API size_t sinkexport_sink_attention_params_bytes() {
  return sizeof(SinkAttentionParams);
}

SINKEXPORT_C_API size_t sinkexport_stream_angles_params_bytes() {
  return sizeof(StreamAnglesParams);
}

// null, or one line that lives until this thread asks again.
SINKEXPORT_C_API const char* sinkexport_sink_attention_problem(const SinkAttentionParams* params) {
  return sinkexport::sinkAttentionProblem(*params);
}

SINKEXPORT_C_API size_t sinkexport_sink_attention_workspace_bytes(const SinkAttentionParams* params) {
  return sinkexport::sinkAttentionWorkspaceBytes(*params);
}

// Returns a cudaError_t; 0 is success. stream: a cudaStream_t, null for the default stream.
SINKEXPORT_C_API int sinkexport_sink_attention_launch(const SinkAttentionParams* params, void* workspace,
                                                      void* stream) {
  return static_cast<int>(sinkexport::launchSinkAttention(*params, workspace, static_cast<cudaStream_t>(stream)));
}

SINKEXPORT_C_API int sinkexport_stream_angles_launch(const StreamAnglesParams* params, void* stream) {
  return static_cast<int>(sinkexport::launchStreamAngles(*params, static_cast<cudaStream_t>(stream)));
}
