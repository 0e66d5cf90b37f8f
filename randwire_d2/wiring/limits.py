"""How large a network may be that a file or a config describes; looked at before it is built.

A spec of a few bytes can describe more than any machine holds. The paper's largest network has
C=154 and N=32, its widest nodes have 8·154 = 1232 channels, all of them together 6·10⁷ weights.
"""

MOST_CHARACTERS = 2**22
"""Of a spec's JSON: four stages with ``MOST_EDGES`` each take less than half of it."""

MOST_NODES = 1024
"""N of each stage; 32 times the paper's."""

MOST_EDGES = 2**15
"""Of each stage: the complete graph of 256 nodes has less. WS(4, 0.75) of N=32 has 64."""

MOST_CHANNELS = 1024
"""C; the regular regime's last nodes have 8·C = 8192 then, RegNetY-128GF's widest have 7392."""

MOST_WEIGHTS = 2**31
"""Of the 1×1 convolutions of all nodes: 8 GiB in float32; 35 times those of C=154, N=32."""

MOST_CELL_NODES = 128
"""Of a NAS-style cell, which has 5 in the paper; those who draw it list all pairs of them."""


def check_limit(what: str, number: int, most: int, way_out: str) -> None:
    """
    Raises:
        ValueError: the number is above the limit; one line with both, and the way out.
    """
    if number > most:
        shown = f"{number:,}" if number < 10**18 else f"a number of {number.bit_length()} bits"
        raise ValueError(f"{what} must be at most {most:,}; got {shown}: {way_out}")
