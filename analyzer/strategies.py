"""The scale strategies, by name. Each is a function of one scale group; its docstring is its definition.

``a`` is |x| over all finite values of the group; Q(p) is the quantile of ``a`` at the float64 rank p(n - 1),
linear. INT8 here is ``code = clamp(round(x / scale), -128, 127)``. Every scale is raised to upstream's floor
of 1e-6 (a site that is all zeros has that scale), so scales are positive and finite.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np

from quambase.analyzer import kernels
from quambase.analyzer.least_squares import optimal_affine
from quambase.analyzer.own_strategies import checked, from_entry_point, from_file, installed
from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.upstream_observers import (
    EMA_ALPHA,
    EMA_SIGMA,
    EMA_SITES,
    FLOAT32_SITES,
    SCALE_FLOOR,
    ema_scale,
    floored,
    minmax_scale,
    minmax_scale_float32,
    quantile_column,
)
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.sites import MAMBA2
from quambase.schema.values.arrays import Float32
from quambase.schema.values.number_format import INT8, OUTLIER_CODE, Affine

Scale = float | Affine | tuple[float, float]
"""One scale, one with a zero point, or the (inner, outer) scales of two segments."""

ByStateIndex = Callable[[Float32], list[float]]
Function = TypeVar("Function", bound=Callable[..., Scale])

DEFAULT_LABELS = (
    "absmax",
    "percentile:0.999",
    "percentile",
    "percentile:0.9999",
    "percentile:0.99999",
    "outlier_aware",
    "adaptive_outlier_aware",
    "mse",
    "effect",
    "mse_affine",
    "effect_affine",
    "quamba",
    "outlier_piecewise",
)
"""What `analyze` computes when nothing else is asked for."""


@dataclass(frozen=True)
class Strategy:
    """A registered strategy.

    parameters         its numeric parameters and their defaults, in the order a label gives them
    needs_decode       its codes are no single multiplication: ``function`` returns the scales of two segments
    needs_sensitivity  only runs that were collected with --sensitivity have it
    from_documents     its scale follows from the statistics of each document that a run stores (`documents`)
    document_quantile  the parameter that names a stored quantile of each document, of which it takes an average
    by_state_index     the scales (n,) of a Mamba-2's state from the largest magnitude at each state index (n,) float32,
                       where they follow from that alone
    """

    name: str
    function: Callable[..., Scale]
    parameters: dict[str, float]
    needs_decode: bool = False
    needs_sensitivity: bool = False
    from_documents: bool = False
    document_quantile: str | None = None
    by_state_index: ByStateIndex | None = None

    @property
    def own(self) -> bool:
        """Whether it is a user's, none of quambase."""
        return not self.function.__module__.startswith("quambase.")

    @property
    def definition(self) -> str:
        """The docstring, on one line."""
        return " ".join((self.function.__doc__ or "").split())


@dataclass(frozen=True)
class Choice:
    """A strategy with its parameters, and the label that names both."""

    strategy: Strategy
    params: dict[str, float]

    @property
    def label(self) -> str:
        """The plain name with default parameters, else ``name:value,value``."""
        if self.params == self.strategy.parameters:
            return self.strategy.name
        return f"{self.strategy.name}:{','.join(f'{value:.12g}' for value in self.params.values())}"

    @property
    def params_json(self) -> str:
        """The parameters as JSON, keys sorted."""
        return json.dumps(self.params, sort_keys=True)

    @property
    def needs_document_quantiles(self) -> bool:
        """Whether it averages a quantile of each document. (`quamba` does at Mamba-1 sites, which are never united.)"""
        name = self.strategy.document_quantile
        return name is not None and quantile_column(self.params[name]) != "amax"

    def fits(self, group: ScaleGroup) -> bool:
        """Whether what it needs of each document is known of ``group``."""
        return bool(group.documents.quantiles) or not self.needs_document_quantiles

    def scale(self, group: ScaleGroup) -> Scale:
        """The scale of ``group``, as float32 and at least `SCALE_FLOOR`; two for a two-segment strategy. DataInvalid:
        it does not fit the group.
        """
        if not self.fits(group):
            raise DataInvalid(
                f"{self.label} needs quantiles of each document, which no run stores of {group.site} group "
                f"{group.group_name}; take one of its smallest groups, or another strategy"
            )
        function = self.strategy.function
        if self.strategy.own:
            found: Scale = checked(self.label, function, group, **self.params)
        else:
            found = function(group, **self.params)
        if isinstance(found, Affine):
            return (
                Affine(stored_scale(found.scale), found.zero_point) if found.zero_point else stored_scale(found.scale)
            )
        return (stored_scale(found[0]), stored_scale(found[1])) if isinstance(found, tuple) else stored_scale(found)

    def state_scales(self, group: ScaleGroup) -> list[float] | None:
        """One scale for each state index (n,) of a Mamba-2's state, as upstream has them, if the strategy follows from
        largest values alone; None for every other group and strategy. Upstream observes the float16 cache.
        """
        if group.state_amax is None or self.strategy.by_state_index is None:
            return None
        with np.errstate(over="ignore"):
            return self.strategy.by_state_index(group.state_amax.astype(np.float16).astype(np.float32))


