"""The Mamba-2 block: sizes, tensors, sites, the order of its heads, and the forward pass with a tap at every site.

Taps receive what the hooks on upstream's `Mamba2Simple` (quamba/qMamba2.py:155-270) receive: dt_act before dt_bias and
softplus, ssd_out_act after the skip connection and before the gated norm, out_proj:input after norm and Hadamard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from quambase.model.block import Block, BlockKind, BlockWeights, Change, Draw, HeadLayout, ModelConfig, Show, unchanged
from quambase.model.exponential import exp
from quambase.model.inputs.settings import NORM_EPS, Settings, check_hugging_face, check_mamba_ssm, padded_vocabulary
from quambase.model.operators.interface import BlockState, Operators, OperatorSizes, SsdInputs
from quambase.model.operators.sampled_states import Pieces, decay_of, pieces_of, steps, watch_states
from quambase.model.packed_batch import PlacedBatch, last_rows
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.groups import LayerGroups
from quambase.schema.sites import MAMBA2, SAMPLED_STATE_SITES, STATE_BY_CHANNEL, STATE_BY_INDEX

# Options of mamba-ssm's Mamba2, with the only value that upstream's INT8 model supports.
_ONLY = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}


@dataclass(frozen=True)
class Mamba2Config(ModelConfig):
    """Sizes of a Mamba-2 model.

    d_inner is heads times headdim; each of ``ngroups`` SSD groups has its own B and C, shared by heads / ngroups
    consecutive heads.
    """

    kind = MAMBA2
    d_model: int
    n_layer: int
    vocab_size: int
    d_inner: int
    d_state: int = 128
    d_conv: int = 4
    headdim: int = 64
    ngroups: int = 1
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.headdim, self.ngroups) < 1 or self.d_inner % self.headdim or self.heads % self.ngroups:
            raise CheckpointInvalid(
                f"config.json implies {self.d_inner} channels in heads of {self.headdim} and {self.ngroups} groups of "
                "heads; expected whole heads, as many in each group"
            )

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.d_inner // self.headdim

    @property
    def bc_width(self) -> int:
        """The width of B, and of C: ngroups times d_state."""
        return self.ngroups * self.d_state

    @property
    def conv_width(self) -> int:
        """The convolution's number of channels: x, B, C."""
        return self.d_inner + 2 * self.bc_width

    @property
    def in_proj_edges(self) -> tuple[int, ...]:
        """Where z, x, B, C, dt begin in in_proj's output, and where dt ends."""
        e, w = self.d_inner, self.bc_width
        return (0, e, 2 * e, 2 * e + w, 2 * e + 2 * w, 2 * e + 2 * w + self.heads)

    @classmethod
    def from_mamba_ssm(cls, values: Mapping[str, Any]) -> Mamba2Config:
        """From mamba-ssm's config.json; absent keys have the defaults of mamba_ssm/modules/mamba2.py."""
        raw = Settings(values)
        ssm = check_mamba_ssm(raw)
        for name, value in _ONLY.items():
            ssm.only(name, value)
        _check_dt_limit(ssm, "dt_limit")
        d_model = raw.size("d_model")
        d_inner = ssm.expanded(d_model)
        if "d_ssm" in ssm and ssm.size("d_ssm") != d_inner:
            raise CheckpointInvalid(
                f"config.json says ssm_cfg.d_ssm = {ssm.size('d_ssm')} of {d_inner} channels (a gated MLP beside the "
                "SSM); expected Mamba layers only"
            )
        return cls(
            d_model=d_model,
            n_layer=raw.size("n_layer"),
            vocab_size=padded_vocabulary(raw),
            d_inner=d_inner,
            d_state=ssm.size("d_state", 128),
            d_conv=ssm.size("d_conv", 4),
            headdim=ssm.size("headdim", 64),
            ngroups=ssm.size("ngroups", 1),
        )

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Mamba2Config:
        """From transformers' Mamba2Config JSON; absent keys have that class's defaults, except the sizes that differ
        between models, which are required.
        """
        raw = Settings(values)
        check_hugging_face(raw)
        _check_dt_limit(raw, "time_step_limit")
        d_model = raw.size("hidden_size")
        config = cls(
            d_model=d_model,
            n_layer=raw.size("num_hidden_layers"),
            vocab_size=raw.size("vocab_size"),
            d_inner=raw.expanded(d_model),
            d_state=raw.size("state_size", 128),
            d_conv=raw.size("conv_kernel", 4),
            headdim=raw.size("head_dim", 64),
            ngroups=raw.size("n_groups", 8),
            norm_eps=float(raw.positive("layer_norm_epsilon", NORM_EPS)),
        )
        if raw.size("num_heads", 128) != config.heads:
            raise raw.invalid("num_heads", f"expand x hidden_size / head_dim, which is {config.heads}")
        return config

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `ModelConfig.block_shapes`."""
        return {
            "norm": (self.d_model,),
            "in_proj": (self.in_proj_edges[-1], self.d_model),
            "conv_weight": (self.conv_width, self.d_conv),
            "conv_bias": (self.conv_width,),
            "dt_bias": (self.heads,),
            "A_log": (self.heads,),
            "D": (self.heads,),
            "gated_norm": (self.d_inner,),
            "out_proj": (self.d_model, self.d_inner),
        }

    def block_edges(self) -> dict[str, tuple[int, ...]]:
        """As `ModelConfig.block_edges`."""

        def shared(width: int) -> tuple[int, ...]:
            """Equal slices of a width that the SSD groups divide."""
            return tuple(range(0, width + 1, width // self.ngroups))

        identities = {
            "z_act": (0, self.d_inner),
            "x_conv_in": (0, self.d_inner),
            "B_conv_in": (0, self.bc_width),
            "C_conv_in": (0, self.bc_width),
            "x_conv_out": shared(self.d_inner),
            "B_conv_out": shared(self.bc_width),
            "C_conv_out": shared(self.bc_width),
            "dt_act": (0, self.heads),
            "ssm_state_act": (0, self.d_state),
        }
        return {
            "in_proj:input": (0, self.d_model),
            "in_proj:output": self.in_proj_edges,
            **{f"{name}:{end}": edges for name, edges in identities.items() for end in ("input", "output")},
            STATE_BY_CHANNEL: (0, self.d_inner),
            STATE_BY_INDEX: (0, self.d_state),
            "ssd_out_act:input": (0, self.d_inner),
            "ssd_out_act:output": (0, self.d_inner),
            "out_proj:input": (0, self.d_inner),
            "out_proj:output": (0, self.d_model),
        }

    def random_block(self, draw: Draw) -> Mamba2BlockWeights:
        """A in [1, 16], inverse-softplus dt bias. Norm weights, D and the conv bias vary too, so that tests notice if
        they are permuted wrongly.
        """
        dt = torch.exp(draw.uniform(self.heads) * math.log(100) + math.log(0.001))
        return Mamba2BlockWeights(
            norm=1 + draw.normal(self.d_model, std=0.1),
            in_proj=draw.normal(self.in_proj_edges[-1], self.d_model, std=self.d_model**-0.5),
            conv_weight=draw.normal(self.conv_width, self.d_conv, std=self.d_conv**-0.5),
            conv_bias=draw.normal(self.conv_width, std=0.1),
            dt_bias=dt + torch.log(-torch.expm1(-dt)),
            A_log=torch.log(1 + 15 * draw.uniform(self.heads)),
            D=1 + draw.normal(self.heads, std=0.1),
            gated_norm=1 + draw.normal(self.d_inner, std=0.1),
            out_proj=draw.normal(self.d_model, self.d_inner, std=(self.d_inner * 2 * self.n_layer) ** -0.5),
        )

    @property
    def operator_sizes(self) -> OperatorSizes:
        """As `ModelConfig.operator_sizes`."""
        return OperatorSizes(self.d_model, self.d_inner, self.d_state, self.d_conv, self.headdim, self.ngroups)

    @property
    def head_layout(self) -> HeadLayout:
        """As `ModelConfig.head_layout`."""
        return HeadLayout(self.heads, self.d_inner, self.ngroups)


def _check_dt_limit(settings: Settings, key: str) -> None:
    """Refuse a limited time step: upstream's INT8 model silently ignores the limit (qChunkScan.py:100)."""
    limit = settings.values.get(key)
    # transformers writes infinity as {"__float__": "Infinity"}, json as Infinity.
    unlimited = ([0, math.inf], [0, {"__float__": "Infinity"}])
    if limit is not None and limit not in unlimited:
        raise settings.invalid(key, "[0, infinity], no limit")


