#!/usr/bin/env bash
# Sentence Transformers: a Dense module that is saved and loaded again may compute something else.
#
# The module's config.json holds the class of its activation function, not the arguments. Sentence Transformers 6.2.0
# loads the class with its defaults and says nothing: a leaky ReLU of slope 0.5 comes back with slope 0.01.
#
# Seen: "slope 0.5 before, 0.01 after; largest difference of a vector's value above 0.1".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'sentence-transformers==6.2.0' \
    'transformers==5.24.0' 'torch==2.13.0'
cat >"$folder/check.py" <<'PY'
import sys

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

torch.manual_seed(0)
tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "blue": 2, "fox": 3}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
dense = Dense(16, 16, activation_function=torch.nn.LeakyReLU(0.5))
model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16), dense], device="cpu")
model.save(sys.argv[1])
again = SentenceTransformer(sys.argv[1], device="cpu")
slopes = dense.activation_function.negative_slope, again[1].activation_function.negative_slope
texts = ["red fox", "blue fox"]
difference = abs(model.encode(texts) - again.encode(texts)).max()
print(f"sentence-transformers {sentence_transformers.__version__}; slope {slopes[0]} before, {slopes[1]} after;")
print(f"largest difference of a vector's value {difference:.3f}")
assert slopes == (0.5, 0.01) and difference > 0.1, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/model"
