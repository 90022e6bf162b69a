#include "text/model.h"

#include "text/bpe.h"
#include "text/unigram.h"

namespace sinkrt {

std::unique_ptr<Model> readModel(const TokenizerFile& file, const Json& part, Vocabulary& vocabulary) {
  // Old files do not say: the library takes what fits.
  const bool named = part.find("type") != nullptr;
  const std::string type = named ? file.typeOf(part) : "";
  if (type == "BPE" || (!named && part.find("merges") != nullptr)) return std::make_unique<Bpe>(file, part, vocabulary);
  const Json* vocab = part.find("vocab");
  if (type == "Unigram" || (!named && vocab != nullptr && vocab->isArray())) {
    return std::make_unique<Unigram>(file, part, vocabulary);
  }
  file.refuse("a model of type '" + type + "'", "BPE, Unigram");
}

}  // namespace sinkrt
