"""The model card of a published model: its README.md on the Hugging Face Hub."""

from collections.abc import Mapping

from tabulate import tabulate

from ..wiring import NetworkSpec

_TASKS = {
    "Detector": "object-detection",
    "Classifier": "image-classification",
    "RandWireClassifier": "image-classification",
    "RandWire": "image-feature-extraction",
}
_WHAT = {
    "Detector": "A detector, called on images (H, W, 3), uint8, BGR.",
    "Classifier": "An image classifier, called on images (H, W, 3), uint8, BGR.",
    "RandWireClassifier": "A network from normalised images (N, 3, H, W) to logits (N, classes).",
    "RandWire": "A backbone from normalised images (N, in_channels, H, W) to res2 … res5.",
}


def model_card(
    kind: str, spec: NetworkSpec | None, sections: Mapping[str, str | Mapping[str, object]]
) -> str:
    """A model card in Markdown, with the YAML header that the Hub reads.

    Args:
        kind: as in ``PretrainedFolder``.
        spec: the randomly wired network in the model, if there is one.
        sections: heading -> a text, or a table of two columns.
    """
    title = "A randomly wired network" if spec else "A model"
    lines = [
        "---", "library_name: randwire_d2", f"pipeline_tag: {_TASKS[kind]}",
        "tags: [detectron2, randwire_d2]", "---", "", f"# {title} ({kind})", "", _WHAT[kind], "",
        "```python", "from randwire_d2 import from_pretrained", "",
        'model = from_pretrained("OWNER/NAME")  # or the path of this folder; in eval mode',
        "```", "",
        "To start a training of Detectron2 from it: `MODEL.WEIGHTS hf://OWNER/NAME`. To publish "
        "this folder: `hf upload OWNER/NAME FOLDER`.",
    ]  # fmt: skip
    if spec is not None:
        sections = {"Network": _describe(spec), **sections}
    for heading, content in sections.items():
        text = content if isinstance(content, str) else _table(content)
        lines += ["", f"## {heading}", "", text]
    return "\n".join([*lines, "", "## File", ""])


def _describe(spec: NetworkSpec) -> dict[str, object]:
    return {
        "regime": spec.regime,
        "channels (C)": spec.channels,
        "nodes of each stage": ", ".join(f"{s.name} {s.dag.num_nodes}" for s in spec.stages),
        "operation of a node": spec.node_op,
        "fingerprint": spec.fingerprint,
    }


def _table(rows: Mapping[str, object]) -> str:
    texts = [[name, str(value).replace("|", r"\|")] for name, value in rows.items()]
    return tabulate(texts, ["", ""], tablefmt="pipe", disable_numparse=True)