@dataclass(frozen=True)
class Mamba2BlockWeights(BlockWeights):
    """One block, float32 on the CPU.

    norm (d,); in_proj (2e + 2gn + h, d), rows z, x, B, C, dt; conv_weight (e + 2gn, k), channels x, B, C, last column
    the current token; conv_bias (e + 2gn,); dt_bias, A_log, D (h,); gated_norm (e,); out_proj (d, e).
    """

    kind = MAMBA2
    in_proj: torch.Tensor
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    D: torch.Tensor
    gated_norm: torch.Tensor
    out_proj: torch.Tensor

    def reordered(self, groups: LayerGroups) -> Mamba2BlockWeights:
        """As `BlockWeights.reordered`: upstream's `reorder_mamba` (quamba/reorder_utils.py:172-195).

        Heads are independent of each other, channels of a head too, and heads stay in their SSD group, whose B, C and
        norm they share. Only the order of sums in out_proj and in the norm changes.
        """
        heads, channels = torch.tensor(groups.head_index), torch.tensor(groups.channel_index)
        e, dt = len(channels), len(self.in_proj) - len(heads)
        rows = torch.cat([channels, e + channels, torch.arange(2 * e, dt), dt + heads])
        conv = torch.cat([channels, torch.arange(e, len(self.conv_weight))])
        return replace(
            self,
            in_proj=self.in_proj[rows],
            conv_weight=self.conv_weight[conv],
            conv_bias=self.conv_bias[conv],
            dt_bias=self.dt_bias[heads],
            A_log=self.A_log[heads],
            D=self.D[heads],
            gated_norm=self.gated_norm[channels],
            out_proj=self.out_proj[:, channels].contiguous(),
        )


