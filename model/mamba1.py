"""The Mamba-1 block: sizes, tensors, sites, and the forward pass with a tap at every site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from quambase.model.block import Block, BlockKind, BlockWeights, Change, Draw, ModelConfig, Show, unchanged
from quambase.model.exponential import exp
from quambase.model.inputs.settings import NORM_EPS, Settings, check_hugging_face, check_mamba_ssm, padded_vocabulary
from quambase.model.operators.interface import BlockState, Operators, OperatorSizes, ScanInputs, by_state_index
from quambase.model.operators.sampled_states import Pieces, decay_of, pieces_of, steps, watch_states
from quambase.model.packed_batch import PlacedBatch, last_rows
from quambase.schema.sites import MAMBA1, SAMPLED_STATE_SITES, STATE_BY_CHANNEL, STATE_BY_INDEX


@dataclass(frozen=True)
class MambaConfig(ModelConfig):
    """Sizes of a Mamba-1 model."""

    kind = MAMBA1
    d_model: int
    n_layer: int
    vocab_size: int
    d_inner: int
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = 0
    norm_eps: float = NORM_EPS

    @classmethod
    def from_mamba_ssm(cls, values: Mapping[str, Any]) -> MambaConfig:
        """As `ModelConfig.from_mamba_ssm`."""
        raw = Settings(values)
        ssm = check_mamba_ssm(raw)
        d_model = raw.size("d_model")
        return cls(
            d_model=d_model,
            n_layer=raw.size("n_layer"),
            vocab_size=padded_vocabulary(raw),
            d_inner=ssm.expanded(d_model),
            d_state=ssm.size("d_state", 16),
            d_conv=ssm.size("d_conv", 4),
            dt_rank=ssm.rank("dt_rank", d_model),
        )

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> MambaConfig:
        """From transformers' MambaConfig JSON."""
        raw = Settings(values)
        check_hugging_face(raw)
        d_model = raw.size("hidden_size")
        return cls(
            d_model=d_model,
            n_layer=raw.size("num_hidden_layers"),
            vocab_size=raw.size("vocab_size"),
            d_inner=raw.size("intermediate_size") if "intermediate_size" in raw else raw.expanded(d_model),
            d_state=raw.size("state_size", 16),
            d_conv=raw.size("conv_kernel", 4),
            dt_rank=raw.rank("time_step_rank", d_model),
            norm_eps=float(raw.positive("layer_norm_epsilon", NORM_EPS)),
        )

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `ModelConfig.block_shapes`."""
        return {
            "norm": (self.d_model,),
            "in_proj": (2 * self.d_inner, self.d_model),
            "conv_weight": (self.d_inner, self.d_conv),
            "conv_bias": (self.d_inner,),
            "x_proj": (self.dt_rank + 2 * self.d_state, self.d_inner),
            "dt_proj": (self.d_inner, self.dt_rank),
            "dt_bias": (self.d_inner,),
            "A_log": (self.d_inner, self.d_state),
            "D": (self.d_inner,),
            "out_proj": (self.d_model, self.d_inner),
        }

    def block_edges(self) -> dict[str, tuple[int, ...]]:
        """As `ModelConfig.block_edges`."""
        e, n, r = self.d_inner, self.d_state, self.dt_rank
        return {
            "in_proj:input": (0, self.d_model),
            "in_proj:output": (0, e, 2 * e),
            "x_proj:input": (0, e),
            "x_proj:output": (0, r, r + n, r + 2 * n),
            "dt_proj:input": (0, r),
            "dt_proj:output": (0, e),
            "ssm_state_act:input": (0, n),
            "ssm_state_act:output": (0, n),
            STATE_BY_CHANNEL: (0, e),
            STATE_BY_INDEX: (0, n),
            "out_proj:input": (0, e),
            "out_proj:output": (0, self.d_model),
        }

    def random_block(self, draw: Draw) -> Mamba1BlockWeights:
        """S4D-real A, inverse-softplus dt bias."""
        dt = torch.exp(draw.uniform(self.d_inner) * math.log(100) + math.log(0.001))
        return Mamba1BlockWeights(
            norm=1 + draw.normal(self.d_model, std=0.1),
            in_proj=draw.normal(2 * self.d_inner, self.d_model, std=self.d_model**-0.5),
            conv_weight=draw.normal(self.d_inner, self.d_conv, std=self.d_conv**-0.5),
            conv_bias=draw.normal(self.d_inner, std=0.1),
            x_proj=draw.normal(self.dt_rank + 2 * self.d_state, self.d_inner, std=self.d_inner**-0.5),
            dt_proj=draw.normal(self.d_inner, self.dt_rank, std=self.dt_rank**-0.5),
            dt_bias=dt + torch.log(-torch.expm1(-dt)),
            A_log=torch.log(torch.arange(1, self.d_state + 1, dtype=torch.float32)).repeat(self.d_inner, 1),
            D=1 + draw.normal(self.d_inner, std=0.1),
            out_proj=draw.normal(self.d_model, self.d_inner, std=(self.d_inner * 2 * self.n_layer) ** -0.5),
        )

    @property
    def operator_sizes(self) -> OperatorSizes:
        """As `ModelConfig.operator_sizes`."""
        return OperatorSizes(self.d_model, self.d_inner, self.d_state, self.d_conv)


@dataclass(frozen=True)
class Mamba1BlockWeights(BlockWeights):
    """One block, float32 on the CPU.

    norm (d,); in_proj (2e, d), rows x then z; conv_weight (e, k), last column the current token; conv_bias (e,);
    x_proj (r + 2n, e), rows dt, B, C; dt_proj (e, r); dt_bias (e,); A_log (e, n); D (e,); out_proj (d, e).
    """

    kind = MAMBA1
    in_proj: torch.Tensor
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    x_proj: torch.Tensor
    dt_proj: torch.Tensor
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    D: torch.Tensor
    out_proj: torch.Tensor


class Mamba1Block(Block):
    """A Mamba-1 block (Gu & Dao 2023, section 3.4)."""

    def __init__(
        self, config: MambaConfig, weights: Mamba1BlockWeights, operators: Operators, *, rotated: bool
    ) -> None:
        """As `Block`."""
        self.config, self.operators, self.rotated = config, operators, rotated
        self.in_proj, self.out_proj = operators.matrix(weights.in_proj), operators.matrix(weights.out_proj)
        self.x_proj, self.dt_proj = operators.matrix(weights.x_proj), operators.matrix(weights.dt_proj)
        self.conv_weight, self.conv_bias = operators.vector(weights.conv_weight.T), operators.vector(weights.conv_bias)
        self.a, self.d = operators.vector(-exp(weights.A_log).T), operators.vector(weights.D)
        self.dt_bias = operators.vector(weights.dt_bias)

    def forward(
        self,
        normalised: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
        show: Show | None = None,
        change: Change = unchanged,
    ) -> torch.Tensor:
        """As `Block.forward`."""
        ops, e, r = self.operators, self.config.d_inner, self.config.dt_rank
        before = state if batch.decodes else None
        normalised = change("in_proj:input", normalised)
        xz = change("in_proj:output", F.linear(normalised, self.in_proj))  # (t, 2e)
        u = change("x_proj:input", ops.conv_silu(xz[:, :e], self.conv_weight, self.conv_bias, batch, before))
        dt_b_c = change("x_proj:output", F.linear(u, self.x_proj))  # (t, r + 2n)
        dt = dt_b_c[:, :r]
        delta = change("dt_proj:output", F.linear(dt, self.dt_proj))  # (t, e), without its bias
        inputs = ScanInputs(u, delta, dt_b_c[:, r:], xz[:, e:], self.a, self.d, self.dt_bias)
        y, last = ops.selective_scan(inputs, batch, before)
        if state is not None and before is None:
            state.conv, state.ssm = last_rows(xz[:, :e], batch, self.config.d_conv - 1), by_state_index(last)
        gated = change("out_proj:input", ops.hadamard(y) if self.rotated else y)
        out = F.linear(gated, self.out_proj)  # (t, d)
        if show:
            show("in_proj:input", normalised)
            show("in_proj:output", xz)
            show("x_proj:input", u)
            show("x_proj:output", dt_b_c)
            show("dt_proj:input", dt)
            show("dt_proj:output", delta)
            show("ssm_state_act:input", last)
            show("ssm_state_act:output", last)
            if batch.host.state_every:
                if y.requires_grad:
                    self._watch_states(inputs, y, batch, show)
                else:
                    self._show_states(inputs, batch, show)
            show("out_proj:input", gated)
            show("out_proj:output", out)
        return out

    def _show_states(self, inputs: ScanInputs, batch: PlacedBatch, show: Show) -> None:
        """Show the state along the documents."""
        for pieces in pieces_of(batch, self.a.numel()):
            of_pieces = inputs.at(pieces.rows)
            own = self.operators.selective_scan(of_pieces, pieces.batch)[1]
            total = pieces.sums(steps(of_pieces.delta, self.dt_bias))  # (pieces, e)
            states = pieces.joined(own, decay_of(total[:, :, None] * self.a.T))
            for site in SAMPLED_STATE_SITES:
                show(site, states, pieces.documents)

    def _watch_states(self, inputs: ScanInputs, y: torch.Tensor, batch: PlacedBatch, show: Show) -> None:
        """`watch_states` of this block."""
        n = self.config.d_state
        u, delta, bc, z = (part.detach() for part in inputs[:4])

        def decays(pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """step (pieces, k, e), its sums since each piece began, and the decay of a state (pieces, e, n)."""
            step = pieces.padding.pad(steps(delta[pieces.rows], self.dt_bias))
            since = step.cumsum(1)
            return step, since, decay_of(since[:, -1, :, None] * self.a.T)

        def state_of(pieces: Pieces) -> torch.Tensor:
            step, since, decay = decays(pieces)
            driven, b = step * pieces.padding.pad(u[pieces.rows]), pieces.padding.pad(bc[pieces.rows, :n])
            own = self._weighted(since[:, -1:] - since, driven, b)
            return pieces.joined(own, decay)

        def gradient_of(pieces: Pieces, of_y: torch.Tensor) -> torch.Tensor:
            _, since, decay = decays(pieces)
            ungated = pieces.padding.pad(of_y * F.silu(z[pieces.rows]))
            through = self._weighted(since, ungated, pieces.padding.pad(bc[pieces.rows, n:]))
            return pieces.joined_gradients(through, decay)

        watch_states(y, batch, self.a.numel(), state_of, gradient_of, show)

    def _weighted(self, since: torch.Tensor, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """(pieces, e, n): the sum over k of exp(since A) x shares; since, x (pieces, k, e), shares (pieces, k, n).

        In turn over k, since every factor differs.
        """
        found = x.new_zeros(len(x), x.shape[2], shares.shape[2])
        for k in range(x.shape[1]):
            found += decay_of(since[:, k, :, None] * self.a.T) * x[:, k, :, None] * shares[:, k, None, :]
        return found

    def new_state(self, sequences: int) -> BlockState:
        """As `Block.new_state`."""
        c, ops = self.config, self.operators
        return BlockState(
            torch.zeros(sequences, c.d_conv - 1, c.d_inner, dtype=ops.dtype, device=ops.device),
            torch.zeros(sequences, c.d_state, c.d_inner, device=ops.device).transpose(1, 2),
        )


KIND = BlockKind(
    name=MAMBA1,
    title="Mamba-1",
    model_type="mamba",
    layer="Mamba1",
    tied=True,
    names={
        "norm": "norm.weight",
        "in_proj": "mixer.in_proj.weight",
        "conv_weight": "mixer.conv1d.weight",
        "conv_bias": "mixer.conv1d.bias",
        "x_proj": "mixer.x_proj.weight",
        "dt_proj": "mixer.dt_proj.weight",
        "dt_bias": "mixer.dt_proj.bias",
        "A_log": "mixer.A_log",
        "D": "mixer.D",
        "out_proj": "mixer.out_proj.weight",
    },
    float32=("A_log", "D"),
    config=MambaConfig,
    weights=Mamba1BlockWeights,
    block=Mamba1Block,
)
