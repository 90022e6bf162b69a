// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).
// Versions, names and limits.
#pragma once

#include <cstdint>

namespace sinkrt {

constexpr int64_t kSchemaVersion = 7;
// Version that brought `attention`.
constexpr int64_t kAttentionSchema = 7;
// Key of a graph's metadata: the sizes that it was made for, where a manifest has `attention`.
constexpr const char* kLayoutMetadata = "sinkexport.layout";
constexpr const char* kManifestName = "manifest.json";
// ABI of the TensorRT plugins that the graphs of this version have nodes of.
constexpr const char* kPluginAbi = "5";
// Target of bundles for TensorRT.
constexpr const char* kTensorrtTarget = "tensorrt";
// Target of bundles for the CPU library, ABI of its operators, its file, the environment variable with the path of
// another one, and the entry of a session's configuration by which it is given the number of threads.
constexpr const char* kVerifyRole = "verify";
constexpr const char* kCpuTarget = "cpu";
constexpr const char* kCpuAbi = "4";
constexpr const char* kCpuLibrary = "libsinkexport_cpu.so";
constexpr const char* kCpuLibraryVariable = "SINKEXPORT_CPU_LIBRARY";
constexpr const char* kThreadsOption = "sinkexport.threads";
// Domain of the operators of the TensorRT plugins and the CPU library.
constexpr const char* kOperatorDomain = "ai.sinkexport";
// Where 'sinkexport build' and sinkrt_build put engines and the plugin, and sessions look for them.
constexpr const char* kEngineFolder = "engines";
constexpr const char* kPluginFile = "engines/libsinkexport_plugin.so";
// Format and version of the files that saveState writes.
constexpr const char* kStateFormat = "sinkrt-state";
constexpr const char* kStateVersion = "2";
// Id of a stream that stands still while others step, where there are recurrent states: these know no positions.
constexpr int64_t kNoToken = -1;
// First stream position that 47 bits do not hold: positions travel as t >> 16 and t & 0xffff, two int32.
constexpr int64_t kPositionLimit = int64_t{1} << 47;
// Axes of a tensor.
constexpr int64_t kMaxRank = 8;
constexpr int64_t kMaxTensorBytes = int64_t{1} << 46;

}  // namespace sinkrt