class Mamba2Block(Block):
    """A Mamba-2 block (Dao & Gu 2024, section 7)."""

    def __init__(
        self, config: Mamba2Config, weights: Mamba2BlockWeights, operators: Operators, *, rotated: bool
    ) -> None:
        """As `Block`."""
        self.config, self.operators, self.rotated = config, operators, rotated
        self.in_proj, self.out_proj = operators.matrix(weights.in_proj), operators.matrix(weights.out_proj)
        self.conv_weight, self.conv_bias = operators.vector(weights.conv_weight.T), operators.vector(weights.conv_bias)
        self.a, self.d = operators.vector(-exp(weights.A_log)), operators.vector(weights.D)
        self.dt_bias, self.gated_norm = operators.vector(weights.dt_bias), operators.vector(weights.gated_norm)

    def forward(
        self,
        normalised: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
        show: Show | None = None,
        change: Change = unchanged,
    ) -> torch.Tensor:
        """As `Block.forward`."""
        config, ops = self.config, self.operators
        widths = [config.d_inner, config.bc_width, config.bc_width]
        before = state if batch.decodes else None
        normalised = change("in_proj:input", normalised)
        projected = F.linear(normalised, self.in_proj)  # (t, 2e + 2gn + h)
        z, conv_in, dt = torch.split(projected, [config.d_inner, config.conv_width, config.heads], dim=1)
        z, dt = change("z_act:input", z), change("dt_act:input", dt)
        if change is not unchanged:
            parts = zip(
                ("x_conv_in:input", "B_conv_in:input", "C_conv_in:input"),
                torch.split(conv_in, widths, dim=1),
                strict=True,
            )
            conv_in = torch.cat([change(*part) for part in parts], dim=1)
        conv_out = ops.conv_silu(conv_in, self.conv_weight, self.conv_bias, batch, before)
        x, b, c = torch.split(conv_out, widths, dim=1)
        x, b, c = change("x_conv_out:input", x), change("B_conv_out:input", b), change("C_conv_out:input", c)
        inputs = SsdInputs(x, b, c, dt, self.a, self.d, self.dt_bias)
        y, last = ops.ssd_scan(inputs, batch, before)
        if state is not None and before is None:
            state.conv, state.ssm = last_rows(conv_in, batch, config.d_conv - 1), last
        gated = ops.gated_norm(y, z, self.gated_norm, config.norm_eps, rotated=self.rotated)
        gated = change("out_proj:input", gated)
        out = F.linear(gated, self.out_proj)  # (t, d)
        if show:
            x_in, b_in, c_in = torch.split(conv_in, widths, dim=1)
            identities = {"z_act": z, "x_conv_in": x_in, "B_conv_in": b_in, "C_conv_in": c_in, "x_conv_out": x}
            identities |= {"B_conv_out": b, "C_conv_out": c, "dt_act": dt, "ssm_state_act": last, "ssd_out_act": y}
            show("in_proj:input", normalised)
            show("in_proj:output", projected)
            for name, values in identities.items():
                show(f"{name}:input", values)
                show(f"{name}:output", values)
            if batch.host.state_every:
                if y.requires_grad:
                    self._watch_states(inputs, y, batch, show)
                else:
                    self._show_states(inputs, batch, show)
            show("out_proj:input", gated)
            show("out_proj:output", out)
        return out

    def _show_states(self, inputs: SsdInputs, batch: PlacedBatch, show: Show) -> None:
        """Show the state along the documents."""
        for pieces in pieces_of(batch, self.config.d_inner * self.config.d_state):
            of_pieces = inputs.at(pieces.rows)
            own = self.operators.ssd_scan(of_pieces, pieces.batch)[1]
            total = pieces.sums(steps(of_pieces.dt, self.dt_bias))  # (pieces, h)
            decay = decay_of(total * self.a).repeat_interleave(self.config.headdim, 1)
            states = pieces.joined(own, decay[:, :, None])
            for site in SAMPLED_STATE_SITES:
                show(site, states, pieces.documents)

    def _watch_states(self, inputs: SsdInputs, y: torch.Tensor, batch: PlacedBatch, show: Show) -> None:
        """`watch_states` of this block."""
        config = self.config
        x, b, c, dt = (part.detach() for part in inputs[:4])

        def decays(pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """step (pieces, k, h), its sums since each piece began, and the decay of a state (pieces, e, 1)."""
            step = pieces.padding.pad(steps(dt[pieces.rows], self.dt_bias))
            since = step.cumsum(1)
            return step, since, decay_of(since[:, -1] * self.a).repeat_interleave(config.headdim, 1)[:, :, None]

        def state_of(pieces: Pieces) -> torch.Tensor:
            step, since, decay = decays(pieces)
            left = step * decay_of((since[:, -1:] - since) * self.a)
            return pieces.joined(
                self._weighted(left, pieces.padding.pad(x[pieces.rows]), pieces.padding.pad(b[pieces.rows])), decay
            )

        def gradient_of(pieces: Pieces, of_y: torch.Tensor) -> torch.Tensor:
            _, since, decay = decays(pieces)
            through = self._weighted(
                decay_of(since * self.a), pieces.padding.pad(of_y), pieces.padding.pad(c[pieces.rows])
            )
            return pieces.joined_gradients(through, decay)

        watch_states(y, batch, config.d_inner * config.d_state, state_of, gradient_of, show)

    def _weighted(self, factors: torch.Tensor, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """(pieces, e, n): the sum over k of factors x shares; factors (pieces, k, h), x (pieces, k, e), shares
        (pieces, k, g n), each SSD group's for its heads.
        """
        config = self.config
        rows = x.shape[:2]
        driven = factors[..., None] * x.view(*rows, config.heads, config.headdim)
        wide = shares.view(*rows, config.ngroups, config.d_state).repeat_interleave(config.heads // config.ngroups, 2)
        found: torch.Tensor = driven.permute(0, 2, 3, 1) @ wide.transpose(1, 2)  # (pieces, h, p, n)
        return found.flatten(1, 2)

    def new_state(self, sequences: int) -> BlockState:
        """As `Block.new_state`."""
        c, ops = self.config, self.operators
        return BlockState(
            torch.zeros(sequences, c.d_conv - 1, c.conv_width, dtype=ops.dtype, device=ops.device),
            torch.zeros(sequences, c.d_inner, c.d_state, device=ops.device),
        )


KIND = BlockKind(
    name=MAMBA2,
    title="Mamba-2",
    model_type="mamba2",
    layer="Mamba2",
    tied=False,
    names={
        "norm": "norm.weight",
        "in_proj": "mixer.in_proj.weight",
        "conv_weight": "mixer.conv1d.weight",
        "conv_bias": "mixer.conv1d.bias",
        "dt_bias": "mixer.dt_bias",
        "A_log": "mixer.A_log",
        "D": "mixer.D",
        "gated_norm": "mixer.norm.weight",
        "out_proj": "mixer.out_proj.weight",
    },
    float32=("D",),
    config=Mamba2Config,
    weights=Mamba2BlockWeights,
    block=Mamba2Block,
)
