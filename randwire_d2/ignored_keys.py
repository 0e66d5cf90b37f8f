"""Accept keys that a config does not have: ignore those of other programs' config files, with a
warning, and take the parameters of the user's own graph generator."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

from detectron2.config import CfgNode


def new_keys(cfg: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys, such as "SOLVER.EPOCHS", of the first config that the second does not have."""
    new = []
    for name, value in cfg.items():
        if name not in known:
            new.append(prefix + name)
        elif isinstance(value, CfgNode):
            new += new_keys(value, known[name], f"{prefix}{name}.")
    return new


def ignore_keys(cfg: CfgNode, keys: Iterable[str]) -> None:
    """Make a config and its copies ignore these keys, as long as they do not have them."""
    ignored = _Ignored({*cfg.__dict__[CfgNode.DEPRECATED_KEYS], *keys})  # yacs's term
    ignored.config = cfg
    cfg.__dict__[CfgNode.DEPRECATED_KEYS] = ignored


@contextmanager
def any_generator(node: CfgNode) -> Iterator[None]:
    """Allow configs merged in the block to have the parameters of a GRAPH that is not registered
    here, but by the user's own script: a network that is given needs no generator."""
    known = set(node)
    node.__dict__[CfgNode.NEW_ALLOWED] = True
    try:
        yield
    finally:
        node.__dict__[CfgNode.NEW_ALLOWED] = False
        unknown = sorted(set(node) - known - {node.GRAPH})
        for name in unknown:
            del node[name]
    if unknown:
        raise KeyError(f"Non-existent config key: MODEL.RANDWIRE.{unknown[0]}")


class _Ignored(set[str]):
    """The ignored keys, except those that the config has: yacs's merge_from_list would skip them.

    A copy of the config has a copy of this set, which refers to the copied config.
    """

    config: CfgNode

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key):
            return False
        try:
            reduce(lambda node, name: node[name], str(key).split("."), self.config)
        except (KeyError, TypeError):
            return True
        return False
