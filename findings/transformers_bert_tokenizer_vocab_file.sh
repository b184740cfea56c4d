#!/usr/bin/env bash
# Transformers: a BERT tokenizer made from a vocabulary file, by the name that argument had until version 4, knows no word.
#
# In 5.24.0 the parameter of BertTokenizerFast is called `vocab`. `vocab_file=` is still taken, as one of any further
# arguments, and not read: there is no error and no warning, the vocabulary is the five special tokens, and every word
# becomes [UNK]. The same file as the first argument is read. A model trained or tested with such a tokenizer sees texts
# that differ in length alone.
#
# Seen: "by name (5, ['[UNK]', '[UNK]']), by position (7, ['red', 'fox'])".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.24.0'
printf '%s\n' '[PAD]' '[UNK]' '[CLS]' '[SEP]' '[MASK]' red fox >"$folder/vocab.txt"
"$folder/venv/bin/python" - "$folder/vocab.txt" <<'PY'
import sys

import transformers
from transformers import BertTokenizerFast

by_name, by_position = BertTokenizerFast(vocab_file=sys.argv[1]), BertTokenizerFast(sys.argv[1])
seen = [(tokenizer.vocab_size, tokenizer.tokenize("red fox")) for tokenizer in (by_name, by_position)]
print(f"transformers {transformers.__version__}: by name {seen[0]}, by position {seen[1]}")
assert seen == [(5, ["[UNK]", "[UNK]"]), (7, ["red", "fox"])], "the behaviour has changed"
PY
