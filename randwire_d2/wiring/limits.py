"""Limits for the size of a network from a file or a config, checked before it is built.

A spec of a few bytes can describe a network that no machine can hold. The paper's largest network
has C=154 and N=32; its widest nodes have 8·154 = 1232 channels; all nodes have 6·10⁷ weights.
"""

MOST_CHARACTERS = 2**22
"""In a spec's JSON. Four stages with ``MOST_EDGES`` each take less than half of it."""

MOST_NODES = 1024
"""In a stage (N); 32 times the paper's."""

MOST_EDGES = 2**15
"""In a stage. The complete graph of 256 nodes has fewer; WS(4, 0.75) with N=32 has 64."""

MOST_CHANNELS = 1024
"""C. In the regular regime, the last nodes then have 8·C = 8192; RegNetY-128GF has up to 7392."""

MOST_WEIGHTS = 2**31
"""In the 1×1 convolutions of all nodes: 8 GiB in float32; 35 times those of C=154, N=32."""

MOST_CELL_NODES = 128
"""Nodes in a NAS-style cell; the paper has 5. Drawing a cell lists all pairs of its nodes."""


def check_limit(what: str, number: int, most: int, way_out: str) -> None:
    """
    Raises:
        ValueError: the number is above the limit; one line with both, and the way out.
    """
    if number > most:
        shown = f"{number:,}" if number < 10**18 else f"a number of {number.bit_length()} bits"
        raise ValueError(f"{what} must be at most {most:,}; got {shown}: {way_out}")
