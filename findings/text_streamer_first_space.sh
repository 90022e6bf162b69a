#!/usr/bin/env bash
# transformers 5.23.0 (tokenizers 0.23.3): TextStreamer(skip_prompt=True) drops the space between prompt and answer.
#
# Expected: prompt text + streamed text is the text of all ids together, as `decode` gives it.
# Happens:  with decoders of the SentencePiece kind (Llama 2, Mistral, Phi-3: Strip takes the first space off) the streamer
#           decodes the answer's ids by themselves, so its first word loses its space: "ab ab" + "ab ab" is "ab abab ab".
#           tokenizers' DecodeStream does the same unless it is begun with the prompt's ids (DecodeStream(ids=...)).
# Matters:  whoever shows or stores prompt + stream joins two words, and feeds other ids when that text is encoded again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip install --quiet --quiet --disable-pip-version-check --target "$work/packages" \
  transformers==5.23.0 tokenizers==0.23.3 numpy==2.4.6
cat > "$work/see.py" <<'PYTHON'
import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers
from transformers.generation.streamers import TextStreamer

words = ["<unk>", "\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b")]
library = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


class Kept(TextStreamer):
    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library)
prompt, answer = library.encode("ab ab").ids, library.encode("ab ab").ids
streamer = Kept(tokenizer, skip_prompt=True)
streamer.put(np.array(prompt))
for token in answer:
    streamer.put(np.array([token]))
streamer.end()
fresh = decoders.DecodeStream(skip_special_tokens=True)
begun = decoders.DecodeStream(ids=prompt, skip_special_tokens=True)
joined, whole = tokenizer.decode(prompt) + streamer.text, tokenizer.decode(prompt + answer)
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("TextStreamer(skip_prompt=True):", repr(streamer.text))
print("DecodeStream():               ", [fresh.step(library, token) for token in answer])
print("DecodeStream(ids=prompt):     ", [begun.step(library, token) for token in answer])
print("prompt + stream:", repr(joined), " decode(all):", repr(whole))
raise SystemExit(joined == whole)
PYTHON
PYTHONPATH="$work/packages" python3 "$work/see.py"
