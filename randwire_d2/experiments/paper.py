"""What the paper prints: the numbers of its tables and text, digit by digit, as it rounds them.

Figures 3, 5 and 6 are pictures; of them, only what the text says is here.
"""

from typing import NamedTuple


class Classification(NamedTuple):
    """A row of Tables 2 to 4: ImageNet's validation set, mean ± std over five seeds for RandWire.

    Attributes:
        network: as the paper names it.
        top1, top5: accuracies in %; ``""`` where the paper has none.
        flops: multiply-adds, in M (Table 2) or B (Tables 3 and 4).
        params: parameters, in M.
    """

    network: str
    top1: str
    top5: str
    flops: str
    params: str

    @property
    def accuracies(self) -> tuple[str, ...]:
        return self.top1, self.top5


class Detection(NamedTuple):
    """A row of Table 5: box AP on COCO val2017, in %."""

    network: str
    ap: str
    ap50: str
    ap75: str
    aps: str
    apm: str
    apl: str

    @property
    def accuracies(self) -> tuple[str, ...]:
        return self[1:]


# "Small computation regime", 250 epochs.
TABLE_2 = (
    Classification("MobileNet", "70.6", "89.5", "569", "4.2"),
    Classification("MobileNet v2", "74.7", "", "585", "6.9"),
    Classification("ShuffleNet", "73.7", "91.5", "524", "5.4"),
    Classification("ShuffleNet v2", "74.9", "92.2", "591", "7.4"),
    Classification("NASNet-A", "74.0", "91.6", "564", "5.3"),
    Classification("NASNet-B", "72.8", "91.3", "488", "5.3"),
    Classification("NASNet-C", "72.5", "91.0", "558", "4.9"),
    Classification("Amoeba-A", "74.5", "92.0", "555", "5.1"),
    Classification("Amoeba-B", "74.0", "91.5", "555", "5.3"),
    Classification("Amoeba-C", "75.7", "92.4", "570", "6.4"),
    Classification("PNAS", "74.2", "91.9", "588", "5.1"),
    Classification("DARTS", "73.1", "91.0", "595", "4.9"),
    Classification("RandWire-WS, C=78", "74.7±0.25", "92.2±0.15", "583±6.2", "5.6±0.1"),
)

# "Regular computation regime", 100 epochs.
TABLE_3 = (
    Classification("ResNet-50", "77.1", "93.5", "4.1", "25.6"),
    Classification("ResNeXt-50", "78.4", "94.0", "4.2", "25.0"),
    Classification("RandWire-WS, C=109", "79.0±0.17", "94.4±0.11", "4.0±0.09", "31.9±0.66"),
    Classification("ResNet-101", "78.8", "94.4", "7.8", "44.6"),
    Classification("ResNeXt-101", "79.5", "94.6", "8.0", "44.2"),
    Classification("RandWire-WS, C=154", "80.1±0.19", "94.8±0.18", "7.9±0.18", "61.5±1.32"),
)

# "Large computation regime": tested on 320×320 images, NAS networks on 331×331.
TABLE_4 = (
    Classification("NASNet-A", "82.7", "96.2", "23.8", "88.9"),
    Classification("Amoeba-B", "82.3", "96.1", "22.3", "84.0"),
    Classification("Amoeba-A", "82.8", "96.1", "23.1", "86.7"),
    Classification("PNASNet-5", "82.9", "96.2", "25.0", "86.1"),
    Classification("RandWire-WS, C=154", "81.6±0.13", "95.6±0.07", "16.0±0.36", "61.5±1.32"),
)

# "COCO object detection results fine-tuned from the networks in Table 3".
TABLE_5 = (
    Detection("ResNet-50", "37.1", "58.8", "39.7", "21.9", "40.8", "47.6"),
    Detection("ResNeXt-50", "38.2", "60.5", "41.3", "23.0", "41.5", "48.8"),
    Detection("RandWire-WS, C=109", "39.9", "61.9", "43.3", "23.6", "43.5", "52.7"),
    Detection("ResNet-101", "39.8", "61.7", "43.3", "23.7", "43.9", "51.7"),
    Detection("ResNeXt-101", "40.7", "62.9", "44.5", "24.4", "44.8", "52.7"),
    Detection("RandWire-WS, C=154", "41.1", "63.1", "44.6", "24.6", "45.1", "53.0"),
)

# Figure 3, top-1 accuracy in %, of the settings whose numbers §4.1 gives.
FIGURE_3 = {"WS(4, 0.75)": 73.8, "BA(1)": 70.7}
# "The Pearson correlation between any two series": §4.1 of Figure 6 (it says Figure 5).
FIGURE_6_PEARSON = (0.91, 0.98)
