/* The C interface of the runtime. Every function returns a status and throws nothing; `sinkrt_last_error` has the
 * reason of the calling thread's last failure in one line. A session may be used by one thread at a time. */
#ifndef SINKRT_SINKRT_H_
#define SINKRT_SINKRT_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SINKRT_API __attribute__((visibility("default")))
#else
#define SINKRT_API
#endif

typedef enum sinkrt_status {
  SINKRT_OK = 0,
  SINKRT_USAGE = 1,         /* bad input: an argument, an id, a shape */
  SINKRT_BUNDLE = 2,        /* a bundle that is missing, corrupt, newer than this runtime or inconsistent */
  SINKRT_STATE = 3,         /* a saved state that is truncated, of another model or of another version */
  SINKRT_BACKEND = 4,       /* a backend that is not there or cannot run the bundle */
  SINKRT_OUT_OF_MEMORY = 5, /* the host or the device has too little */
  SINKRT_INTERNAL = 6       /* a fault of this library */
} sinkrt_status;

typedef struct sinkrt_session sinkrt_session;

/* Zero is the default of every field. */
typedef struct sinkrt_options {
  const char* backend;             /* "ort" (default) | "tensorrt" */
  int threads;                     /* CPU threads of one operator; 0: all physical cores */
  int skip_hashes;                 /* 1: compare the sizes of the bundle's files only, not their SHA-256 */
  int device;                      /* CUDA device */
  const char* onnxruntime_library; /* path of libonnxruntime.so; NULL: $SINKRT_ONNXRUNTIME, then the loader's path */
  const char* plugin_library; /* path of libsinkexport_plugin.so or libsinkexport_cpu.so, which some bundles need */
} sinkrt_options;

/* Zero is the default of every field: greedy, until the model ends its text. */
typedef struct sinkrt_sampling {
  /* generated: sampling options */
  double temperature;        /* 0: greedy */
  int64_t top_k;             /* 0: all tokens */
  double top_p;              /* 0 or 1: all tokens */
  double repetition_penalty; /* 0 or 1: none */
  uint64_t seed;             /* the same seed and stream draw the same tokens */
  /* end of what is generated */
  int64_t max_tokens;     /* 0: no limit */
  int ignore_eos;         /* 1: go on when the model ends its text */
  int64_t tokens_at_once; /* 0 or 1: one; more: decoded without coming back in between, on backends that can; all
                             of them are in the stream, also if the callback stops earlier */
} sinkrt_sampling;

/* What a session is made of, constant for its life. */
typedef struct sinkrt_facts {
  int64_t batch;           /* B, streams decoded together */
  int64_t vocab_size;      /* logits of each */
  int64_t num_sink_tokens; /* S */
  int64_t window_size;     /* W */
  int64_t chunk_size;      /* T, tokens of one run of the prefill graph; 1: there is none */
  int64_t state_bytes;     /* of all states together */
} sinkrt_facts;

/* One token of an answer. text: the UTF-8 that it completes, size bytes, often none, not ended by 0; NULL in answers to
 * ids. At the end of a text, what is left of an incomplete character comes with the id -1. Return 0 to stop. */
typedef int (*sinkrt_token_callback)(void* context, int64_t id, const char* text, size_t size);

/* Reason of the calling thread's last failure, one line; "" if there was none. Valid until the thread's next call. */
SINKRT_API const char* sinkrt_last_error(void);
SINKRT_API const char* sinkrt_version(void);

/* options may be NULL. On failure *session is NULL. */
SINKRT_API sinkrt_status sinkrt_load(const char* bundle, const sinkrt_options* options, sinkrt_session** session);
/* NULL is fine. */
SINKRT_API void sinkrt_free(sinkrt_session* session);

SINKRT_API sinkrt_status sinkrt_get_facts(const sinkrt_session* session, sinkrt_facts* facts);
/* Tokens that a stream has taken. */
SINKRT_API sinkrt_status sinkrt_position(const sinkrt_session* session, int64_t stream, int64_t* position);
/* float32 [B, vocab_size]; valid until the session's next call. */
SINKRT_API sinkrt_status sinkrt_logits(sinkrt_session* session, const float** logits);

/* Feed ids [count] to one stream: any number, far past the window too. */
SINKRT_API sinkrt_status sinkrt_prefill(sinkrt_session* session, int64_t stream, const int64_t* ids, int64_t count);
/* Feed one token to each stream: ids [B]. */
SINKRT_API sinkrt_status sinkrt_step(sinkrt_session* session, const int64_t* ids);
/* Feed text or ids (NULL: go on) and hand over the answer token by token. Batch 1. sampling may be NULL. */
SINKRT_API sinkrt_status sinkrt_generate(sinkrt_session* session, const char* prompt, const sinkrt_sampling* sampling,
                                         sinkrt_token_callback callback, void* context);
SINKRT_API sinkrt_status sinkrt_generate_ids(sinkrt_session* session, const int64_t* ids, int64_t count,
                                             const sinkrt_sampling* sampling, sinkrt_token_callback callback,
                                             void* context);

/* All streams start again at position 0. */
SINKRT_API sinkrt_status sinkrt_reset(sinkrt_session* session);
SINKRT_API sinkrt_status sinkrt_save_state(sinkrt_session* session, const char* path);
/* A failed load changes nothing. */
SINKRT_API sinkrt_status sinkrt_load_state(sinkrt_session* session, const char* path);

#ifdef __cplusplus
}
#endif

#endif /* SINKRT_SINKRT_H_ */
