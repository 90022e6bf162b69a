// Attention over a cache of S sinks and a ring of the W most recent tokens (StreamingLLM, arXiv:2309.17453).
//
// Exactly what feeding tokens one by one defines; tests/reference/oracle.py is the definition in float64. Keys are
// stored rotated at their stream position and are never rotated again: for the sinks, whose distance to the query stops
// growing at position C - 1 (C = S + W), the *query* is turned back by max(0, t - (C - 1)) tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace sinkexport {

// All pointers are device pointers, dense and row-major, 16-byte aligned. "half" is the type that `dtype` says.
struct SinkAttentionParams {
  // --- shapes ---
  int batch = 0;         // B, 1 .. 64
  int num_tokens = 1;    // T: 1 for a step, up to chunk_size for prefill; at most W
  int num_q_heads = 0;   // Hq, a multiple of Hkv
  int num_kv_heads = 0;  // Hkv
  int head_dim = 0;      // D: 64, 80, 96, 128 or 256
  int num_sinks = 0;     // S >= 0
  int window_size = 0;   // W >= 1; S + W <= 65536
  DType dtype = DType::kFloat16;
  bool int8_window = false;
  // Whether a step may read states, position and frequency before the kernels ahead of it have ended: none of those
  // that can still run then writes them. True wherever an attention of other states, or anything but a kernel, comes
  // after what wrote them.
  bool settled_states = false;

  // --- the tokens of this run ---
  const void* q = nullptr;  // half [B, Hq, T, D]
  const void* k = nullptr;  // half [B, Hkv, T, D]
  const void* v = nullptr;  // half [B, Hkv, T, D]
  // For a step: rows of D from one stream's q to the next one's, and of k and v likewise. In the output of a matmul
  // that makes all three it is Hq + 2 Hkv. 0: dense, as above.
  int stream_rows = 0;
  // Stream position t of the first of the T tokens, as t >> 16 and t & 0xffff, so that TensorRT versions without
  // int64 reach t < 2^47 as well.
  const int32_t* position = nullptr;   // [B, 2]
  const int32_t* num_valid = nullptr;  // [B], 0 .. T: tokens past it change no state; null: T

  // --- states, written in place: token t goes to sink slot t if t < S, else to window slot (t - S) mod W ---
  void* sink_k = nullptr;          // half [B, Hkv, S, D]; null if S = 0
  void* sink_v = nullptr;          // half [B, Hkv, S, D]
  void* window_k = nullptr;        // half or int8 [B, Hkv, W, D]
  void* window_v = nullptr;        // half or int8 [B, Hkv, W, D]
  void* window_k_scale = nullptr;  // float16 [B, Hkv, W], int8 windows only
  void* window_v_scale = nullptr;  // float16 [B, Hkv, W]

  // --- positions ---
  // Either q and k are rotated already and shift_cos, shift_sin turn queries back for the sinks (null: no positions or
  // no sinks) ...
  const float* shift_cos = nullptr;  // [B, T, R/2], of max(0, t - (C - 1)) tokens
  const float* shift_sin = nullptr;
  // ... or, if frequency is given, q and k come unrotated and everything is computed here from the exact phase
  // (t * f mod 2^32) * 2 pi / 2^32.
  const uint32_t* frequency = nullptr;  // [R/2], turns a token in units of 2^-32
  float rope_scaling = 1.0f;            // factor on cos and sin of q and k (YaRN's attention factor), not of the shift
  int rotary_dim = 0;                   // R <= D leading dimensions turn
  bool interleaved = false;             // pairs (2i, 2i+1); otherwise (i, i + R/2)

  // --- logits and weights ---
  float scale = 0.0f;                   // factor on q . k, > 0
  float softcap = 0.0f;                 // logits become softcap * tanh(logits / softcap); 0: none
  const float* alibi_slopes = nullptr;  // [Hq]: logits get slope * (in-cache position of key - of query); after softcap
  const float* sink_logit = nullptr;    // [Hq]: one more logit of the softmax that has no value (gpt-oss)
  const float* sink_scale = nullptr;  // [Hq] >= 0: factor on the softmax weight of token 0, before normalising; S >= 1
  const void* gate = nullptr;         // half [B, Hq, T, gate_dim]: the output is multiplied by its sigmoid
  int gate_dim = 0;                   // 1 (head-wise) or D

  void* out = nullptr;  // half [B, Hq, T, D]
};

// Bytes of device scratch that a launch needs: depends on shapes and on nothing that is read on the device. 0 is
// possible.
size_t sinkAttentionWorkspaceBytes(const SinkAttentionParams& params);

// Checks the struct on the host. nullptr if it can be launched, else one line that says what is wrong and what is
// expected.
const char* sinkAttentionProblem(const SinkAttentionParams& params);

// Runs T tokens: attends, writes the states, writes `out`. Asynchronous on `stream`, capturable in a CUDA graph
// (nothing about the launch depends on device data), allocates nothing. cudaErrorInvalidValue if sinkAttentionProblem
// says so.
cudaError_t launchSinkAttention(const SinkAttentionParams& params, void* workspace, cudaStream_t stream);

}  // namespace sinkexport
