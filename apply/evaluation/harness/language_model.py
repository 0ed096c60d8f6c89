"""Our models as language models of lm-eval: what it asks becomes items of our own scorer.

Importing this module makes the model `quambase` known to lm-eval, in this process.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lm_eval.models  # noqa: F401 - lm-eval's own models are registered before ours, or never
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from quambase.apply.evaluation.block_scorer import PlacedModels
from quambase.apply.evaluation.candidates import from_folder, from_model, from_scales
from quambase.apply.evaluation.scoring import BLOCK_TOKENS, Item, LanguageModel, blocks, score
from quambase.apply.int8.model_folder import is_int8_model
from quambase.model.generate import Steps, continued
from quambase.model.inputs.tokenizer import END_OF_TEXT, Tokenizer
from quambase.model.operators.choice import choose_device
from quambase.schema.commands import DATABASE
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.scale_table import SELECTED
from quambase.schema.stored.results import FLOAT

WINDOW = 2048
"""Tokens of a sequence at most, as for the Transformers that lm-eval compares with; a Mamba has no limit of its own."""

NEW_TOKENS = 256
"""Tokens that are generated at most where the task names no number: lm-eval's own default."""

LM_EVAL_DEVICE = "cuda:0"
"""What lm-eval's command line passes where no device is named, on a machine without CUDA, too."""

Key = tuple[str, str | int]
"""What was asked: a context and its continuation, or a text and the number of its window."""

Answer = tuple[float, bool]
"""log p of a continuation in nats, and whether each of its tokens was the most likely one."""

Answers = Callable[[Mapping[Key, Item]], Mapping[Key, Answer]]
"""Scores items; an item's predicted tokens are the continuation's."""


class Request(Protocol):
    """lm-eval's `Instance`, as far as it is read here."""

    args: tuple[Any, ...]