STRATEGIES: dict[str, Strategy] = {}


@overload
def strategy(function: Function, /) -> Function: ...


@overload
def strategy(
    *,
    needs_decode: bool = False,
    needs_sensitivity: bool = False,
    from_documents: bool = False,
    document_quantile: str | None = None,
    by_state_index: ByStateIndex | None = None,
) -> Callable[[Function], Function]: ...


def strategy(function: Any = None, /, **properties: Any) -> Any:
    """Register a function under its own name; its keyword defaults are its parameters, its docstring the definition.

    ``@strategy``, or with properties of `Strategy` ``@strategy(needs_decode=True)``. A function of a user's replaces an
    earlier one of that name, so that a notebook's cell can run again.

    DataInvalid: quambase has a strategy of that name, or a parameter has no number as its default.

    >>> from quambase import strategy
    >>> @strategy
    ... def near_absmax(group, share=0.9):
    ...     \"\"\"``share`` of max a / 127.\"\"\"
    ...     return share * group.distribution.amax / 127
    >>> STRATEGIES["near_absmax"].parameters
    {'share': 0.9}
    """

    def register(function: Function) -> Function:
        name = function.__name__
        if name in STRATEGIES and not STRATEGIES[name].own:
            raise DataInvalid(f"quambase has a strategy {name}; give yours another name")
        arguments = list(inspect.signature(function).parameters.values())[1:]
        for argument in arguments:
            if not isinstance(argument.default, int | float):
                raise DataInvalid(f"parameter {argument.name} of strategy {name} has no number as its default")
        STRATEGIES[name] = Strategy(name, function, {a.name: float(a.default) for a in arguments}, **properties)
        return function

    return register if function is None else register(function)


def parse_label(label: str | Callable[..., Scale]) -> Choice:
    """``name`` or ``name:value,value``, of quambase or of another package (entry points `quambase.strategies`);
    ``FILE.py:NAME``; or a function itself.

    UnknownName: no such name, too many values or no numbers. DataInvalid: another's code fails.
    """
    if callable(label):
        return parse_label(_registered(label))
    if (given := from_file(label.strip())) is not None:
        label = _registered(given[0]) + given[1]
    name, colon, text = label.strip().partition(":")
    if name not in STRATEGIES and name in installed():
        _registered(from_entry_point(name), name)
    if name not in STRATEGIES:
        raise UnknownName.of("strategy", name, [*STRATEGIES, *installed()])
    found = STRATEGIES[name]
    values = text.split(",") if colon else []
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = [math.nan]
    if len(numbers) > len(found.parameters) or not all(map(math.isfinite, numbers)):
        shape = ",".join(found.parameters) or "no parameters"
        raise UnknownName(f"strategy '{label}' is not understood; expected {name}:{shape}, numbers apart by commas")
    choice = Choice(found, found.parameters | dict(zip(found.parameters, numbers, strict=False)))
    _check_parameters(choice, label)
    return choice


def _registered(function: Callable[..., Scale], name: str | None = None) -> str:
    """The name under which ``function`` is registered; it is, if it was not."""
    known = next((found.name for found in STRATEGIES.values() if found.function is function), None)
    if known is None:
        strategy(function)
    known = known or function.__name__
    if name is not None and known != name:
        raise DataInvalid(f"the entry point {name} is the function {known}; give them one name")
    return known


_WITHIN = {"alpha": (0.0, 1.0), "ratio": (0.0, 1.0), "sigma": (0.0, 1.0)}


def _check_parameters(choice: Choice, label: str) -> None:
    for name, value in choice.params.items():
        low, high = _WITHIN.get(name, (0.0, math.inf))
        if not low < value <= high:
            raise UnknownName(f"strategy '{label}' has {name} = {value:g}; expected {low:g} < {name} <= {high:g}")
    if choice.strategy.document_quantile is not None:
        quantile_column(choice.params[choice.strategy.document_quantile])


