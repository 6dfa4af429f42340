"""The tree of all responses' tokens, cut into blocks that a model reads in one pass each.

Responses share their beginnings, so each distinct beginning is read once. A block hangs several
levels of the tree below each of its roots; a token sees its root's text and its own ancestors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Most tokens below one root of a block: more waste attention on strangers, fewer need more passes.
BLOCK_TOKENS = 32


@dataclass(frozen=True)
class Trie:
    """Nodes in order of depth, node 0 the root (the prompt's end).

    Attributes:
        tokens, parents, depths: [N] of each node; -1, -1, 0 for the root.
        children: the nodes below each node.
        leaves: [R] the node that ends each response.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    children: list[list[int]]
    leaves: list[int]

    @cached_property
    def paths(self) -> Tensor:
        """[R, D] the nodes from below the root to each leaf, the root where a response is shorter."""
        columns = [list(self.leaves)]
        while any(columns[-1]):
            columns.append([max(self.parents[node], 0) for node in columns[-1]])
        return torch.tensor(columns[:-1]).T.contiguous()


@dataclass(frozen=True)
class Block:
    """One pass: R rows (a root each) of T tokens, shorter rows filled at the end.

    Attributes:
        tokens: [R, T], 0 where filled.
        offsets: [R, T] tokens of the response before this one.
        visible: [R, T, T] whether token i sees token j of its row: itself and its ancestors.
        next_rows: [R'] the row each root of the next block lies in.
        next_places: [R', L] the places of that root's path in its row, itself last.
        child_places, child_nodes: [C] every node below one of the block's, and where its parent is
            among the R × T places.
        leaf_places, leaf_responses: [E] where responses end among the R × T places, and which.
    """

    tokens: Tensor
    offsets: Tensor
    visible: Tensor
    next_rows: Tensor
    next_places: Tensor
    child_places: Tensor
    child_nodes: Tensor
    leaf_places: Tensor
    leaf_responses: Tensor


def build_trie(responses: Sequence[Sequence[int]]) -> Trie:
    """The tree of R different token sequences, none of which is the beginning of another."""
    tokens, parents, depths, children = [-1], [-1], [0], [list[int]()]
    ends = [0] * len(responses)
    index: dict[tuple[int, int], int] = {}
    for depth in range(max(map(len, responses))):
        for place, response in enumerate(responses):
            if depth >= len(response):
                continue
            key = (ends[place], response[depth])
            if key not in index:
                index[key] = len(tokens)
                children[ends[place]].append(len(tokens))
                tokens.append(response[depth])
                parents.append(ends[place])
                depths.append(depth + 1)
                children.append([])
            ends[place] = index[key]
    if any(children[end] for end in ends) or len(set(ends)) < len(ends):
        raise ValueError("two responses are equal, or one is the beginning of another")
    return Trie(tokens, parents, depths, children, ends)


def plan_blocks(trie: Trie, *, with_leaves: bool) -> list[Block]:
    """Cut the tree into blocks.

    Args:
        trie: the tree.
        with_leaves: whether the last token of each response is read too (a score at the end needs it,
            the probability of the end does not).
    """

    def below(node: int) -> list[int]:
        return [child for child in trie.children[node] if with_leaves or trie.children[child]]

    blocks = []
    roots = [0]
    while any(below(root) for root in roots):
        rows, lowest = _rows(roots, below)
        following = [(row, node) for row, nodes in enumerate(lowest) for node in nodes if below(node)]
        blocks.append(_block(trie, rows, following))
        roots = [node for _, node in following]
    return blocks


def _rows(roots: Sequence[int], below: Callable[[int], list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The nodes of each root's row, level by level while the longest row keeps short, and each row's lowest level."""
    rows = [below(root) for root in roots]
    lowest = rows
    while True:
        deeper = [[child for node in nodes for child in below(node)] for nodes in lowest]
        if not any(deeper) or max(len(a) + len(b) for a, b in zip(rows, deeper, strict=True)) > BLOCK_TOKENS:
            return rows, lowest
        rows = [a + b for a, b in zip(rows, deeper, strict=True)]
        lowest = deeper


def _block(trie: Trie, rows: Sequence[Sequence[int]], following: Sequence[tuple[int, int]]) -> Block:
    width = max(map(len, rows))
    nodes = torch.full((len(rows), width), -1)
    visible = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    paths: dict[int, list[int]] = {}
    for row, members in enumerate(rows):
        nodes[row, : len(members)] = torch.tensor(members)
        for place, node in enumerate(members):
            paths[node] = [*paths.get(trie.parents[node], []), place]
            visible[row, place, paths[node]] = True
    filled = nodes < 0
    everywhere = [(place, node) for place, node in enumerate(nodes.flatten().tolist()) if node >= 0]
    children = [(place, child) for place, node in everywhere for child in trie.children[node]]
    responses = {node: response for response, node in enumerate(trie.leaves)}
    ends = [(place, responses[node]) for place, node in everywhere if node in responses]
    return Block(
        tokens=torch.tensor(trie.tokens)[nodes].masked_fill(filled, 0),
        offsets=(torch.tensor(trie.depths)[nodes] - 1).masked_fill(filled, 0),
        visible=visible,
        next_rows=_integers([row for row, _ in following]),
        next_places=_integers([paths[node] for _, node in following]),
        child_places=_integers([place for place, _ in children]),
        child_nodes=_integers([child for _, child in children]),
        leaf_places=_integers([place for place, _ in ends]),
        leaf_responses=_integers([response for _, response in ends]),
    )


def _integers(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
