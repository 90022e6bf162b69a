// Attention over a cache of S sinks and a ring of the W most recent tokens (StreamingLLM, arXiv:2309.17453), for steps
// and chunks.
//
// Exactly what feeding tokens one by one defines; tests/reference/oracle.py is the definition in float64. Keys are
// stored rotated at their stream position and are never rotated again: for the sinks, whose distance to the query stops
// growing at position C - 1 (C = S + W), the *query* is turned back by max(0, t - (C - 1)) tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace sinkexport::cpu {

class Reads;

// float16 and int8 rows are rounded once, when they are written, and take part as what was stored, in their own step
// too. int8: entry = round(x / scale) to nearest even within -127 .. 127, scale = float16(max |x| / 127) of a row.
enum class WindowType : int { kFloat32 = 0, kFloat16 = 1, kInt8 = 2 };

// Pointers are row-major and aligned as their types are. Sinks and all other numbers are float32.
struct SinkAttentionParams {
  // --- shapes ---
  int batch = 0;         // B
  int num_tokens = 1;    // T: 1 for a step, up to chunk_size for prefill; at most W
  int num_q_heads = 0;   // Hq, a multiple of Hkv
  int num_kv_heads = 0;  // Hkv
  int head_dim = 0;      // D of queries and keys, a multiple of 8 up to 1024
  int value_dim = 0;     // Dv of values and the output, likewise
  int num_sinks = 0;     // S >= 0
  int window_size = 0;   // W >= 1
  WindowType window_type = WindowType::kFloat32;
  bool bfloat16_chunks = false;  // T > 1: the matmuls' operands may be rounded to bfloat16 where that is faster
  // Another run writes these tokens to the states, which this one only reads. T = 1: it has written them (k and v are
  // not read). T > 1: it has not, k and v take part.
  bool reads_only = false;

  // --- the tokens of this run ---
  // Heads first: q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv]. Tokens first: q [B, T, Hq, D] and so on; then
  // row_width is the number of elements from one token to the next in each of them, for q, k and v in one array
  // (0: dense).
  bool tokens_first = false;
  int row_width = 0;
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  const int64_t* position = nullptr;   // [B], stream position of the first of the T tokens, 0 .. 2^62
  const int64_t* num_valid = nullptr;  // [B], 0 .. T: tokens past it change no state, their outputs are 0; null: T

  // --- states, written in place: token t goes to sink slot t if t < S, else to window slot (t - S) mod W ---
  float* sink_k = nullptr;             // [B, Hkv, S, D]; null if S = 0
  float* sink_v = nullptr;             // [B, Hkv, S, Dv]
  void* window_k = nullptr;            // [B, Hkv, W, D] of window_type
  void* window_v = nullptr;            // [B, Hkv, W, Dv]
  uint16_t* window_k_scale = nullptr;  // float16 [B, Hkv, W], int8 windows only
  uint16_t* window_v_scale = nullptr;  // float16 [B, Hkv, W]

  // --- with reads_only and T > 1: rows of the tokens that count, as another run would write them; null: not wanted ---
  void* new_k = nullptr;            // [B, Hkv, T, D] of window_type; of tokens below S only where that is float32
  void* new_v = nullptr;            // [B, Hkv, T, Dv]
  uint16_t* new_k_scale = nullptr;  // float16 [B, Hkv, T], int8 windows only
  uint16_t* new_v_scale = nullptr;
  float* new_sink_k = nullptr;  // [B, Hkv, T, D] of tokens below S, where window_type is not float32 and S > 0
  float* new_sink_v = nullptr;  // [B, Hkv, T, Dv]

  // --- norms of queries and keys, before they turn, and of values: x / sqrt(mean(x^2) + epsilon) * weight ---
  const float* q_norm_weight = nullptr;  // [D], one for all query heads; of whole rows [Hq * D]; null: no norms
  const float* k_norm_weight = nullptr;  // [D] or [Hkv * D], there if the other is and keys are read
  bool qk_norm_of_rows = false;          // the mean is that of all heads of a token
  float qk_norm_epsilon = 0.0f;
  const float* v_norm_weight = nullptr;  // [Dv], one for all heads; null: values are taken as they come
  float v_norm_epsilon = 0.0f;
  // [D]: queries turn to their place in the cache, are multiplied by these, and turn on to the stream's position for
  // the window (weights of norms that follow the rotation, those of keys too, which are stored without); null: none
  const float* q_turned_weight = nullptr;
  const float* k_turned_weight = nullptr;  // only with the other

  // --- positions ---
  // q and k come unrotated and turn here by exact phase, (t * f mod 2^32) * 2 pi / 2^32; rotary_dim 0: no positions ...
  const int64_t* frequency = nullptr;  // [R/2], 0 .. 2^32 - 1, turns a token in units of 2^-32
  // ... or they are rotated already, and queries are turned back for the sinks by these (null: no positions)
  const float* shift_cos = nullptr;  // [B, T, R/2], of max(0, t - (C - 1)) tokens
  const float* shift_sin = nullptr;
  float rope_scaling = 1.0f;  // factor on cos and sin of q and k (YaRN's attention factor), not of the shift
  int rotary_dim = 0;         // R <= D leading dimensions turn
  bool interleaved = false;   // pairs (2i, 2i+1); otherwise (i, i + R/2)

  // --- logits and weights ---
  float scale = 0.0f;                   // factor on q . k, > 0
  float softcap = 0.0f;                 // logits become softcap * tanh(logits / softcap); 0: none
  const float* alibi_slopes = nullptr;  // [Hq]: logits get slope * (in-cache position of key - of query); after softcap
  const float* sink_logit = nullptr;    // [Hq]: one more logit of the softmax that has no value (gpt-oss)
  const float* sink_scale = nullptr;  // [Hq] >= 0: factor on the softmax weight of token 0, before normalising; S >= 1
  const float* gate = nullptr;  // laid out as q, [B, Hq, T, gate_dim], dense: the output is multiplied by its sigmoid
  int gate_dim = 0;             // 1 (head-wise) or Dv

  bool out_tokens_first = false;
  float* out = nullptr;  // [B, Hq, T, Dv], or tokens first [B, T, Hq, Dv]
};

// Null if it can be run, else one line that says what is wrong and what is expected. With `shapes_only` pointers are
// not looked at: for a check before any memory exists.
const char* sinkAttentionProblem(const SinkAttentionParams& params, bool shapes_only = false);

// The kernels of one instruction set; look them up once. A run attends, writes the states, writes `out`. Nothing is
// allocated but in `scratch`, once for given shapes and threads. The same threads give the same bits.
using SinkAttentionFunction = void (*)(const SinkAttentionParams& params, const Parallel& parallel, Scratch& scratch);
SinkAttentionFunction sinkAttentionFor(Isa isa);

// What each of `threads` workers of a step reads of the window that it begins with.
void sinkAttentionReads(const SinkAttentionParams& params, int threads, Reads& reads);

}  // namespace sinkexport::cpu