def parse_labels(labels: Sequence[str | Callable[..., Scale]] | None) -> list[Choice]:
    """Choices of ``labels`` in order, without repetition; None or none: `DEFAULT_LABELS`; ``all``: every one."""
    choices: dict[str, Choice] = {}
    for label in labels or DEFAULT_LABELS:
        for name in [*DEFAULT_LABELS, *STRATEGIES, *installed()] if label == "all" else [label]:
            choice = parse_label(name)
            choices.setdefault(choice.label, choice)
    return list(choices.values())


def stored_scale(scale: float) -> float:
    """A scale as it is stored: float32, at least `SCALE_FLOOR`."""
    return float(floored(scale))


@strategy(from_documents=True, by_state_index=lambda amax: [stored_scale(value / INT8.qmax) for value in amax.tolist()])
def absmax(group: ScaleGroup) -> float:
    """max a / 127: nothing clips."""
    return group.distribution.amax / INT8.qmax


@strategy
def percentile(group: ScaleGroup, alpha: float = 0.9995) -> float:
    """Q(alpha) / 127 of the pooled distribution."""
    return _quantile(group, alpha) / INT8.qmax


@strategy
def outlier_aware(group: ScaleGroup, ratio: float = 0.99, levels: float = 120) -> float:
    """Q(ratio) / levels: the ratio's quantile lands on code ``levels``, outliers on the codes above it."""
    return _quantile(group, ratio) / levels


ADAPTIVE_RATIOS = (0.95, 0.97, 0.99, 0.995)


@strategy
def adaptive_outlier_aware(group: ScaleGroup) -> float:
    """Q(r) / (127 r) for the r of 0.95, 0.97, 0.99, 0.995 with least squared error; ties to the larger scale."""
    return _least_error(group, [_quantile(group, r) / (INT8.qmax * r) for r in ADAPTIVE_RATIOS])


@strategy
def mse(group: ScaleGroup) -> float:
    """The least squared error over all scales (analyzer/least_squares.py); ties to the larger scale."""
    return group.least_squares


@strategy(needs_sensitivity=True)
def effect(group: ScaleGroup) -> float:
    """The least predicted KL to the float model over all scales, of a run with sensitivities; mse at a site without
    (recurrent states, which act in decoding only). Ties to the larger scale."""
    return group.least_effect


@strategy
def mse_affine(group: ScaleGroup) -> float | Affine:
    """The least squared error over scales and zero points (analyzer/least_squares.py) where the INT8 model reads codes
    with a zero point: after SiLU (x_proj:input; x_conv_out, B_conv_out, C_conv_out). Elsewhere mse."""
    return optimal_affine(group.distribution) if group.point.affine else mse(group)


@strategy(needs_sensitivity=True)
def effect_affine(group: ScaleGroup) -> float | Affine:
    """The least predicted KL over scales and zero points where mse_affine has a zero point, elsewhere effect."""
    if not group.point.affine or group.sensitivity is None:
        return effect(group)
    return optimal_affine(group.sensitivity.weighted)


@strategy(
    from_documents=True, by_state_index=lambda amax: [float(minmax_scale_float32(value)) for value in amax[:, None]]
)
def quamba(group: ScaleGroup) -> float:
    """What upstream computes (`upstream_observers`). Mamba-1: at x_proj:input and ssm_state_act:input a moving average
    (0.01) of each document's 0.9995 quantile over 127, in float32; elsewhere max a / 127 in float16. Mamba-2: max a /
    127 everywhere, at x_conv_out:input and ssm_state_act:input in float32, elsewhere in float16."""
    if group.family == MAMBA2:
        replayed = minmax_scale_float32 if group.site in FLOAT32_SITES else minmax_scale
        return float(replayed(group.documents.amax))
    if group.site in EMA_SITES:
        return float(ema_scale(group.documents.quantiles[quantile_column(EMA_ALPHA)], EMA_SIGMA))
    return float(minmax_scale(group.documents.amax))


@strategy(from_documents=True, document_quantile="alpha")
def ema_percentile(group: ScaleGroup, alpha: float = EMA_ALPHA, sigma: float = EMA_SIGMA) -> float:
    """Upstream's moving average of per-document quantiles at every site, with other constants; alpha is one
    that `documents` stores, or 1 for the maximum."""
    column = quantile_column(alpha)
    observed = group.documents.amax if column == "amax" else group.documents.quantiles[column]
    return float(ema_scale(observed, sigma))