class ItemModel(TemplateLM):  # type: ignore[misc]
    """A language model of lm-eval whose log-likelihoods ``answers`` gives.

    Contexts and continuations are split into tokens by lm-eval's own rule (`TemplateLM._encode_pair`). What is longer
    than ``window`` tokens, not counting the last, loses its beginning, as with lm-eval's own models.

    steps  the model that generates; None: tasks that generate are refused
    """

    def __init__(self, tokenizer: Tokenizer, window: int, answers: Answers, steps: Steps | None) -> None:
        super().__init__()
        self.text_tokenizer, self.max_length, self.answers, self.steps = tokenizer, window, answers, steps

    @property
    def eot_token_id(self) -> int:
        """The token that lm-eval puts before a text without a context, and that ends what is generated.

        DataInvalid: the tokenizer has none.
        """
        if (found := self.text_tokenizer.end_of_text) is not None:
            return found
        raise DataInvalid(
            f"tokenizer {self.text_tokenizer.path} has no token that ends a text ({', '.join(END_OF_TEXT)}), and this "
            "task needs one; take a task whose documents have a context and a continuation"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; nothing is added to a text."""
        return self.text_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Key, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        """Answers in the order of (what was asked, context tokens, continuation tokens). DataInvalid."""
        items = {
            key: self._item(number, context or [self.prefix_token_id], continuation)
            for number, (key, context, continuation) in enumerate(requests)
        }
        found = self.answers(items)
        return [found[key] for key, _, _ in requests]

    def _item(self, number: int, context: list[int], continuation: list[int]) -> Item:
        kept = (context + continuation)[-(self.max_length + 1) :]
        first = len(kept) - len(continuation)
        if first < 1:
            raise DataInvalid(
                f"a continuation of {len(continuation):,} tokens is longer than the window of {self.max_length:,}; "
                "take a longer one: --window (for lm_eval: max_length=)"
            )
        return Item(number, "", (kept,), first)

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats: the first token after the end-of-text token, longer texts in windows."""
        asked = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            asked.append([((text, number), *pair) for number, pair in enumerate(pairs)])
        answers = iter(self._loglikelihood_tokens(list(itertools.chain(*asked))))
        return [sum(log_p for log_p, _ in itertools.islice(answers, len(windows))) for windows in asked]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of its stop texts. DataInvalid: sampling is asked for."""
        if self.steps is None:
            raise DataInvalid(
                "an INT8 model of outlier_piecewise does not generate; take another strategy, or tasks of "
                "log-likelihoods (output_type loglikelihood, loglikelihood_rolling, multiple_choice)"
            )
        return [self._generated(self.steps, *request.args) for request in requests]

    def _generated(self, steps: Steps, context: str, settings: Mapping[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature"):
            raise DataInvalid(
                "this task asks for sampled text (do_sample, temperature); quambase generates greedily: set "
                "do_sample: false and temperature: 0 in a copy of the task (--include-path)"
            )
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        longest = int(settings.get("max_gen_toks", NEW_TOKENS))
        if longest >= self.max_length:
            raise DataInvalid(
                f"this task generates {longest:,} tokens, more than the window of {self.max_length:,} holds; take a "
                "longer one: --window (for lm_eval: max_length=)"
            )
        end = self.eot_token_id
        prompt = self.tok_encode(context)[-(self.max_length - longest) :] or [end]
        written: list[int] = []
        for token in itertools.islice(continued(steps, prompt, vocabulary=self.text_tokenizer.ids), longest):
            if token == end:
                break
            written.append(token)
            text = self.text_tokenizer.decode(written)
            if places := [text.index(stop) for stop in stops if stop in text]:
                return text[: min(places)]
        return self.text_tokenizer.decode(written)


def answers_of(model: LanguageModel, device: torch.device) -> Answers:
    """The answers of a model on ``device``, in blocks as `evaluate` makes them."""

    def answers(items: Mapping[Key, Item]) -> dict[Key, Answer]:
        found: list[Answer] = []
        for block in blocks(list(items.values()), BLOCK_TOKENS[device.type]):
            scored = score(model, {}, block)[FLOAT]
            found += zip((-scored.nll).tolist(), scored.correct.tolist(), strict=True)
        return dict(zip(items, found, strict=True))

    return answers


@register_model("quambase")
class QuambaseModel(ItemModel):
    """The model ``quambase`` of lm-eval, floating-point or INT8."""

    def __init__(
        self,
        path: str | Path,
        *,
        scales: str | None = None,
        strategy: str = SELECTED,
        granularity: str | None = None,
        quantize_lm_head: bool = False,
        quantize_embedding: bool = False,
        compat: str | None = None,
        weight_bits: int = 8,
        gptq: bool = False,
        db: str = str(DATABASE),
        model: str | None = None,
        device: str | None = None,
        max_length: int = WINDOW,
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        """The arguments of ``--model_args``.

        path        an INT8 model's folder, or a floating-point model: bundled name, folder, short name or hub id
        scales      a scale table: the INT8 model of one of its strategies is built in memory, on ``path``'s weights
        strategy, granularity, quantize_lm_head, quantize_embedding, compat, weight_bits, gptq
                    with ``scales``, as `quambase.apply`
        db          with ``gptq``, the database that has the scales' run
        model       the floating-point model of an INT8 folder, where it has moved
        device      "auto" (CUDA if there is any), "cpu" or "cuda"; lm-eval's default, "cuda:0", is "auto"
        max_length  tokens of a sequence at most
        batch_size, max_batch_size
                    without effect: batches are packed without padding and have a fixed number of tokens
        Errors: ScalesInvalid, UnknownName, CheckpointInvalid, ModelNotFound, DataInvalid.
        """
        name = str(path)
        if scales is None and is_int8_model(Path(name)):
            candidates = from_folder(Path(name), model)
        elif scales is None:
            candidates = from_model(name)
        else:
            candidates = from_scales(
                Path(str(scales)),
                [str(strategy)],
                name,
                quantize_lm_head,
                quantize_embedding=quantize_embedding,
                compat=compat,
                weight_bits=int(weight_bits),
                gptq_from=Path(str(db)) if gptq else None,
                granularities=[granularity] if granularity else [],
            )
        where = "auto" if device in (None, LM_EVAL_DEVICE) else str(device)
        models = PlacedModels.on(choose_device(where), candidates, required=where != "auto")
        label = next(iter(candidates.models), FLOAT)
        scored = models.reference if label == FLOAT else models.int8[label]
        steps = models.steps(label)
        super().__init__(candidates.source.tokenizer, int(max_length), answers_of(scored, models.device), steps)
        self._device = models.device
        self.about = {"path": name, "scales": candidates.scales, "strategy": label, "device": models.device.type}

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> QuambaseModel:
        """As `create_from_arg_obj`, of ``--model_args`` as text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> QuambaseModel:
        """The model of these ``--model_args``; lm-eval's own options stand behind them.

        UnknownName, DataInvalid: a key that is none, or no path.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in arg_dict:
            if name not in known:
                raise UnknownName.of("key of --model_args", name, known)
        if "path" not in arg_dict:
            raise DataInvalid("--model_args names no model; expected path=FOLDER_OR_NAME, with scales=... for INT8")
        return cls(**{**(additional_config or {}), **arg_dict})

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes of the model into its results."""
        return self.about
