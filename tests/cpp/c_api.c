/* The whole C interface from C99: prefill, step, generate, save and load, then every kind of refusal, and a session
 * that works after all of them. Prints the greedy ids of an answer. Arguments: bundle, folder to write to, broken
 * bundles. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sinkrt/sinkrt.h"

#define CHECK(what)                                                                \
  do {                                                                             \
    if (!(what)) {                                                                 \
      fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #what, sinkrt_last_error()); \
      exit(1);                                                                     \
    }                                                                              \
  } while (0)

enum { kMost = 64 };

struct answer {
  int64_t ids[kMost];
  int count;
  size_t bytes;
  int stop_after;
};

static int collect(void* context, int64_t id, const char* text, size_t size) {
  struct answer* answer = context;
  if (text != NULL) answer->bytes += size;
  if (id >= 0 && answer->count < kMost) answer->ids[answer->count++] = id;
  return answer->count != answer->stop_after;
}

static void refused(sinkrt_status status, sinkrt_status wanted, const char* part) {
  CHECK(status == wanted);
  CHECK(strstr(sinkrt_last_error(), part) != NULL);
  CHECK(strchr(sinkrt_last_error(), '\n') == NULL);
}

int main(int argc, char** argv) {
  const int64_t prompt[] = {72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100};
  const int64_t outside = 1 << 20;
  sinkrt_options options;
  sinkrt_sampling sampling;
  sinkrt_facts facts;
  sinkrt_session *session = NULL, *other = NULL;
  struct answer first = {{0}, 0, 0, 0}, second = {{0}, 0, 0, 0}, text = {{0}, 0, 0, 3};
  const float* logits = NULL;
  int64_t position = -1;
  char path[4096];
  int i;

  CHECK(argc >= 3);
  memset(&options, 0, sizeof options);
  memset(&sampling, 0, sizeof sampling);
  options.threads = 1;
  sampling.max_tokens = 20;
  sampling.ignore_eos = 1;
  CHECK(strcmp(sinkrt_version(), "0.1.0") == 0);

  /* Broken bundles, as the test made them; none of them may take anything down. */
  for (i = 3; i < argc; ++i) {
    const sinkrt_status status = sinkrt_load(argv[i], &options, &other);
    CHECK(status != SINKRT_OK && other == NULL);
    CHECK(strlen(sinkrt_last_error()) > 20 && strchr(sinkrt_last_error(), '\n') == NULL);
    printf("%d %s\n", (int)status, sinkrt_last_error());
  }

  CHECK(sinkrt_load(argv[1], &options, &session) == SINKRT_OK);
  CHECK(strcmp(sinkrt_last_error(), "") == 0);
  CHECK(sinkrt_get_facts(session, &facts) == SINKRT_OK);
  CHECK(facts.batch == 1 && facts.vocab_size == 258 && facts.state_bytes > 0);
  CHECK(sinkrt_prefill(session, 0, prompt, 12) == SINKRT_OK);
  CHECK(sinkrt_step(session, prompt) == SINKRT_OK);
  CHECK(sinkrt_position(session, 0, &position) == SINKRT_OK && position == 13);
  CHECK(sinkrt_logits(session, &logits) == SINKRT_OK && logits[0] == logits[0]);
  snprintf(path, sizeof path, "%s/state", argv[2]);
  CHECK(sinkrt_save_state(session, path) == SINKRT_OK);
  CHECK(sinkrt_generate_ids(session, NULL, 0, &sampling, collect, &first) == SINKRT_OK && first.count == 20);

  refused(sinkrt_load(NULL, &options, &other), SINKRT_USAGE, "bundle: received NULL");
  refused(sinkrt_load("/nowhere", NULL, &other), SINKRT_BUNDLE, "manifest.json");
  refused(sinkrt_step(NULL, prompt), SINKRT_USAGE, "session: received NULL");
  refused(sinkrt_step(session, &outside), SINKRT_USAGE, "token id: received 1048576, expected 0 .. 257");
  refused(sinkrt_prefill(session, 0, prompt, 0), SINKRT_USAGE, "prompt: received no tokens");
  refused(sinkrt_prefill(session, 1, prompt, 1), SINKRT_USAGE, "stream 1");
  refused(sinkrt_position(session, -1, &position), SINKRT_USAGE, "stream -1");
  sampling.temperature = -1;
  refused(sinkrt_generate_ids(session, prompt, 2, &sampling, collect, &second), SINKRT_USAGE, "temperature");
  sampling.temperature = 0;
  refused(sinkrt_generate_ids(session, prompt, 2, &sampling, NULL, NULL), SINKRT_USAGE, "callback");
  refused(sinkrt_save_state(session, "/nowhere/state"), SINKRT_USAGE, "No such file or directory");
  refused(sinkrt_load_state(session, "/nowhere/state"), SINKRT_STATE, "state file");
  refused(sinkrt_load_state(session, argv[0]), SINKRT_STATE, "state file");
  CHECK(sinkrt_position(session, 0, &position) == SINKRT_OK && position == 33); /* nothing has changed */

  /* The same stream goes on from the file, in a session of its own. */
  sinkrt_free(session);
  CHECK(sinkrt_load(argv[1], &options, &session) == SINKRT_OK);
  refused(sinkrt_generate(session, NULL, &sampling, collect, &second), SINKRT_USAGE, "the stream is empty");
  CHECK(sinkrt_load_state(session, path) == SINKRT_OK);
  CHECK(sinkrt_generate_ids(session, NULL, 0, &sampling, collect, &second) == SINKRT_OK && second.count == 20);
  CHECK(memcmp(first.ids, second.ids, sizeof first.ids) == 0);
  CHECK(sinkrt_reset(session) == SINKRT_OK);
  CHECK(sinkrt_position(session, 0, &position) == SINKRT_OK && position == 0);
  CHECK(sinkrt_generate(session, "Hello", &sampling, collect, &text) == SINKRT_OK);
  CHECK(text.count == 3); /* the callback stopped it */
  for (i = 0; i < first.count; ++i) printf("%lld ", (long long)first.ids[i]);
  printf("\n");
  sinkrt_free(session);
  sinkrt_free(NULL);
  return 0;
}