@strategy(needs_decode=True)
def outlier_piecewise(group: ScaleGroup, ratio: float = 0.99) -> tuple[float, float]:
    """Two segments: a <= Q(ratio) on codes 0..120, the rest up to max a on 121..127. Not one multiplication."""
    inner = max(_quantile(group, ratio) / OUTLIER_CODE, SCALE_FLOOR)
    return inner, (group.distribution.amax - inner * OUTLIER_CODE) / (INT8.qmax - OUTLIER_CODE)


@strategy
def sigma(group: ScaleGroup, k: float = 5) -> float:
    """k standard deviations / 127."""
    return k * _or_zero(group.distribution.moments()[1]) / INT8.qmax


@strategy
def pow2(group: ScaleGroup) -> float:
    """The power of two of least squared error, at least the floor; ties to the larger scale."""
    amax = group.distribution.amax
    if amax <= 0:
        return 0.0
    values, counts = group.distribution.values.astype(np.float64), group.distribution.counts
    scale = 2.0 ** math.ceil(math.log2(2 * amax))  # every code is zero from here on
    best, least = scale, math.inf
    while scale >= SCALE_FLOOR:
        # Values beyond the codes lose at least this much, and more at every smaller scale.
        beyond = np.maximum(np.abs(values) + INT8.qmin * scale, 0)
        if float((beyond**2 * counts).sum()) >= least:
            break
        error = group.figures(scale).squared_error
        best, least = (scale, error) if error < least else (best, least)
        scale /= 2
    return best


@strategy
def lp(group: ScaleGroup, p: float = 2.4) -> float:
    """The least sum of |error|^p over max a / 127 * i / 100, i = 1..100 (llm-compressor's observer has p =
    2.4 and the grid 0.8..1); ties to the larger scale."""
    top = group.distribution.amax / INT8.qmax
    values, counts = group.distribution.values, group.distribution.counts
    candidates = [stored_scale(top * i / 100) for i in range(100, 0, -1)]
    errors = [kernels.lp_error(values, counts, np.float32(scale), p) for scale in candidates]
    return candidates[int(np.argmin(errors))]


ENTROPY_BINS = 2048
ENTROPY_LEVELS = 128


@strategy
def entropy(group: ScaleGroup) -> float:
    """TensorRT's KL calibration as pytorch-quantization writes it. Of a histogram of a with 2048 bins (bin 0 set to bin
    1), clipped at i = 128..2048 bins with the tail added to the last one, the i whose 128-level version diverges least
    from it; the last of equal ones. The scale is that clip / 127."""
    amax = group.distribution.amax
    if amax <= 0:
        return 0.0
    magnitudes, counts = group.distribution.absolute
    bins, _ = np.histogram(magnitudes.astype(np.float64), ENTROPY_BINS, (0.0, amax), weights=counts.astype(np.float64))
    bins[0] = bins[1]
    divergences = kernels.entropy_divergences(bins, ENTROPY_LEVELS)
    last = divergences.size - 1 - int(np.argmin(divergences[::-1]))
    return amax * (last + ENTROPY_LEVELS) / ENTROPY_BINS / INT8.qmax


ACIQ_LAPLACE = 9.89675982
"""t of least 2 exp(-t) + t^2 / (3 4^8): t exp(t) = 3 4^8."""

ACIQ_GAUSS = 3.92403714
"""t of least 2 ((1 + t^2) Phi(-t) - t phi(t)) + t^2 / (3 4^8) for a unit normal."""


@strategy
def aciq_laplace(group: ScaleGroup) -> float:
    """ACIQ's clipping for a Laplace distribution (Banner et al. 2019, 8 bits): 9.897 mean|x - mean| / 127."""
    values, counts = group.distribution.values.astype(np.float64), group.distribution.counts
    if not values.size:
        return 0.0
    mean = group.distribution.moments()[0]
    return ACIQ_LAPLACE * float((np.abs(values - mean) * counts).sum() / counts.sum()) / INT8.qmax


@strategy
def aciq_gauss(group: ScaleGroup) -> float:
    """ACIQ's clipping for a normal distribution (Banner et al. 2019, 8 bits): 3.924 std / 127."""
    return ACIQ_GAUSS * _or_zero(group.distribution.moments()[1]) / INT8.qmax


def _quantile(group: ScaleGroup, p: float) -> float:
    return _or_zero(group.distribution.quantile(p))


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _least_error(group: ScaleGroup, candidates: list[float]) -> float:
    """The candidate of least squared error, rounded to float32; the larger one of a tie."""
    errors = {stored_scale(scale): group.figures(stored_scale(scale)).squared_error for scale in candidates}
    return min(errors, key=lambda scale: (errors[scale], -scale))
