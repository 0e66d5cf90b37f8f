"""NAS-style cells as a random graph model: drawn from the space that §3.1 lists, not searched."""

from itertools import combinations
from random import Random

import networkx as nx

from .limits import MOST_CELL_NODES, check_limit
from .random_graphs import GRAPH_REGISTRY


@GRAPH_REGISTRY.register()
def NAS(num_nodes: int, seed: int, cell_nodes: int) -> nx.Graph:
    """A stack of cells as in NASNet: one cell is drawn uniformly and repeated.

    The rules are those that §3.1 lists, and they are mapped to a graph as in Figure 7, right: "a
    combining op" is a node. Its unary transformation is the one of §3.2, the same for all nodes.

    - "A cell always accepts the activations of the output nodes from the 2 immediately preceding
      cells": for the first cell of a stage these are nodes 0 and 1, which read the stage's input.
    - "Each cell contains 5 nodes that are wired to 2 and only 2 existing nodes", here
      ``cell_nodes``: the inputs of the cell or earlier nodes of it, each pair equally likely.
    - "All nodes that have no output in a cell are concatenated by an extra node": here that node
      adds them up with learned weights, as §3.2's nodes do, so that all nodes have C channels. It
      is an ordinary node; its convolution is the one that NASNet applies to the inputs of a cell.

    With five nodes per cell, N = 2 + 5·(5 + 1) = 32 makes five complete cells. With another N, the
    last cell may be incomplete; its nodes without successors are outputs of the stage.

    The space is small: every merging node has input degree 2, and there are 1·3·6·10·15 = 2700
    cells of five nodes, all equally likely, because the pairs are drawn independently. (The paper
    also mentions an "output degree 1". It does not follow from the three rules, and is no rule
    here: any number of nodes may read a node, as in NASNet.)
    """
    if cell_nodes < 1:
        raise ValueError(f"NAS needs at least one node per cell; got cell_nodes={cell_nodes}")
    check_limit("the nodes of a NAS cell", cell_nodes, MOST_CELL_NODES, "choose smaller cells")
    if num_nodes < 3:
        raise ValueError(f"NAS needs two input nodes and one more: N >= 3; got N={num_nodes}")
    # choice() of a list is the same in all versions of Python; sample() is not.
    random = Random(seed)
    cell = [random.choice([*combinations(range(2 + i), 2)]) for i in range(cell_nodes)]
    loose = set(range(2, 2 + cell_nodes)).difference(*cell)

    graph = nx.empty_graph(num_nodes)
    before, last = 0, 1
    for start in range(2, num_nodes, cell_nodes + 1):
        # Nodes 0 and 1 of a cell are its inputs.
        nodes = [before, last, *range(start, min(start + cell_nodes, num_nodes))]
        for node, pair in zip(nodes[2:], cell):
            graph.add_edges_from((nodes[i], node) for i in pair)
        extra = start + cell_nodes
        if extra < num_nodes:
            graph.add_edges_from((nodes[i], extra) for i in loose)
        before, last = last, extra
    return graph
