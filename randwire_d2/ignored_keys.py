"""Keys that a config does not have: what other programs' config files hold besides, which it passes
over with a warning, and the parameters of a project's own generator, which it takes."""

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
    """Have a config, and its copies, pass over keys as long as they do not have them."""
    ignored = _Ignored({*cfg.__dict__[CfgNode.DEPRECATED_KEYS], *keys})  # yacs's word for it
    ignored.config = cfg
    cfg.__dict__[CfgNode.DEPRECATED_KEYS] = ignored


@contextmanager
def any_generator(node: CfgNode) -> Iterator[None]:
    """Let what is merged in the block hold the parameters of its GRAPH, though that is registered
    elsewhere, by a script of one's own: who has the network already draws none."""
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
    """The keys less those that the config has, which yacs's merge_from_list would pass over, too.

    A copy of the config has a copy of this, which asks that copy.
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
