"""The drawing of a block with its taps: where each site lies in it. The page's template makes SVG of it."""

from __future__ import annotations

from dataclasses import dataclass

from quambase.schema.sites import MAMBA1, MAMBA2

ABOVE, BELOW, LEFT, RIGHT = "above", "below", "left", "right"


@dataclass(frozen=True)
class Box:
    """An operator: the middle of its box, its sizes and its name, a line of text each."""

    x: int
    y: int
    width: int
    height: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Tap:
    """Where a site is observed, and on which side its name stands."""

    site: str
    x: int
    y: int
    side: str = ABOVE


@dataclass(frozen=True)
class Drawing:
    """A block, in units of its own.

    wires  paths, as SVG writes them
    words  (x, y, text): remarks
    """

    width: int
    height: int
    wires: tuple[str, ...]
    boxes: tuple[Box, ...]
    taps: tuple[Tap, ...]
    words: tuple[tuple[int, int, str], ...] = ()


_MAMBA1 = Drawing(
    width=1470,
    height=345,
    wires=(
        "M10 60 H1450",
        "M295 60 V300 H1120 V60",  # z
        "M510 60 V150 H890",  # x_proj, dt_proj
        "M665 150 V200 H890",  # B, C
        "M920 215 V262 H970 V215",  # the state
        "M1180 300 H1450",
    ),
    boxes=(
        Box(160, 60, 80, 36, ("in_proj",)),
        Box(360, 60, 104, 36, ("conv, SiLU",)),
        Box(560, 150, 70, 36, ("x_proj",)),
        Box(758, 150, 76, 36, ("dt_proj",)),
        Box(945, 128, 110, 176, ("selective", "scan")),
        Box(360, 300, 104, 36, ("SiLU",)),
        Box(1120, 60, 30, 30, ("×",)),
        Box(1196, 60, 96, 36, ("Hadamard",)),
        Box(1336, 60, 84, 36, ("out_proj",)),
        Box(1330, 300, 84, 36, ("lm_head",)),
    ),
    taps=(
        Tap("in_proj:input", 65, 60),
        Tap("in_proj:output", 255, 60),
        Tap("x_proj:input", 462, 60),
        Tap("x_proj:output", 628, 150, BELOW),
        Tap("dt_proj:input", 695, 150),
        Tap("dt_proj:output", 832, 150),
        Tap("ssm_state_act:input", 920, 244, LEFT),
        Tap("ssm_state_act:output", 970, 244, RIGHT),
        Tap("out_proj:input", 1268, 60),
        Tap("out_proj:output", 1408, 60),
        Tap("lm_head:input", 1235, 300),
        Tap("lm_head:output", 1408, 300),
    ),
    words=((305, 190, "z"), (298, 54, "x"), (672, 218, "B, C"), (1180, 338, "once, after the last layer")),
)

_ROWS = (("z_act", 50), ("x_conv_in", 115), ("B_conv_in", 180), ("C_conv_in", 245), ("dt_act", 310))
_CONVOLVED = ("x_conv_out", "B_conv_out", "C_conv_out")

_MAMBA2 = Drawing(
    width=1340,
    height=490,
    wires=(
        "M10 180 H330",
        "M330 50 V310",
        "M330 50 H1285 V384 H450 V410",  # z
        "M330 115 H995",
        "M330 180 H995",
        "M330 245 H995",
        "M330 310 H995",
        "M1105 210 H1255 V366 H30 V430 H880",
        "M1025 330 V352 H1075 V330",  # the state
        "M940 430 H1320",
    ),
    boxes=(
        Box(150, 180, 84, 36, ("in_proj",)),
        Box(655, 180, 74, 166, ("conv,", "SiLU")),
        Box(1050, 210, 110, 240, ("SSD", "scan")),
        Box(450, 430, 124, 40, ("gated norm,", "Hadamard")),
        Box(695, 430, 84, 36, ("out_proj",)),
        Box(1130, 430, 84, 36, ("lm_head",)),
    ),
    taps=(
        Tap("in_proj:input", 60, 180),
        Tap("in_proj:output", 255, 180),
        *(Tap(f"{name}:input", 400, y) for name, y in _ROWS if name != "dt_act"),
        *(Tap(f"{name}:output", 545, y) for name, y in _ROWS if name != "dt_act"),
        *(Tap(f"{name}:input", 768, y) for name, (_, y) in zip(_CONVOLVED, _ROWS[1:4], strict=True)),
        *(Tap(f"{name}:output", 915, y) for name, (_, y) in zip(_CONVOLVED, _ROWS[1:4], strict=True)),
        Tap("dt_act:input", 768, 310),
        Tap("dt_act:output", 915, 310),
        Tap("ssm_state_act:input", 1025, 343, LEFT),
        Tap("ssm_state_act:output", 1075, 343, RIGHT),
        Tap("ssd_out_act:input", 110, 430),
        Tap("ssd_out_act:output", 275, 430),
        Tap("out_proj:input", 590, 430),
        Tap("out_proj:output", 800, 430),
        Tap("lm_head:input", 1010, 430),
        Tap("lm_head:output", 1240, 430),
    ),
    words=(
        (305, 44, "z"),
        (305, 109, "x"),
        (313, 200, "B"),
        (305, 239, "C"),
        (302, 304, "dt"),
        (940, 472, "once, after the last layer"),
    ),
)

DRAWINGS = {MAMBA1: _MAMBA1, MAMBA2: _MAMBA2}
"""The drawing of each family's block; an imported tensor has none."""
