"""What is predicted from what, and the figures, against softmax written out in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_int8 import CONFIG, absmax_scales, documents, tiny_prepared, tiny_weights

from quambase.apply.evaluation import scoring
from quambase.apply.evaluation.scoring import (
    Item,
    blocks,
    last_word_items,
    perplexity_items,
    score,
    split_last_word,
)
from quambase.apply.int8.build import build
from quambase.model.inputs.text import Document
from quambase.model.inputs.tokenizer import Tokenizer
from quambase.model.language_model import floating_model
from quambase.model.packed_batch import Batch
from quambase.schema.stored.results import FLOAT


class Letters:
    """A tokenizer with one token per character, and "th" as one: merges can straddle nothing but a word."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text.replace("th", "\u0100")]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def document(text: str, index: int = 0) -> Document:
    return Document(index, text, f"sha{index}")


def lm_eval_pair(text: str) -> tuple[str, str]:
    """lambada_openai's doc_to_text and doc_to_target, then lm-eval's _encode_pair."""
    context, continuation = " ".join(text.split(" ")[:-1]), " " + text.split(" ")[-1]
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    return context, context + continuation


@given(st.lists(st.text("abth.,'", min_size=1, max_size=5), min_size=2, max_size=6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_last_word_is_lm_evals(words: Any, gap: Any) -> None:
    text = " ".join(words[:-1]) + " " * gap + words[-1]
    assert split_last_word(text) == lm_eval_pair(text)


@pytest.mark.parametrize("text", ["", "   ", "word", " word \n"])
def test_no_context_no_target(text: str) -> None:
    assert split_last_word(text) is None
    assert last_word_items([document(text)], Letters(), 100) == []


def test_last_word_tokens_and_trailing_space() -> None:
    (item,) = last_word_items([document("we saw the  moth \n", 7)], Letters(), 100)
    (sequence,) = item.sequences
    assert sequence[item.first :] == [ord(c) for c in "  mo\u0100"]
    assert (item.document, item.sha256, item.targets) == (7, "sha7", 5)


def test_a_long_context_is_cut_from_the_left() -> None:
    (item,) = last_word_items([document("abcdefgh ij")], Letters(), 5)
    assert item.sequences == ([ord(c) for c in "fgh ij"],) and item.first == 3


def test_windows_do_not_overlap_and_leave_single_tokens_out() -> None:
    items = perplexity_items(
        [document("abcdefghi", 0), document("", 1), document("x", 2), document("yz", 3)], Letters(), 4
    )
    assert [item.document for item in items] == [0, 3]
    assert items[0].sequences == ([97, 98, 99, 100], [101, 102, 103, 104])  # "i" alone predicts nothing
    assert items[0].targets == 6 and items[0].tokens == 8


def test_blocks_cover_the_items_in_order() -> None:
    items = [Item(i, "", ([0] * length,)) for i, length in enumerate((3, 9, 1, 1, 1, 20, 2))]
    cut = blocks(items, 10)
    assert [item.document for block in cut for item in block] == list(range(7))
    assert [[item.document for item in block] for block in cut] == [[0, 1], [2, 3, 4, 5], [6]]
    assert blocks([], 10) == []


@pytest.fixture(scope="module")
def models() -> Any:
    prepared = tiny_prepared()
    scales = absmax_scales(prepared, documents(1))
    coarse = {key: 4 * scale for key, scale in scales.items()}
    good = build(prepared, scales)
    return floating_model(tiny_weights()), {
        "good": good,
        "coarse": good.with_scales(coarse),
        "head": build(prepared, scales, quantize_lm_head=True),
    }


def test_scores_equal_softmax_written_out(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, int8 = models
    monkeypatch.setattr(scoring, "LOGIT_CELLS", 7 * CONFIG.vocab_size)  # several chunks
    texts = documents(3, (12, 2, 25, 9))
    items = [
        Item(0, "", (texts[0],)),
        Item(1, "", (texts[1],)),
        Item(2, "", (texts[2], texts[3])),  # two windows
        Item(3, "", (texts[3],), first=6),
    ]
    found = score(reference, int8, items)
    for label, model in {FLOAT: reference, **int8}.items():
        for i, item in enumerate(items):
            nll = kl = 0.0
            agree = 0
            right = True
            for sequence in item.sequences:
                batch = Batch.pack([sequence])
                p = torch.log_softmax(reference.logits(reference.hidden(batch)).double(), 1).numpy()
                q = torch.log_softmax(model.logits(model.hidden(batch)).double(), 1).numpy()
                for place in range(item.first, len(sequence)):
                    a, b, target = p[place - 1], q[place - 1], sequence[place]
                    nll -= b[target]
                    kl += sum(np.exp(a[v]) * (a[v] - b[v]) for v in range(CONFIG.vocab_size))
                    agree += int(a.argmax() == b.argmax())
                    right &= bool(b.argmax() == target)
            got = found[label]
            # Float32 logits of size up to 2^5, whose rows the batch's shape may change in the
            # last bits (8 * 2^-24 * 32 each), summed over at most 34 tokens.
            tolerance = 34 * 8 * 2**-24 * 32
            assert got.nll[i] == pytest.approx(nll, abs=tolerance)
            assert got.kl[i] == pytest.approx(kl, abs=tolerance)
            assert got.top1[i] == agree
            assert got.correct[i] == right
    assert found["coarse"].kl.sum() > 3 * found["good"].kl.sum() > 0
    assert not found[FLOAT].kl.any()
    assert found[FLOAT].top1.tolist() == [item.targets for item in items]


def test_some_document_can_be_wholly_right(models: Any) -> None:
    reference, int8 = models
    text = documents(4, (8,))[0]
    likely = int(reference.logits(reference.hidden(Batch.pack([text])))[-1].argmax())
    item = Item(0, "", ([*text, likely],), first=8)
    assert score(reference, int8, [item])[FLOAT].correct.tolist() == [True]
    wrong = Item(0, "", ([*text, (likely + 1) % CONFIG.vocab_size],), first=8)
    assert score(reference, int8, [wrong])[FLOAT].correct.tolist() == [False]
    # One right token of two is not a right word.
    logits = reference.logits(reference.hidden(Batch.pack([text])))
    assert int(logits[-2].argmax()) != text[-1]
    half = Item(0, "", ([*text, likely],), first=7)
    assert score(reference, int8, [half])[FLOAT].correct.tolist() == [False]


def test_real_tokenizer_has_the_same_interface(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    items = perplexity_items([document("a b a")], Tokenizer(tmp_path, "", inner), 10)
    assert items[0].sequences == ([0, 1, 0],)


COMPARE = """
import numpy as np
from quambase.apply.evaluation import host_kernels as kernels
draw = np.random.default_rng(0)
reference = draw.normal(0, 3, (32, 4096)).astype(np.float32)
logits = reference + draw.normal(0, 0.1, reference.shape).astype(np.float32)
top, nll, kl = np.empty(32, np.int64), np.empty(32), np.empty(32)
kernels.log_softmax_rows(reference, top)
kernels.compare_rows(reference, logits, top, nll, kl, top.copy())
print(sum(kernels.compare_rows.stats.cache_hits.values()), *(part.tobytes().hex() for part in (reference, nll, kl)))
"""


def test_a_kernel_from_the_cache_computes_what_the_compiled_one_did(tmp_path: Path) -> None:
    """Bit for bit: an evaluation gives the same figures before and after its kernels are kept on disk."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, again = (
        subprocess.run([sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    (made, *figures), (loaded, *same) = (done.stdout.split() for done in (first, again))
    assert (made, loaded) == ("0", "1")
    assert figures == same
