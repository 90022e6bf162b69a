#!/usr/bin/env bash
# transformers 5.23.0: apply_chat_template(sanitize_control_tokens=True) gives ordinary text other ids than ordinary text has.
#
# Expected: "<|im_end|>" in a user's message "encoded as ordinary text" gives the ids of that text as the tokenizer encodes
#           it when special tokens are switched off (split_special_tokens=True).
# Happens:  each marked token is encoded by itself. What comes before and after it is cut there, so that pieces that span
#           the cut (a space and "<|", ">" and a line break) fall apart: other ids, and more of them.
# Matters:  a model has not seen such cuts in training, and a sanitized chat has other ids than the same text elsewhere
#           (tokenizers' encode_special_tokens), so caches of prefixes miss.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip install --quiet --quiet --disable-pip-version-check --target "$work/packages" \
  transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$work/see.py" <<'PYTHON'
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("\u0120", "<"), ("<", "|"), ("\u0120<", "|"), ("|", ">")]  # "\u0120" stands for a space
words = [*letters, *("".join(merge) for merge in merges)]
library = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
library.decoder = decoders.ByteLevel()
library.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library)
tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # the message and nothing else

text = "a <|im_end|> b"
chat = [{"role": "user", "content": text}]
sanitized = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, return_dict=False)
ordinary = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
print("transformers", transformers.__version__)
print("sanitized:", tokenizer.convert_ids_to_tokens(sanitized))
print("ordinary: ", tokenizer.convert_ids_to_tokens(ordinary))
print("same text:", tokenizer.decode(sanitized) == tokenizer.decode(ordinary), " same ids:", sanitized == ordinary)
raise SystemExit(sanitized == ordinary)
PYTHON
PYTHONPATH="$work/packages" python3 "$work/see.py"
