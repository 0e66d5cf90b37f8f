"""``save_pretrained`` and ``from_pretrained`` of the networks that are built from a spec."""

import json
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from ..pretrained import PretrainedFolder, model_card, read_folder, write_folder
from ..pretrained.entries import CLASS_NAMES_KEY, PREPROCESSING_KEY, WIRING_KEY, wiring_entry
from ..text import one_line, prefixed
from ..wiring import NetworkSpec

_T = TypeVar("_T", bound="PretrainedNetwork")

# The settings of modules that a project may change.
_SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "activation"),
    *("eps", "num_groups"),
)


class PretrainedNetwork:
    """A mixin for a Module whose constructor takes a spec and ``options``."""

    spec: NetworkSpec

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, besides the spec, that define what the network computes."""

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        preprocessing: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        card: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write weights, spec and options into a folder; a new folder gets its name at the end.

        Args:
            folder: a new or empty folder.
            preprocessing: the preprocessing of the training images, to be saved with the network:
                "input_format", "pixel_mean" and "pixel_std", as in ``checkpoint.Preprocessing``.
            class_names: in the order of the outputs.
            card: the text of README.md; by default it describes the network.
            overwrite: replace an earlier model in a folder that is not empty.

        Raises:
            ValueError: the folder is not empty or a file, safetensors is not installed, or the
                network was changed so that its options don't build it any more; one line.
        """
        assert isinstance(self, nn.Module)
        state, kind = self.state_dict(), type(self).__name__
        self._check_rebuilt(state)
        entries: dict[str, Any] = {
            WIRING_KEY: wiring_entry(self.spec, self.options().get("head_relu"))
        }
        if preprocessing is not None:
            entries[PREPROCESSING_KEY] = dict(preprocessing)
        if class_names is not None:
            entries[CLASS_NAMES_KEY] = list(map(str, class_names))
        if card is None:
            card = model_card(kind, self.spec, {"Options": self.options()})
        return write_folder(
            folder, kind, state, entries, options=self.options(), card=card, overwrite=overwrite
        )

    def _check_rebuilt(self, state: Mapping[str, Tensor]) -> None:
        with prefixed(f"the options of this {type(self).__name__} can't be saved", TypeError):
            json.dumps(self.options())
        with torch.device("meta"):
            again = type(self)(self.spec, **self.options())  # type: ignore[call-arg]
        theirs = again.state_dict()  # type: ignore[attr-defined]
        changed = [
            name
            for name in {**state, **theirs}
            if name not in state or name not in theirs or state[name].shape != theirs[name].shape
        ]
        pairs = zip_longest(_leaves(self), _leaves(again), fillvalue=("",))  # type: ignore[arg-type]
        changed += [ours[0] or built[0] for ours, built in pairs if ours[1:] != built[1:]]
        if changed:
            raise ValueError(
                f"this {type(self).__name__} was changed after it was built, in {changed[0]!r}: "
                f"from_pretrained would build another from {self.options()}; save its "
                "state_dict(), and change the network that you load it into"
            )

    @classmethod
    def from_pretrained(cls: type[_T], path_or_repo: str | os.PathLike[str], **options: Any) -> _T:
        """The network that ``save_pretrained`` wrote, on the CPU, in eval mode.

        Eval mode is what Hugging Face's libraries use, too: batch statistics do not change. To
        train the network, call ``train()``, as every trainer does.

        Args:
            path_or_repo: its folder, or its repository on the Hugging Face Hub:
                ``owner/name[@revision]`` or ``hf://owner/name[@revision]``.
            options: arguments of the constructor that replace the saved ones, such as
                ``norm="FrozenBN", freeze_at=2``.

        Raises:
            ValueError: it can't be found, is damaged or of another kind, or its weights don't fit
                the options; one line.
        """
        return cls.from_folder(read_folder(path_or_repo, cls.__name__), **options)

    @classmethod
    def from_folder(cls: type[_T], folder: PretrainedFolder, **options: Any) -> _T:
        """``from_pretrained`` for a folder that ``read_folder`` has read."""
        if folder.spec is None:
            raise ValueError(f"{folder.path} holds no wiring (the entry {WIRING_KEY!r})")
        with prefixed(f"{folder.path}: its options build no {cls.__name__}", TypeError):
            network = cls(folder.spec, **{**folder.options, **options})  # type: ignore[call-arg]
        assert isinstance(network, nn.Module)
        ours = network.state_dict()
        # FrozenBN has no num_batches_tracked, and with fewer features, later stages are not built.
        built = {name for name, _ in network.named_children()}
        unbuilt = {layer.name for layer in folder.spec.layers} - built
        state = {
            name: value
            for name, value in folder.checkpoint["model"].items()
            if name in ours
            or not (name.endswith("num_batches_tracked") or name.partition(".")[0] in unbuilt)
        }
        try:
            network.load_state_dict(state, assign=True)  # with their own dtype
        except RuntimeError as e:
            raise ValueError(
                f"{folder.path}: its weights are not those of its options' {cls.__name__}: "
                f"{one_line(e, 300)}"
            ) from e
        network.eval()
        return network


def _leaves(network: nn.Module) -> list[tuple[Any, ...]]:
    """The name and the settings of each module without submodules, and whether it is FrozenBN."""
    return [
        (
            name,
            isinstance(module, FrozenBatchNorm2d),
            *(getattr(module, setting, None) for setting in _SETTINGS),
        )
        for name, module in network.named_modules()
        if not any(True for _ in module.children())
    ]
