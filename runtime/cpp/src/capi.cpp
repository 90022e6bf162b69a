#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "capi_sampling.h"
#include "sinkrt/session.h"
#include "sinkrt/sinkrt.h"

struct sinkrt_session {
  std::unique_ptr<sinkrt::Session> session;
};

namespace {

using sinkrt::Code;

// A plain array, so that even "out of memory" can be reported without memory.
thread_local char last_error[1024] = "";

sinkrt_status failed(Code code, const char* message) noexcept {
  size_t i = 0;
  for (; message[i] != '\0' && i + 1 < sizeof last_error; ++i) last_error[i] = message[i] == '\n' ? ' ' : message[i];
  last_error[i] = '\0';
  return static_cast<sinkrt_status>(code);
}

// Runs `body`, and turns what it throws into a status.
template <typename Body>
sinkrt_status guarded(Body body) noexcept {
  last_error[0] = '\0';
  try {
    body();
    return SINKRT_OK;
  } catch (const sinkrt::Error& error) {
    return failed(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return failed(Code::kOutOfMemory, "memory: received too little, expected room for this call; use a smaller model");
  } catch (const std::length_error&) {
    return failed(Code::kOutOfMemory, "memory: received a size that no memory has, expected less; use a smaller model");
  } catch (const std::exception& error) {
    return failed(Code::kInternal, error.what());
  } catch (...) {
    return failed(Code::kInternal, "an unknown exception");
  }
}

void need(const void* pointer, const char* what) {
  if (pointer == nullptr) throw sinkrt::Error(Code::kUsage, sinkrt::problem(what, "NULL", "a pointer", "pass one"));
}

sinkrt::Session& opened(const sinkrt_session* session) {
  need(session, "session");
  return *session->session;
}

sinkrt::GenerateParams generateParams(const sinkrt_sampling* given) {
  sinkrt::GenerateParams out;
  if (given == nullptr) return out;
  out.sampling = sinkrt::samplingParams(*given);
  out.max_tokens = given->max_tokens;
  out.ignore_eos = given->ignore_eos != 0;
  out.tokens_at_once = given->tokens_at_once == 0 ? 1 : given->tokens_at_once;
  return out;
}

}  // namespace

extern "C" {

const char* sinkrt_last_error(void) {
  return last_error;
}

const char* sinkrt_version(void) {
  return SINKRT_VERSION;
}

sinkrt_status sinkrt_load(const char* bundle, const sinkrt_options* options, sinkrt_session** session) {
  return guarded([&] {
    need(session, "session");
    *session = nullptr;
    need(bundle, "bundle");
    sinkrt::LoadOptions load;
    if (options != nullptr) {
      if (options->backend != nullptr) load.backend = options->backend;
      if (options->onnxruntime_library != nullptr) load.onnxruntime_library = options->onnxruntime_library;
      if (options->plugin_library != nullptr) load.plugin_library = options->plugin_library;
      load.threads = options->threads;
      load.device = options->device;
      load.verify = options->skip_hashes == 0;
    }
    *session = new sinkrt_session{sinkrt::Session::load(bundle, load)};
  });
}

void sinkrt_free(sinkrt_session* session) {
  delete session;
}

sinkrt_status sinkrt_get_facts(const sinkrt_session* session, sinkrt_facts* facts) {
  return guarded([&] {
    need(facts, "facts");
    const sinkrt::Manifest& manifest = opened(session).manifest();
    const sinkrt::StreamFacts& stream = manifest.stream;
    *facts = {stream.batch,       manifest.model.vocab_size, stream.num_sink_tokens,
              stream.window_size, stream.chunk_size,         manifest.stateBytes()};
  });
}

sinkrt_status sinkrt_position(const sinkrt_session* session, int64_t stream, int64_t* position) {
  return guarded([&] {
    need(position, "position");
    *position = opened(session).position(stream);
  });
}

sinkrt_status sinkrt_logits(sinkrt_session* session, const float** logits) {
  return guarded([&] {
    need(logits, "logits");
    *logits = opened(session).logits();
  });
}

sinkrt_status sinkrt_prefill(sinkrt_session* session, int64_t stream, const int64_t* ids, int64_t count) {
  return guarded([&] {
    need(ids, "ids");
    opened(session).prefill(ids, count, stream);
  });
}

sinkrt_status sinkrt_step(sinkrt_session* session, const int64_t* ids) {
  return guarded([&] {
    need(ids, "ids");
    opened(session).step(ids);
  });
}

sinkrt_status sinkrt_generate(sinkrt_session* session, const char* prompt, const sinkrt_sampling* sampling,
                              sinkrt_token_callback callback, void* context) {
  return guarded([&] {
    need(reinterpret_cast<const void*>(callback), "callback");
    opened(session).generateText(prompt == nullptr ? "" : prompt, generateParams(sampling),
                                 [&](int64_t id, std::string_view piece) {
                                   return callback(context, id, piece.empty() ? "" : piece.data(), piece.size()) != 0;
                                 });
  });
}

sinkrt_status sinkrt_generate_ids(sinkrt_session* session, const int64_t* ids, int64_t count,
                                  const sinkrt_sampling* sampling, sinkrt_token_callback callback, void* context) {
  return guarded([&] {
    need(reinterpret_cast<const void*>(callback), "callback");
    if (count < 0) {
      throw sinkrt::Error(sinkrt::Code::kUsage,
                          sinkrt::problem("count", std::to_string(count), ">= 0", "pass the number of ids"));
    }
    if (count > 0) need(ids, "ids");
    const std::vector<int64_t> prompt(ids, ids + count);
    opened(session).generate(prompt, generateParams(sampling),
                             [&](int64_t id) { return callback(context, id, nullptr, 0) != 0; });
  });
}

sinkrt_status sinkrt_reset(sinkrt_session* session) {
  return guarded([&] { opened(session).reset(); });
}

sinkrt_status sinkrt_save_state(sinkrt_session* session, const char* path) {
  return guarded([&] {
    need(path, "path");
    opened(session).saveState(path);
  });
}

sinkrt_status sinkrt_load_state(sinkrt_session* session, const char* path) {
  return guarded([&] {
    need(path, "path");
    opened(session).loadState(path);
  });
}

}  // extern "C"
